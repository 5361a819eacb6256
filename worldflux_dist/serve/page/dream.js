// A dream that needs nobody: the model's graphs, moments to begin from and what runs them are in
// this page.
//
// What must stay true: a step is one `transition` of the state before, with the action and the
// noise of that step; nothing is asked of a network; and steps never overtake one another.

import { COLORS, drawCurves, drawFrame, drawSentence, drawVectors } from "draw";
import * as ort from "ort";
import { Steering, keycap } from "steer";

const WINDOW = 160; // steps that curves show
const MAX_DIMS = 5; // of a vector
const PER_SECOND = 15;
const ENDED = 0.5; // the chance of going on below which a dream is over
const CURVES = ["reward", "continue", "value"];
const ARRAYS = {
  float32: Float32Array, uint8: Uint8Array, bool: Uint8Array, int64: BigInt64Array,
};
const BUTTONS = [ // key, words, what it does, whether it is pressed
  [" ", () => (playing ? "pause" : "play"), () => play(!playing), () => playing],
  [".", () => "step", () => queue(step)],
  ["m", () => "policy steers", () => { policy = !policy; }, () => policy],
  ["h", () => "from the beginning", () => queue(begin)],
  ["n", () => "another beginning", () => queue(another)],
];
const byId = (id) => document.getElementById(id);
const about = JSON.parse(byId("about").textContent);

let sessions = {}; // by the names of graphs
let starts = []; // states to begin from, tensors by name
let number = 0; // of the one that this dream began from
let steering = null; // what a person or the policy chose last
let [playing, policy] = [false, false];
let waiting = 0; // steps that were asked for and not taken yet
let work = Promise.resolve();

// What others may look at and change: `history` has what each state says and the action that led to
// it, `noise(step, size)` gives the uniform draws of the step into history[step], `state` and `obs`
// are the newest, `settled()` ends with what was asked for.
const dream = { noise: seeded(1), history: [], state: null, obs: {}, settled: () => work };
window.dream = dream;
dream.ready = load().then(begin);

// --------------------------------------------------------------------------------- the dream

async function load() {
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = await bytes("wasm");
  for (const name of Object.keys(about.graphs)) {
    const graph = new Uint8Array(await bytes(name));
    sessions[name] = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"] });
  }
  starts = unpacked(await bytes("starts"));
  build();
}

