// Pictures and curves of truth and dream on canvases: pure drawing, from numbers and images alone.
//
// What must stay true: nothing here knows where its data comes from, pixels are never smoothed, and
// colours are those of figures.py. Sizes are CSS pixels; NaN and null are gaps in a curve.

export const COLORS = {
  open: "#2a9d8f", // eyes open
  closed: "#e76f51", // eyes closed
  truth: "#264653",
  dream: "#e76f51",
  error: "#b23a48",
  ink: "#222222",
  faint: "#8a8f98",
  grid: "#e9ebee",
  paper: "#ffffff",
};
const FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif";

// Clear a canvas whose size CSS gives, for crisp drawing on any screen: {context, width, height}.
export function fresh(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

// An image (anything that drawImage takes) in the middle, as large as fits; pixels of small ones
// are squares of one size.
export function drawFrame(canvas, image) {
  const { context, width, height } = fresh(canvas);
  const ratio = window.devicePixelRatio || 1;
  // Whole screen pixels for each pixel: other scales would show some wider than others.
  let scale = Math.min(width / image.width, height / image.height) * ratio;
  scale = (scale >= 2 ? Math.floor(scale) : scale) / ratio;
  const [w, h] = [image.width * scale, image.height * scale];
  context.imageSmoothingEnabled = scale * ratio < 1; // thinned-out pixels would flicker
  context.drawImage(image, Math.round((width - w) / 2), Math.round((height - h) / 2), w, h);
}

// A sentence in the middle of a canvas that has no picture.
export function drawSentence(canvas, text) {
  const { context, width, height } = fresh(canvas);
  context.font = `14px ${FONT}`;
  context.fillStyle = COLORS.faint;
  context.textAlign = "center";
  context.textBaseline = "middle";
  const lines = [""];
  for (const word of text.split(" ")) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (context.measureText(longer).width < width - 48) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  lines.forEach((line, i) => {
    context.fillText(line, width / 2, height / 2 + 20 * (i - (lines.length - 1) / 2));
  });
}

// One plot. `plot` has:
//   title         written above, left
//   first, last   the steps at its left and right edge
//   lines         [{values, from, color, width, std}]: values of the steps from `from` on; `std`,
//                 if given, is drawn as a band around them
//   start, now    optional steps: up to `start` eyes were open (shaded), at `now` stands a bar
//   low, high     optional limits of the values; otherwise what is drawn fits
//   area          optional {x, y, width, height} within the canvas, which is then not cleared; such
//                 a plot has no numbers below it
export function drawCurves(canvas, plot) {
  const whole = plot.area ? null : fresh(canvas);
  const context = canvas.getContext("2d");
  const area = plot.area ?? { x: 0, y: 0, width: whole.width, height: whole.height };
  const box = { left: area.x + 52, top: area.y + 20, right: area.x + area.width - 8 };
  box.bottom = area.y + area.height - (plot.area ? 8 : 20);
  const [low, high] = limits(plot);
  const x = (t) => box.left + ((t - plot.first) / Math.max(1, plot.last - plot.first))
    * (box.right - box.left);
  const y = (v) => box.bottom - ((v - low) / (high - low)) * (box.bottom - box.top);

  if (plot.start !== undefined && plot.start > plot.first) {
    context.fillStyle = `${COLORS.open}1f`;
    context.fillRect(box.left, box.top, x(Math.min(plot.start, plot.last)) - box.left,
      box.bottom - box.top);
  }
  context.lineWidth = 1;
  context.strokeStyle = COLORS.grid;
  context.font = `11px ${FONT}`;
  context.fillStyle = COLORS.faint;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const value of [low, (low + high) / 2, high]) {
    stroke(context, [[box.left, y(value)], [box.right, y(value)]]);
    context.fillText(short(value, high - low), box.left - 6, y(value));
  }
  if (!plot.area) {
    context.fillText(`${plot.last}`, box.right, box.bottom + 10);
    context.textAlign = "left";
    context.fillText(`step ${plot.first}`, box.left, box.bottom + 10);
  }
  context.textAlign = "left";
  context.textBaseline = "alphabetic";
  context.fillStyle = COLORS.ink;
  context.font = `600 12px ${FONT}`;
  context.fillText(plot.title, box.left, box.top - 7);

  context.save();
  context.beginPath();
  context.rect(box.left, box.top - 2, box.right - box.left, box.bottom - box.top + 4);
  context.clip();
  for (const line of plot.lines) {
    const points = line.values.map((v, i) => [x(line.from + i), v, line.std ? line.std[i] : 0]);
    for (const run of unbroken(points)) {
      if (line.std) {
        context.fillStyle = `${line.color}33`;
        const above = run.map(([px, v, s]) => [px, y(v + s)]);
        const below = run.map(([px, v, s]) => [px, y(v - s)]).reverse();
        fill(context, [...above, ...below]);
      }
      context.strokeStyle = line.color;
      context.fillStyle = line.color;
      context.lineWidth = line.width ?? 1.5;
      const path = run.map(([px, v]) => [px, y(v)]);
      if (path.length > 1) stroke(context, path);
      else dot(context, path[0]);
    }
  }
  context.restore();
  if (plot.now !== undefined && plot.now >= plot.first && plot.now <= plot.last) {
    context.strokeStyle = COLORS.faint;
    context.lineWidth = 1;
    stroke(context, [[x(plot.now), box.top], [x(plot.now), box.bottom]]);
  }
}

