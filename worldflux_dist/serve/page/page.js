// The page of `worldflux-dist play`: what a person does goes to the server, and each view that
// comes back is drawn whole.
//
// What must stay true: a view is answered by "seen" once it is drawn, so that the server never
// sends what cannot be shown, and all that is shown comes from the newest view.

import { COLORS, drawCurves, drawFrame, drawSentence, drawVectors } from "./draw.js";
import { Steering, keycap } from "./steer.js";

const BUTTONS = [ // key, command, words and whether it is pressed in a view
  [" ", "play", (view) => (view.playing ? "pause" : "play"), (view) => view.playing],
  [",", "back", () => "back"],
  [".", "step", () => "step"],
  ["h", "rewind", () => "rewind"],
  ["d", "dream", () => "dream here"],
  ["b", "branch", () => "branch", (view) => view.mode === "branch"],
  ["g", "go_on", () => "for real"],
  ["m", "agent", () => "agent steers", (view) => view.agent],
  ["s", "sampling", () => "sampling", (view) => view.sampling],
  ["n", "episode", () => "new episode"],
  ["c", "clip", () => "save GIF"],
];
const MODES = {
  together: "the environment and the dream get the same action",
  replay: "the dream gets the recorded actions",
  branch: "your actions go to the dream alone; the real side shows the record",
};
const byId = (id) => document.getElementById(id);

let about = null; // what does not change
let view = null; // the newest
let steering = null; // what a person chose last, and how
let asked = {}; // sliders that were moved since the last view, by command
const images = {};

const scheme = location.protocol === "https:" ? "wss" : "ws";
const socket = new WebSocket(`${scheme}://${location.host}${location.pathname}socket`);
socket.binaryType = "arraybuffer";
let before = Promise.resolve();
socket.onmessage = ({ data }) => {
  before = before.then(() => (typeof data === "string" ? begin(data) : receive(data)));
};
socket.onclose = () => {
  byId("notice").textContent = "The server is gone: start it again and open the URL it prints.";
};

function send(name, value) {
  if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ do: name, value }));
}

// -------------------------------------------------------------------------------- what comes

function begin(text) {
  about = JSON.parse(text).about;
  byId("title").textContent = about.title;
  document.title = `${about.title}: play inside the dream`;
  byId("dream").title = about.sentence;
  byId("difference").hidden = !about.pictures;
  byId("obs").hidden = about.sentence !== "";
  steering = new Steering(byId("actions"), about.controls, {
    free: () => !view?.agent,
    changed: (choice) => send("act", choice),
    pressed: () => { if (!view?.playing) send("step"); },
  });
  for (const [key, name, words] of BUTTONS) {
    const button = document.createElement("button");
    button.id = `do-${name}`;
    button.append(words({}), keycap(key));
    button.onclick = () => command(name);
    byId("buttons").append(button);
  }
  byId("do-sampling").disabled = !about.draws;
  if (!about.draws) byId("do-sampling").title = "This family draws nothing: its dreams are one.";
}

async function receive(buffer) {
  const length = new DataView(buffer).getUint32(0);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let start = 4 + length;
  const files = {};
  for (const [name, type, size] of head.files) {
    files[name] = new Blob([new Uint8Array(buffer, start, size)], { type });
    start += size;
  }
  if (head.clip) {
    download(files.clip, head.clip);
    return;
  }
  for (const name of ["real", "dream", "difference"]) {
    images[name]?.close();
    images[name] = files[name] && (await createImageBitmap(files[name]));
  }
  view = head;
  draw();
  send("seen");
  for (const [name, value] of Object.entries(asked)) send(name, value);
  asked = {};
}

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000); // the browser reads it after the click
}

// -------------------------------------------------------------------------------- what is shown

function draw() {
  if (!view) return;
  Object.assign(document.body.dataset, { mode: view.mode, agent: view.agent, step: view.step });
  if (view.dims) document.body.dataset.dims = "";
  const mode = document.createElement("b");
  mode.textContent = view.mode;
  byId("mode").replaceChildren(mode, MODES[view.mode]);
  byId("count").textContent = `step ${view.step}, ${view.end} recorded, seed ${view.seed}`;
  byId("notice").textContent = view.notice;
  showControls();
  drawPanels();
  for (const name of ["reward", "continue", "value"]) drawCurves(byId(name), curve(name));
  if (view.curves.obs) drawCurves(byId("obs"), differences());
}