// What a script of the page holds, as it was before it was compressed.
async function bytes(id) {
  const packed = await fetch(`data:application/gzip;base64,${byId(id).textContent}`);
  return new Response(packed.body.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

// Of each tensor of the state, all beginnings follow each other.
function unpacked(buffer) {
  const found = Array.from({ length: about.starts }, () => ({}));
  let offset = 0;
  for (const { name, dtype, shape } of about.state) {
    const dims = [1, ...shape.slice(1)];
    const size = dims.reduce((a, b) => a * b, 1) * ARRAYS[dtype].BYTES_PER_ELEMENT;
    for (const state of found) {
      const values = new ARRAYS[dtype](buffer.slice(offset, offset + size));
      state[name] = new ort.Tensor(dtype, values, dims);
      offset += size;
    }
  }
  return found;
}

async function run(name, more = {}) {
  const known = { ...dream.state, ...more };
  const feeds = {};
  for (const { name: port, shape } of about.graphs[name].inputs) {
    const [values, dims] = [known[port], [1, ...shape.slice(1)]];
    feeds[port] = values instanceof ort.Tensor ? values : new ort.Tensor("float32", values, dims);
  }
  return sessions[name].run(feeds);
}

async function begin() {
  dream.state = starts[number];
  dream.history = [];
  await read(null);
}

async function another() {
  number = (number + 1) % about.starts;
  await begin();
}

async function step() {
  if (policy) steering.show(chosen((await run("act", { noise: halves() })).greedy.data));
  const action = flat(steering.choice);
  const now = dream.history.length;
  const port = about.graphs.transition.inputs.find(({ name }) => name === "noise");
  const size = port ? port.shape.slice(1).reduce((a, b) => a * b, 1) : 0;
  const noise = port ? dream.noise(now, size) : undefined;
  const after = await run("transition", { action, noise });
  dream.state = Object.fromEntries(
    Object.entries(after).map(([name, value]) => [name.replace("new/", "state/"), value]),
  );
  await read(action);
}

// Note what the state says, and draw it.
async function read(action) {
  const told = await run("decode");
  dream.obs = {};
  for (const [name, value] of Object.entries(told)) {
    if (name.startsWith("obs/")) dream.obs[name.slice(4)] = value;
  }
  const said = { action };
  for (const name of CURVES) if (told[name]) said[name] = told[name].data[0];
  if (about.dims && dream.obs[about.key]) said.dims = [...dream.obs[about.key].data];
  dream.history.push(said);
  draw();
}

// mulberry32: small, the same everywhere; of each number the upper 24 bits, as float32 holds them.
function seeded(seed) {
  return (_, size) => Float32Array.from({ length: size }, () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let x = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return ((x ^ (x >>> 14)) >>> 8) / 2 ** 24;
  });
}

function halves() {
  // The likeliest action needs no draws.
  return new Float32Array(flat(steering.choice).length).fill(0.5);
}

// ------------------------------------------------------------------------------- what is done

// One after the other, whatever is asked for meanwhile.
function queue(task) {
  waiting += 1;
  work = work.then(task).finally(() => { waiting -= 1; });
  return work;
}

async function play(on) {
  const running = playing;
  playing = on;
  while (playing && !running) {
    await Promise.all([queue(step), new Promise((done) => setTimeout(done, 1000 / PER_SECOND))]);
  }
}

function flat(chosenParts) {
  return Float32Array.from(about.controls.parts.flatMap(({ kind, size }, i) => (
    kind === "discrete"
      ? Array.from({ length: size }, (_, n) => Number(n === chosenParts[i]))
      : chosenParts[i]
  )));
}

function chosen(action) {
  let start = 0;
  return about.controls.parts.map(({ kind, size }) => {
    const part = [...action.slice(start, start + size)];
    start += size;
    return kind === "discrete" ? part.indexOf(Math.max(...part)) : part;
  });
}

function build() {
  steering = new Steering(byId("actions"), about.controls, {
    free: () => !policy,
    changed: () => {},
    pressed: () => { if (!playing) queue(step); },
  });
  for (const [, , does] of BUTTONS) {
    const button = document.createElement("button");
    button.onclick = () => { button.blur(); does(); showButtons(); };
    byId("buttons").append(button);
  }
  byId("notice").textContent = "";
}

addEventListener("keydown", (event) => {
  if (!dream.state || event.ctrlKey || event.metaKey || event.altKey) return;
  const steers = event.key in about.controls.keys;
  const button = BUTTONS.find(([key]) => key === event.key);
  if (steers || button) event.preventDefault();
  if (event.repeat && (waiting || !(steers || event.key === "."))) return;
  if (!steering.press(event) && button) {
    button[2]();
    showButtons();
  }
});

addEventListener("resize", () => dream.state && draw());

// ------------------------------------------------------------------------------ what is shown

function draw() {
  const now = dream.history.length - 1;
  const first = Math.max(0, now - (WINDOW * 3) / 4);
  const span = { first, last: first + WINDOW, now };
  const shown = dream.history.slice(first);
  const beginning = `beginning ${number + 1} of ${about.starts}`;
  byId("count").textContent = `step ${now} of the dream, ${beginning}`;
  for (const name of CURVES) {
    const values = shown.map((said) => said[name] ?? null);
    const limits = name === "continue" ? { low: 0, high: 1 } : {};
    const lines = [{ values, from: first, color: COLORS.dream, width: 2 }];
    drawCurves(byId(name), { title: name, lines, ...span, ...limits });
  }
  drawObs(shown, span);
  const going = (shown.at(-1).continue ?? about.discount) / about.discount;
  byId("notice").textContent = going < ENDED ? "In the dream, the episode is over here." : "";
  steering.show();
  showButtons();
}

function drawObs(shown, span) {
  const found = dream.obs[about.key];
  if (!found) drawSentence(byId("obs"), about.sentence);
  else if (about.dims) {
    const dims = Array.from({ length: Math.min(about.dims, MAX_DIMS) }, (_, dim) => dim);
    const values = dims.map((dim) => shown.map((said) => said.dims[dim]));
    const truth = { from: span.first, values: dims.map(() => []) };
    const names = dims.map((dim) => `${about.key}[${dim}]`);
    const dreamt = { from: span.first, values, std: [] };
    drawVectors(byId("obs"), { ...span, names, truth, dream: dreamt });
  } else drawFrame(byId("obs"), picture(found));
}

// A decoded image (1, H, W, 1 or 3) as something that can be drawn.
function picture({ data, dims: [, height, width, channels] }) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const image = new ImageData(width, height); // clamps and rounds
  for (let i = 0; i < width * height; i += 1) {
    for (let c = 0; c < 3; c += 1) image.data[4 * i + c] = data[channels * i + (c % channels)];
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function showButtons() {
  document.body.dataset.policy = policy;
  [...byId("buttons").children].forEach((button, i) => {
    const [key, words, , pressed] = BUTTONS[i];
    button.replaceChildren(words(), keycap(key));
    if (pressed) button.setAttribute("aria-pressed", pressed());
  });
}
