// The user interface of the page. The flow itself is in flow.js.
import { dpmpp, euler, heun, load, normal } from "./flow.js";

const SIZE = 784;
const find = (selector) => document.querySelector(selector);
const say = (text, isError = false) => {
  find("#status").textContent = text;
  find("#status").classList.toggle("error", isError);
};

/** Show the value of a slider next to it. */
function label(input, text = (value) => value) {
  const output = input.parentElement.querySelector("output");
  const show = () => { output.value = text(input.value); };
  input.addEventListener("input", show);
  show();
  return show;
}

/** Run one job at a time. A new job ends the older one at its next step. */
let newest = 0;
async function alone(job) {
  const mine = ++newest;
  try {
    await job(() => mine !== newest);
  } catch (error) {
    say(error.message, true);
  }
}

/** Give the browser time to paint. */
const breathe = () => new Promise((done) => { setTimeout(done); });

/** Paint digits side by side. Their pixels are numbers from -1 to 1. */
function paint(canvas, x) {
  const count = x.length / SIZE;
  const small = new OffscreenCanvas(30 * count, 30);
  const pen = small.getContext("2d");
  pen.fillStyle = "rgb(64 64 64)";
  pen.fillRect(0, 0, small.width, 30);
  for (let n = 0; n < count; n++) {
    const image = new ImageData(28, 28);
    for (let k = 0; k < SIZE; k++) {
      const level = Math.round(Math.min(1, Math.max(-1, x[n * SIZE + k])) * 127.5 + 127.5);
      image.data.set([level, level, level, 255], 4 * k);
    }
    pen.putImageData(image, 30 * n + 1, 1);
  }
  canvas.width = 120 * count;
  canvas.height = 120;
  const large = canvas.getContext("2d");
  large.imageSmoothingEnabled = false;
  large.drawImage(small, 0, 0, canvas.width, 120);
}

function digits({ digits: field, noise, settings }) {
  const form = find("#digits");
  const { labels, steps, guidance, same, again } = form.elements;
  const time = find("#time");
  const own = settings.sampler;
  const link = new URLSearchParams(location.hash.slice(1)); // for example #labels=31415&steps=20
  labels.value = link.get("labels") ?? labels.value;
  steps.value = link.get("steps") ?? own.steps;
  guidance.value = link.get("guidance") ?? own.guidance;
  label(steps);
  label(guidance);
  let [given, states] = [noise, []];

  const show = label(time, (step) => {
    if (!states[step]) return "";
    paint(find("#sheet"), states[step]);
    return `t = ${(step / time.max).toFixed(2)}`;
  });
  const draw = () => alone(async (stopped) => {
    const y = [...labels.value].map(Number);
    const one = (n) => (same.checked ? 0 : n % (given.length / SIZE)) * SIZE;
    const x = new Float32Array(y.length * SIZE);
    y.forEach((_, n) => x.set(given.subarray(one(n), one(n) + SIZE), n * SIZE));
    states = [x];
    time.max = steps.value;
    const asked = { guidance: Number(guidance.value), interval: own.guidance_interval, power: own.guidance_power };
    for await (const state of dpmpp((at, t) => field.guided(at, t, y, asked), x, Number(steps.value))) {
      states.push(state);
      time.value = states.length - 1;
      show();
      say(`Drawing: step ${states.length - 1} of ${steps.value}.`);
      await breathe();
      if (stopped()) return;
    }
    find("#save").href = find("#sheet").toDataURL();
    say(`Drew ${y.length} digit${y.length > 1 ? "s" : ""} in ${steps.value} step${steps.value > 1 ? "s" : ""}.`);
    document.body.dataset.drawn = labels.value;
  });
  form.addEventListener("submit", (event) => { event.preventDefault(); draw(); });
  again.addEventListener("click", () => { given = normal(20 * SIZE); draw(); });
  for (const input of [steps, guidance, same]) input.addEventListener("change", draw);
  return draw();
}