// The dims of a vector as plots one below the other. `vectors` has:
//   names                    one for each dim
//   truth                    {from, values: [one list for each dim]}
//   dream                    {from, values, std}, likewise
//   first, last, start, now  as in drawCurves
export function drawVectors(canvas, vectors) {
  const { width, height } = fresh(canvas);
  const each = height / vectors.names.length;
  vectors.names.forEach((title, dim) => {
    const { truth, dream, first, last, start, now } = vectors;
    const lines = [
      { values: dream.values[dim], std: dream.std[dim], from: dream.from, color: COLORS.dream,
        width: 3 },
      { values: truth.values[dim], from: truth.from, color: COLORS.truth },
    ];
    const area = { x: 0, y: dim * each, width, height: each };
    drawCurves(canvas, { title, first, last, start, now, lines, area });
  });
}

function limits(plot) {
  const seen = [];
  for (const { values, std, from } of plot.lines) {
    values.forEach((value, i) => {
      if (!known(value) || from + i < plot.first || from + i > plot.last) return;
      const around = std ? std[i] : 0;
      seen.push(value - around, value + around);
    });
  }
  let low = plot.low ?? (seen.length ? Math.min(...seen) : 0);
  let high = plot.high ?? (seen.length ? Math.max(...seen) : 1);
  // What hardly moves is drawn as a line in the middle, not as large noise.
  const least = Math.max(1e-3, 0.02 * Math.max(Math.abs(low), Math.abs(high)));
  if (high - low < least) [low, high] = [low - least / 2, high + least / 2];
  return [low, high];
}

function* unbroken(points) {
  let run = [];
  for (const point of points) {
    if (known(point[1])) run.push(point);
    else if (run.length) {
      yield run;
      run = [];
    }
  }
  if (run.length) yield run;
}

function known(value) {
  return value !== null && Number.isFinite(value);
}

function short(value, range) {
  if (Math.abs(value) >= 1000) return value.toPrecision(3);
  const digits = Math.min(5, Math.max(0, 1 - Math.floor(Math.log10(range))));
  return (Math.abs(value) < 0.5 * 10 ** -digits ? 0 : value).toFixed(digits);
}

function stroke(context, points) {
  context.beginPath();
  points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.stroke();
}

function fill(context, points) {
  context.beginPath();
  points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.closePath();
  context.fill();
}

function dot(context, [x, y]) {
  context.beginPath();
  context.arc(x, y, 2, 0, 2 * Math.PI);
  context.fill();
}