function drawPanels() {
  const { step, start, end, mode, dreams } = view;
  const shown = Math.min(step, end);
  const recorded = mode === "together" ? "" : mode === "branch" ? ", as it was" : ", recorded";
  panel("real", "real", `step ${shown}${recorded}`);
  const closed = step === start ? "eyes open" : `${step - start} steps with eyes closed`;
  panel("dream", dreams > 1 ? `${dreams} dreams` : "dream", closed);
  const [what, of] = dreams > 1 ? ["spread", "of the dreams"] : ["error", "of the dream"];
  panel("difference", what, of);
  if (!images.real) drawSentence(canvas("real"), "This environment does not draw itself here.");
  if (view.dims) drawVectors(canvas("dream"), { ...view.dims, ...span() });
  else if (!images.dream) drawSentence(canvas("dream"), about.sentence);
  if (!images.difference && about.pictures) {
    drawSentence(canvas("difference"), "The environment was not given these actions.");
  }
}

function panel(name, words, more) {
  const small = document.createElement("small");
  small.textContent = more;
  byId(name).querySelector("figcaption").replaceChildren(words, small);
  if (images[name]) drawFrame(canvas(name), images[name]);
}

function canvas(name) {
  return byId(name).querySelector("canvas");
}

function span() {
  return { first: view.first, last: view.last, start: view.start, now: view.step };
}

function curve(name) {
  const { truth, mean, std, from, begin: at } = view.curves[name];
  const limits = name === "continue" ? { low: 0, high: 1 } : {};
  const lines = [
    { values: mean, std, from: at, color: COLORS.dream, width: 3 },
    { values: truth, from, color: COLORS.truth },
  ];
  return { title: name, lines, ...span(), ...limits };
}

function differences() {
  const { error, spread, begin: at } = view.curves.obs;
  const lines = [{ values: error, from: at, color: COLORS.error }];
  if (view.dreams > 1) lines.push({ values: spread, from: at, color: COLORS.dream });
  const title = view.dreams > 1 ? "obs error (red), spread (orange)" : "obs error";
  return { title, lines, ...span() };
}

function showControls() {
  for (const [key, name, words, pressed] of BUTTONS) {
    const button = byId(`do-${name}`);
    button.replaceChildren(words(view), keycap(key));
    if (pressed) button.setAttribute("aria-pressed", pressed(view));
  }
  const busy = document.activeElement; // a slider that is being dragged stays where it is
  const set = (id, value, max) => {
    const input = byId(id);
    if (max !== undefined) input.max = max;
    if (busy !== input) input.value = value;
    input.parentElement.querySelector("output").textContent = value;
  };
  set("timeline", view.start, view.end);
  set("dreams", view.dreams);
  set("speed", view.speed);
  steering.show(view.agent ? structuredClone(view.choice) : undefined);
}

// -------------------------------------------------------------------------------- what is done

function command(name) {
  document.activeElement?.blur();
  if (!view) return;
  const values = { play: !view.playing, agent: !view.agent, sampling: !view.sampling };
  if (!byId(`do-${name}`).disabled) send(name, values[name]);
}

// Sliders are moved faster than views come: of each, the newest value goes after the next view.
function slide(id, name) {
  const input = byId(id);
  input.oninput = () => {
    input.parentElement.querySelector("output").textContent = input.value;
    const idle = !Object.keys(asked).length;
    asked[name] = Number(input.value);
    if (idle) send("look");
  };
  input.onchange = () => input.blur();
}
slide("timeline", "seek");
slide("dreams", "dreams");
slide("speed", "speed");

addEventListener("keydown", (event) => {
  if (!about || event.ctrlKey || event.metaKey || event.altKey) return;
  const button = BUTTONS.find(([key]) => key === event.key);
  if (about.controls.keys[event.key] || button) {
    event.preventDefault();
    document.activeElement?.blur();
  }
  if (steering.press(event)) return;
  if (button && (!event.repeat || [",", "."].includes(event.key))) command(button[1]);
  else if ("+=-".includes(event.key)) {
    send("dreams", Math.min(16, Math.max(1, view.dreams + (event.key === "-" ? -1 : 1))));
  }
});

new ResizeObserver(draw).observe(document.querySelector("main"));