/**
 * Return the drawing in MNIST's format: its box scaled to 20 pixels, its centre of mass in the middle of 28 by 28 pixels.
 * The pixels are numbers from -1 to 1. If the pad is empty, return null.
 */
function prepare(pad) {
  const { data, width, height } = pad.getContext("2d").getImageData(0, 0, pad.width, pad.height);
  let [left, top, right, bottom] = [width, height, -1, -1];
  for (let k = 0; k < width * height; k++) {
    if (data[4 * k] < 64) continue;
    const [column, row] = [k % width, Math.floor(k / width)];
    [left, right, top, bottom] = [Math.min(left, column), Math.max(right, column), Math.min(top, row), Math.max(bottom, row)];
  }
  if (right < 0) return null;
  const [w, h] = [right - left + 1, bottom - top + 1];
  const scale = 20 / Math.max(w, h);
  const scaled = (x, y) => {
    const small = new OffscreenCanvas(28, 28);
    const pen = small.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.fillRect(0, 0, 28, 28);
    pen.drawImage(pad, left, top, w, h, x, y, w * scale, h * scale);
    const levels = pen.getImageData(0, 0, 28, 28).data;
    return Float32Array.from({ length: SIZE }, (_, k) => levels[4 * k]);
  };
  const first = scaled(0, 0);
  let [mass, x, y] = [0, 0, 0];
  first.forEach((ink, k) => { mass += ink; x += ink * (k % 28); y += ink * Math.floor(k / 28); });
  const inside = (middle, side) => Math.min(Math.max(Math.round(14 - middle / mass), 0), 28 - Math.ceil(side));
  return scaled(inside(x, w * scale), inside(y, h * scale)).map((ink) => ink / 127.5 - 1);
}

function hand({ digits: field, settings }) {
  const pad = find("#pad");
  const form = find("#hand");
  for (let digit = 0; digit < 10; digit++) form.elements.label.add(new Option(digit));
  form.elements.label.value = 7;
  const pen = pad.getContext("2d", { willReadFrequently: true });
  Object.assign(pen, { lineWidth: 26, lineCap: "round", lineJoin: "round", strokeStyle: "white" });
  const clear = () => { pen.fillStyle = "black"; pen.fillRect(0, 0, pad.width, pad.height); };
  clear();
  const place = ({ offsetX, offsetY }) => [offsetX * pad.width / pad.clientWidth, offsetY * pad.height / pad.clientHeight];
  pad.addEventListener("pointerdown", (event) => {
    pad.setPointerCapture(event.pointerId);
    pen.beginPath();
    pen.moveTo(...place(event));
  });
  pad.addEventListener("pointermove", (event) => {
    if (!event.buttons) return;
    pen.lineTo(...place(event));
    pen.stroke();
  });
  form.elements.clear.addEventListener("click", clear);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    alone(async (stopped) => {
      const digit = prepare(pad);
      if (!digit) return say("The pad is empty. Draw a digit on it first.");
      const [mine, steps] = [[Number(form.elements.label.value)], 20];
      let noise = digit;
      for await (const state of heun((x, t) => field.velocity(x, t, mine), digit, steps, 1, 0)) {
        noise = state;
        say("Finding the noise of your digit.");
        await breathe();
        if (stopped()) return undefined;
      }
      const y = [...Array(10).keys()];
      const x = new Float32Array(10 * SIZE);
      y.forEach((n) => x.set(noise, n * SIZE));
      const asked = { guidance: 2 }; // strong, because the noise of a digit differs from the noise of other classes
      const shown = new Float32Array(11 * SIZE);
      shown.set(digit);
      for await (const state of dpmpp((at, t) => field.guided(at, t, y, asked), x, settings.sampler.steps)) {
        shown.set(state, SIZE);
        paint(find("#hands"), shown);
        say("Drawing ten digits from this noise.");
        await breathe();
        if (stopped()) return undefined;
      }
      return say("Drew ten digits in your handwriting.");
    });
  });
}

