// The page: frames of a camera or file into a compiled model, its answers as a moving plot.
//
// Parameters of the address: model=URL (model.onnx), clip=URL (the clip model as ONNX, to compare with), labels=URL (a
// JSON list), mean=0.45, std=0.225, provider=wasm|webgpu, threads=N, source=camera, steps=N (stop after so many),
// record=URL (post what went in and what came out).
import * as ort from "./node_modules/onnxruntime-web/dist/ort.webgpu.min.mjs";
import { Stream } from "../node/reader.mjs";

const options = new URLSearchParams(location.search);
const number = (name, otherwise) => Number(options.get(name) ?? otherwise);
const show = (id, text) => (document.getElementById(id).textContent = text);
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"];
const MEAN = number("mean", 0.45), STD = number("std", 0.225), LAST = number("steps", Infinity);
let running = null;

/** States stay on the GPU; the CPU's are handed back and forth, which is a copy of each. */
function sessionOptions(provider) {
  return (info) => {
    const places = Object.fromEntries(info.states.map((s) => [s.output, "gpu-buffer"]));
    return { executionProviders: [provider], ...(provider === "webgpu" && { preferredOutputLocation: places }) };
  };
}

async function open() {
  let wanted = options.get("provider") ?? ((await navigator.gpu?.requestAdapter()) ? "webgpu" : "wasm");
  ort.env.wasm.numThreads = number("threads", crossOriginIsolated ? navigator.hardwareConcurrency : 1);
  const answer = await fetch(options.get("model") ?? "model.onnx");
  if (!answer.ok) throw new Error(`the model: ${answer.status} ${answer.statusText}`);
  const bytes = new Uint8Array(await answer.arrayBuffer());
  let stream = await Stream.open(ort, bytes, sessionOptions(wanted)), note = "";
  if (wanted === "webgpu" && !(await agrees(stream, bytes))) {
    await stream.session.release();
    note = "; WebGPU gives other numbers";
    stream = await Stream.open(ort, bytes, sessionOptions((wanted = "wasm")));
  }
  const count = stream.info.states.reduce((sum, s) => sum + stream.tensor(s, 0).data.byteLength, 0);
  show("provider", `${wanted}, ${ort.env.wasm.numThreads} threads${note}`);
  show("state", `${stream.info.states.length} tensors, ${(count / 1e6).toFixed(2)} MB`);
  if (stream.info.inputs.length !== 1) throw new Error("this page has one camera, the model several inputs");
  const labels = options.get("labels") ? await (await fetch(options.get("labels"))).json() : stream.info.labels ?? [];
  return { stream, labels, provider: wanted, clip: await clipTime(stream, wanted) };
}

/**
 * Whether a step on noise gives WebAssembly's numbers. onnxruntime-web 1.30 has convolutions that are wrong on WebGPU,
 * without an error: those of 6, 9, 15, ... channels, which is what a first layer reads of several frames of 3.
 */
async function agrees(stream, bytes) {
  const other = await Stream.open(ort, bytes, sessionOptions("wasm"));
  const frames = stream.info.inputs.map((spec) => stream.tensor(spec, 0).data.map(() => Math.random() - 0.5));
  const [mine, wanted] = [await stream.step(...frames), await other.step(...frames)];
  for (const name of Object.keys(other.state)) mine.push(stream.state[name]), wanted.push(other.state[name]);
  let same = true;
  for (const [i, tensor] of wanted.entries()) {
    const right = Array.from(await tensor.getData(), Number), actual = Array.from(await mine[i].getData(), Number);
    const most = right.reduce((a, b) => (Number.isFinite(b) ? Math.max(a, Math.abs(b)) : a), 0);
    same &&= right.every((value, k) => value === actual[k] || Math.abs(value - actual[k]) <= 1e-2 * most);
  }
  await other.session.release();
  return same;
}

/** Milliseconds of the clip model, if there is one to compare with. */
async function clipTime(stream, provider) {
  if (!options.get("clip")) return null;
  const session = await ort.InferenceSession.create(options.get("clip"), { executionProviders: [provider] });
  const [{ name, shape }] = session.inputMetadata;
  const dims = shape.map((size) => (typeof size === "number" ? size : 1));
  const value = new ort.Tensor("float32", new Float32Array(dims.reduce((a, b) => a * b)), dims);
  const times = [];
  for (let i = 0; i < 4; i++) {
    const start = performance.now();
    await session.run({ [name]: value });
    times.push(performance.now() - start);
  }
  await session.release();
  return Math.min(...times.slice(1));
}

