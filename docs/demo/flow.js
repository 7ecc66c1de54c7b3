// The flow in the browser: two velocity fields v(x, t, y), and the solvers that follow them from noise to data.
// The mathematics is the same as in flowmatch_mnist/flow/solvers.py and guidance.py.

/** Return a file of built/ as a Response. If it is missing, throw an error that says what to do. */
async function file(name) {
  const answer = await fetch(`built/${name}`).catch(() => null);
  if (!answer?.ok) {
    throw new Error(`The file built/${name} is missing. Run "python docs/demo/build.py", and serve the folder docs/demo.`);
  }
  return answer;
}

/** A velocity field. A sample is an array of `size` numbers with the given shape. */
export class Field {
  constructor(runtime, session, shape) {
    Object.assign(this, { runtime, session, shape, size: shape.reduce((a, b) => a * b), evaluations: 0 });
  }

  /** Return the velocities at the points x (n times size) and the time t, for the labels y (n). */
  async velocity(x, t, y) {
    const { Tensor } = this.runtime;
    const n = y.length;
    const { v } = await this.session.run({
      x: new Tensor("float32", x, [n, ...this.shape]),
      t: new Tensor("float32", new Float32Array(n).fill(t), [n]),
      y: new Tensor("int32", Int32Array.from(y), [n]),
    });
    this.evaluations += n;
    return v.data;
  }

  /**
   * Return the velocities with guidance in an interval of t: without + scale (with - without), where "with" and "without" are
   * the velocities with and without the label. One batch of twice the size computes both. With a power, the scale of a sample
   * is 1 + (guidance - 1) doubt^power. Its doubt is the norm of the difference between the predictions of the noise.
   */
  async guided(x, t, y, { guidance = 1, interval = [0, 1], power = 0, nothing = 10 } = {}) {
    if (guidance === 1 || t < interval[0] || t > interval[1]) return this.velocity(x, t, y);
    const both = new Float32Array(2 * x.length);
    both.set(x);
    both.set(x, x.length);
    const v = await this.velocity(both, t, [...y, ...y.map(() => nothing)]);
    const gap = x.map((_, i) => v[i] - v[x.length + i]);
    const doubts = y.map((_, n) => t * Math.hypot(...gap.subarray(n * this.size, (n + 1) * this.size)));
    return x.map((_, i) => v[i] + (guidance - 1) * doubts[Math.floor(i / this.size)] ** power * gap[i]);
  }
}

const logSnr = (t) => 2 * Math.log(t / (1 - t));

/** Yield the states of DPM-Solver++(2M) from noise to data. Each step estimates the data once and extrapolates the last two. */
export async function* dpmpp(velocity, x, steps) {
  let before = null;
  let last = Infinity;
  for (let i = 0; i < steps; i++) {
    const [t, next] = [i / steps, (i + 1) / steps];
    const v = await velocity(x, t);
    const estimate = x.map((value, k) => value + (1 - t) * v[k]);
    const h = logSnr(next) - logSnr(t);
    const share = before && Number.isFinite(h) && Number.isFinite(last) ? h / (2 * last) : 0;
    const ratio = (1 - next) / (1 - t);
    x = x.map((value, k) => {
      const data = share ? estimate[k] + share * (estimate[k] - before[k]) : estimate[k];
      return ratio * value + (next - t * ratio) * data;
    });
    [before, last] = [estimate, h];
    yield x;
  }
}

/** Yield the states of Heun's method from one time to another: forwards to data, or backwards to noise. */
export async function* heun(velocity, x, steps, from = 0, to = 1) {
  const h = (to - from) / steps;
  for (let i = 0; i < steps; i++) {
    const t = from + i * h;
    const start = await velocity(x, t);
    const end = await velocity(x.map((value, k) => value + h * start[k]), t + h);
    x = x.map((value, k) => value + (h / 2) * (start[k] + end[k]));
    yield x;
  }
}

/** Yield the states of Euler's method. */
export async function* euler(velocity, x, steps) {
  for (let i = 0; i < steps; i++) {
    const v = await velocity(x, i / steps);
    x = x.map((value, k) => value + v[k] / steps);
    yield x;
  }
}

/** Return standard normal random numbers, by the Box-Muller transform. */
export function normal(count) {
  return Float32Array.from({ length: count }, () =>
    Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()));
}

/** Load both fields, the noise of sample.py with seed 0, and the settings of the sampler. */
export async function load() {
  const [settings, noise, digits, plane, packed] = await Promise.all(
    ["settings.json", "noise.bin", "digits.onnx", "plane.onnx", "ort.wasm.gz"].map(file));
  await file("ort.mjs");
  const runtime = await import("./built/ort.mjs");
  const unpacked = new Response(packed.body.pipeThrough(new DecompressionStream("gzip")));
  runtime.env.wasm.wasmBinary = await unpacked.arrayBuffer();
  runtime.env.wasm.numThreads = 1; // more threads need headers that a plain static host does not send
  const open = async (model, shape) =>
    new Field(runtime, await runtime.InferenceSession.create(new Uint8Array(await model.arrayBuffer())), shape);
  return {
    settings: await settings.json(),
    noise: new Float32Array(await noise.arrayBuffer()),
    digits: await open(digits, [1, 28, 28]),
    plane: await open(plane, [2]),
  };
}