function plane({ plane: field }) {
  const canvas = find("#plane");
  const form = find("#points");
  const { label: prompt, steps, clear } = form.elements;
  const time = find("#moment");
  const pen = canvas.getContext("2d");
  const [low, high, top] = [-6, 14, 4.5]; // borders of the shown plane; the network's coordinates are half of these
  const unit = canvas.width / (high - low);
  const at = (x, y) => [(2 * x - low) * unit, (top - 2 * y) * unit];
  let points = new Float32Array(0);
  let states = [points];

  async function paintPlane() {
    const t = Math.min(Number(time.value) / Number(time.max), 0.98);
    const grid = [];
    for (let x = low + 0.5; x < high; x += 1) for (let y = -top + 0.5; y < top; y += 1) grid.push(x / 2, y / 2);
    const here = Float32Array.from(grid);
    const v = await field.velocity(here, t, Array(grid.length / 2).fill(Number(prompt.value)));
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.lineWidth = 2;
    pen.strokeStyle = "#888";
    pen.beginPath();
    for (let x = 0; x <= 4 * Math.PI; x += 0.05) pen.lineTo(...at(x / 2, Math.sin(x) / 2));
    pen.stroke();
    pen.strokeStyle = "#7aa6d8";
    for (let k = 0; k < grid.length; k += 2) arrow(at(here[k], here[k + 1]), v[k], v[k + 1]);
    pen.fillStyle = "#d95f02";
    const state = states[Math.min(time.value, states.length - 1)];
    for (let k = 0; k < state.length; k += 2) {
      pen.beginPath();
      pen.arc(...at(state[k], state[k + 1]), 5, 0, 7);
      pen.fill();
    }
  }
  function arrow([x, y], dx, dy) {
    const length = Math.hypot(dx, dy);
    const [ux, uy] = [dx / length, -dy / length];
    const reach = Math.min(26, 10 * length);
    const [endX, endY] = [x + reach * ux, y + reach * uy];
    pen.beginPath();
    pen.moveTo(x, y);
    pen.lineTo(endX, endY);
    pen.lineTo(endX - 6 * ux + 4 * uy, endY - 6 * uy - 4 * ux);
    pen.moveTo(endX, endY);
    pen.lineTo(endX - 6 * ux - 4 * uy, endY - 6 * uy + 4 * ux);
    pen.stroke();
  }
  const show = label(time, (step) => `t = ${(step / time.max).toFixed(2)}`);
  const follow = () => alone(async (stopped) => {
    time.max = steps.value;
    states = [points];
    const y = Array(points.length / 2).fill(Number(prompt.value));
    if (points.length) {
      for await (const state of euler((x, t) => field.velocity(x, t, y), points, Number(steps.value))) states.push(state);
    }
    for (let step = 0; step < states.length; step++) {
      time.value = step;
      show();
      await paintPlane();
      await new Promise((done) => { setTimeout(done, 40); });
      if (stopped()) return;
    }
  });
  const drop = (more) => { points = Float32Array.from([...points, ...more]); return follow(); };
  form.addEventListener("submit", (event) => { event.preventDefault(); drop(normal(200)); });
  canvas.addEventListener("click", ({ offsetX, offsetY }) => {
    const scale = canvas.width / canvas.clientWidth / unit;
    drop([(offsetX * scale + low) / 2, (top - offsetY * scale) / 2]);
  });
  clear.addEventListener("click", () => { points = new Float32Array(0); follow(); });
  for (const input of [prompt, steps]) {
    label(input);
    input.addEventListener("change", follow);
  }
  time.addEventListener("input", paintPlane);
  return paintPlane();
}

try {
  const loaded = await load();
  find("main").hidden = false;
  hand(loaded);
  await plane(loaded);
  await digits(loaded);
  document.body.dataset.fits = document.documentElement.scrollWidth <= innerWidth;
} catch (error) {
  say(error.message, true);
}