/** The picture, cropped to the model's size, as numbers in [0, 1] less mean by std: channels first. */
function grab(video, canvas, frame, at, pulse) {
  const { width, height } = canvas, context = canvas.getContext("2d", { willReadFrequently: true });
  const scale = Math.max(width / video.videoWidth, height / video.videoHeight);
  const w = video.videoWidth * scale, h = video.videoHeight * scale;
  context.drawImage(video, (width - w) / 2, (height - h) / 2, w, h);
  const { data } = context.getImageData(0, 0, width, height), size = width * height;
  for (let c = 0; c < 3; c++)
    for (let i = 0; i < size; i++) frame[(c * pulse + at) * size + i] = (data[4 * i + c] / 255 - MEAN) / STD;
}

function nextFrame(video) {
  return new Promise((done) => (video.requestVideoFrameCallback ?? requestAnimationFrame).call(video, done));
}

async function run(video, { stream, labels, provider, clip }) {
  const token = (running = {}), [spec] = stream.info.inputs, pulse = spec.frames_per_step;
  const canvas = document.getElementById("picture"), history = [], times = [], record = [];
  [canvas.height, canvas.width] = spec.shape.slice(-2);
  stream.reset();
  document.getElementById("stop").disabled = false;
  for (let step = 0; running === token && !video.ended && step < LAST; step++) {
    const frame = stream.tensor(spec, 0).data;
    for (let at = 0; at < pulse; at++) {
      await nextFrame(video);
      grab(video, canvas, frame, at, pulse);
    }
    const start = performance.now(), [answer] = await stream.step(frame), values = await answer.getData();
    times.push((performance.now() - start) / pulse);
    if (options.get("record")) record.push({ provider, input: Array.from(frame), output: Array.from(values) });
    if (step < stream.info.warmup_steps) continue;
    history.push(probabilities(values));
    if (history.length > 200) history.shift();
    draw(history, labels);
    const recent = times.slice(-50).sort((a, b) => a - b), median = recent[recent.length >> 1];
    const gain = clip ? `, clip model ${clip.toFixed(1)} ms: ${(clip / median).toFixed(1)} times faster` : "";
    show("speed", `${median.toFixed(1)} ms${gain}`);
  }
  document.getElementById("stop").disabled = true;
  await post(record);
}

/** Sends what was recorded, where that was asked for. */
async function post(data) {
  if (options.get("record")) await fetch(options.get("record"), { method: "POST", body: JSON.stringify(data) });
}

/** Probabilities: as they are, or the softmax of what the model gives. */
function probabilities(values) {
  const plain = Array.from(values), total = plain.reduce((a, b) => a + b, 0);
  if (Math.abs(total - 1) < 1e-3 && plain.every((v) => v >= 0)) return plain;
  const top = plain.reduce((a, b) => Math.max(a, b)), powers = plain.map((v) => Math.exp(v - top));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((v) => v / sum);
}

/** The classes that are on top now, over time. */
function draw(history, labels) {
  const canvas = document.getElementById("plot"), context = canvas.getContext("2d"), now = history.at(-1);
  const best = [...now.keys()].sort((a, b) => now[b] - now[a]).slice(0, COLOURS.length);
  const most = Math.max(...history.map((row) => Math.max(...best.map((k) => row[k]))));
  const height = canvas.height - 30;
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.font = "16px system-ui, sans-serif";
  context.fillText(`${(most * 100).toFixed(1)} %`, 4, 18);
  best.forEach((k, rank) => {
    context.strokeStyle = COLOURS[rank];
    context.lineWidth = 2;
    context.beginPath();
    history.forEach((row, i) => context.lineTo((i / 200) * canvas.width, 26 + (1 - row[k] / most) * height));
    context.stroke();
  });
  const items = best.map((k, rank) => {
    const item = document.createElement("li");
    item.style.color = COLOURS[rank];
    item.textContent = `${labels[k] ?? `class ${k}`}: ${(now[k] * 100).toFixed(1)} %`;
    return item;
  });
  document.getElementById("top").replaceChildren(...items);
}

async function start(source) {
  try {
    show("error", "");
    running = null;
    const video = Object.assign(document.createElement("video"), { muted: true, playsInline: true });
    if (source instanceof File) video.src = URL.createObjectURL(source);
    else video.srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
    await video.play();
    await run(video, await opened);
    video.srcObject?.getTracks().forEach((track) => track.stop());
  } catch (error) {
    show("error", error.message ?? String(error));
    await post(String(error));
  }
}

const opened = open();
opened.catch((error) => show("error", error.message));
document.getElementById("camera").onclick = () => start(null);
document.getElementById("file").onchange = (event) => event.target.files[0] && start(event.target.files[0]);
document.getElementById("stop").onclick = () => (running = null);
if (options.get("source") === "camera") start(null);
