// A reader of docs/contract.md, for onnxruntime-node and onnxruntime-web.

export const ARRAYS = {
  float32: Float32Array, float64: Float64Array, bool: Uint8Array, int8: Int8Array, uint8: Uint8Array,
  int16: Int16Array, uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array,
  int64: BigInt64Array, uint64: BigUint64Array,
};

/** The metadata of a model, field 14 of the protobuf message: ONNX Runtime's JavaScript does not give it. */
export function metadata(file) {
  let at = 0;
  const varint = (bytes) => {
    let value = 0, scale = 1, byte;
    do {
      if (at >= bytes.length) throw new Error("not a whole ONNX file");
      byte = bytes[at++];
      value += (byte & 127) * scale;
      scale *= 128;
    } while (byte & 128);
    return value;
  };
  const fields = (bytes, wanted) => {
    const found = [];
    at = 0;
    while (at < bytes.length) {
      const tag = varint(bytes), type = tag & 7, number = Math.floor(tag / 8);
      if (type === 0) varint(bytes);
      else if (type === 2) {
        const size = varint(bytes);
        if (wanted.includes(number)) found.push(bytes.subarray(at, at + size));
        at += size;
      } else if (type === 1 || type === 5) at += type === 1 ? 8 : 4;
      else throw new Error("not an ONNX file");
    }
    return found;
  };
  const text = new TextDecoder();
  for (const property of fields(file, [14])) {
    const [key, value] = fields(property, [1, 2]);
    if (text.decode(key) === "co3d") return JSON.parse(text.decode(value));
  }
  throw new Error("the model was not compiled by co3d-compile");
}

export class Stream {
  /**
   * Opens a compiled model.
   * @param ort the module onnxruntime-node or onnxruntime-web
   * @param bytes the ONNX file, a Uint8Array
   * @param options of the session; a function of the metadata may give them
   * @param batch streams that advance together
   */
  static async open(ort, bytes, options = {}, batch = 1) {
    const stream = new Stream();
    stream.ort = ort;
    stream.batch = batch;
    stream.info = metadata(bytes);
    const { version } = stream.info;
    if (version !== 1) throw new Error(`this JavaScript reader knows contract version 1, not ${version}`);
    const chosen = typeof options === "function" ? options(stream.info) : options;
    stream.session = await ort.InferenceSession.create(bytes, chosen);
    stream.reset();
    return stream;
  }

  /** A tensor of a spec of the metadata, filled with a number or with `data`. */
  tensor({ shape, dtype }, data) {
    if (!(dtype in ARRAYS)) throw new Error(`this reader has no ${dtype}`);
    const dims = shape.map((size) => (size === "N" ? this.batch : size));
    const length = dims.reduce((a, b) => a * b, 1);
    if (typeof data !== "object") {
      const value = /64$/.test(dtype) && dtype !== "float64" ? BigInt(data) : data;
      data = new ARRAYS[dtype](length).fill(value);
    }
    if (data.length !== length) throw new Error(`got ${data.length} numbers, expected ${dims.join(" x ")}`);
    return new this.ort.Tensor(dtype, data, dims);
  }

  /** Starts all streams afresh. */
  reset() {
    const numbers = { inf: Infinity, "-inf": -Infinity, nan: NaN };
    this.state = {};
    for (const s of this.info.states) this.state[s.input] = this.tensor(s, numbers[s.initial] ?? s.initial);
  }

  /** Advances all streams by one step: a typed array per input, in order; returns a tensor per output, in order. */
  async step(...frames) {
    const { inputs, outputs, states, valid } = this.info;
    const values = { ...this.state };
    inputs.forEach((spec, i) => (values[spec.name] = this.tensor(spec, frames[i])));
    if (valid) values[valid] = this.tensor({ shape: ["N", inputs[0].frames_per_step ?? 1], dtype: "bool" }, 1);
    const before = Object.values(this.state);
    Object.assign(values, await this.session.run(values));
    for (const s of states) this.state[s.input] = values[s.output];
    const kept = new Set(Object.values(this.state));
    for (const tensor of before) if (tensor.location === "gpu-buffer" && !kept.has(tensor)) tensor.dispose();
    return outputs.map((spec) => values[spec.name]);
  }
}
