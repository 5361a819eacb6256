// How a person steers, on any page: a button for each discrete action, a slider for each number of
// a continuous one, and keys for them.
//
// What must stay true: nothing here knows where an action goes; while a person may not steer,
// nothing changes the choice but `show`.

const WORDS = { " ": "space", ArrowLeft: "\u2190", ArrowUp: "\u2191" };
Object.assign(WORDS, { ArrowRight: "\u2192", ArrowDown: "\u2193" });

// The picture of a key.
export function keycap(key) {
  const cap = document.createElement("kbd");
  cap.textContent = WORDS[key] ?? key;
  return cap;
}

// The parts, keys and first choice of `controls` (controls.py), shown in `root`. `free()` says
// whether a person may steer; `changed(choice)` is told of each new choice, one entry for each
// part; `pressed()` of a key or button that in a pause is one step.
export class Steering {
  constructor(root, { parts, keys, first }, { free, changed, pressed }) {
    Object.assign(this, { root, parts, keys, free, changed, pressed });
    this.choice = structuredClone(first);
    this.held = ""; // the newest key that is still down
    parts.forEach((part, i) => root.append(this.#row(part, i)));
    addEventListener("keyup", ({ key }) => this.#release(key));
  }

  show(choice = this.choice) {
    this.choice = choice;
    for (const element of this.root.querySelectorAll("[data-part]")) {
      const { part, index, dim } = element.dataset;
      const value = choice[part];
      if (index !== undefined) element.setAttribute("aria-pressed", value === Number(index));
      else element.value = value[dim];
    }
  }

  // What a key that is down does; whether it steers at all.
  press({ key, repeat }) {
    const set = this.keys[key];
    if (!set) return false;
    if (!repeat) {
      this.held = key;
      this.#act(set.part, set.index ?? set.value, set.dim);
    }
    this.pressed();
    return true;
  }

  #release(key) {
    if (key !== this.held) return;
    this.held = "";
    const { part, dim } = this.keys[key];
    const { rest } = this.parts[part];
    if (dim !== undefined) this.#act(part, 0, dim);
    else if (rest !== null) this.#act(part, rest);
  }

  #act(part, value, dim) {
    if (!this.free()) return;
    if (dim === undefined) this.choice[part] = value;
    else this.choice[part][dim] = value;
    this.changed(this.choice);
    this.show();
  }

  #row(part, i) {
    const [row, title] = [document.createElement("div"), document.createElement("span")];
    row.className = "part";
    title.textContent = part.title;
    row.append(title);
    for (let n = 0; n < part.size; n += 1) {
      const caps = Object.entries(this.keys)
        .filter(([, set]) => set.part === i && (set.index ?? set.dim) === n)
        .map(([key]) => keycap(key));
      row.append(part.names ? this.#button(part, i, n, caps) : this.#slider(part, i, n, caps));
    }
    return row;
  }

  #button({ names }, part, index, caps) {
    const button = document.createElement("button");
    Object.assign(button.dataset, { part, index });
    button.append(names[index], ...caps);
    button.onclick = () => {
      button.blur();
      this.#act(part, index);
      this.pressed();
    };
    return button;
  }

  #slider({ size }, part, dim, caps) {
    const [label, input] = [document.createElement("label"), document.createElement("input")];
    Object.assign(input, { type: "range", min: -1, max: 1, step: 0.01, value: 0 });
    Object.assign(input.dataset, { part, dim });
    input.oninput = () => this.#act(part, Number(input.value), dim);
    input.onchange = () => input.blur();
    label.append(size > 1 ? `${dim}` : "", input, ...caps);
    return label;
  }
}
