// Runs a compiled model frame by frame with onnxruntime-node.
//
//   npm install && node stream.js MODEL.onnx FRAMES.bin RESULTS.bin [BATCH]
//
// FRAMES.bin holds the inputs of each step one after another, in the order of the metadata, as raw numbers;
// RESULTS.bin gets the outputs of each step the same way.
"use strict";
const fs = require("node:fs");
const ort = require("onnxruntime-node");

async function main([model, source, target, batch = "1"]) {
  const { ARRAYS, Stream } = await import("./reader.mjs");
  const stream = await Stream.open(ort, fs.readFileSync(model), { executionProviders: ["cpu"] }, Number(batch));
  const bytes = fs.readFileSync(source), results = [];
  for (let at = 0; at < bytes.length; ) {
    const frames = stream.info.inputs.map((spec) => {
      const size = stream.tensor(spec, 0).data.byteLength;
      const piece = Uint8Array.from(bytes.subarray(at, (at += size))); // a copy, aligned
      return new ARRAYS[spec.dtype](piece.buffer);
    });
    for (const { data } of await stream.step(...frames)) {
      results.push(Buffer.from(data.buffer, data.byteOffset, data.byteLength));
    }
  }
  fs.writeFileSync(target, Buffer.concat(results));
}

main(process.argv.slice(2)).catch((error) => {
  console.error(`error: ${error.message}`);
  process.exit(1);
});
