"use strict";

// The drawing functions of all three parts: elements, numbers, tinted cells, images, curves and bars.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value !== undefined) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

function by_id(id) {
  return document.getElementById(id);
}

// A number as text, with a true minus sign.
function shown(value, digits = 4) {
  const size = Math.abs(value),
    tiny = size > 0 && size < 0.5 * 10 ** -digits;
  const text = Number.isInteger(value)
    ? String(value)
    : tiny || size >= 1e5
      ? value.toExponential(1)
      : value.toFixed(digits);
  return text.replaceAll("-", "−");
}

// A position in a grid, in words.
function where(place, width) {
  return `row ${Math.floor(place / width) + 1}, column ${(place % width) + 1}`;
}

function percent(share) {
  return Number.isFinite(share) ? `${(100 * share).toFixed(1)} %` : "–";
}

// The colour of a value: green if positive, purple if negative, paler towards 0. For HTML elements.
function tint(value, largest) {
  const share = Math.min(Math.abs(value) / (largest || 1), 1) * 42;
  return `color-mix(in srgb, var(--${value < 0 ? "negative" : "positive"}) ${share.toFixed(1)}%, var(--card))`;
}

function largest_of(values) {
  return values.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);
}

// The same colours as numbers, for pixels of a canvas; the light and the dark page have different ones.
function palette() {
  const style = getComputedStyle(document.documentElement);
  const rgb = (name) =>
    style
      .getPropertyValue(name)
      .trim()
      .match(/[0-9a-f]{2}/gi)
      .map((pair) => parseInt(pair, 16));
  return {positive: rgb("--positive"), negative: rgb("--negative"), zero: rgb("--card")};
}

// Draws images of height×width side by side into one canvas, each value as a square of `zoom` pixels.
// `color` gives a value's red, green and blue.
function draw_tiles(canvas, values, [count, height, width], columns, color, zoom, chosen = -1) {
  const gap = count > 1 ? 3 : 0,
    rows = Math.ceil(count / columns),
    wide = width * zoom,
    high = height * zoom;
  canvas.width = columns * (wide + gap) + gap;
  canvas.height = rows * (high + gap) + gap;
  const context = canvas.getContext("2d");
  for (let tile = 0; tile < count; tile++) {
    const picture = context.createImageData(wide, high);
    for (let place = 0; place < height * width; place++) {
      const pixel = [...color(values[tile * height * width + place]), 255];
      const corner = Math.floor(place / width) * zoom * wide + (place % width) * zoom;
      for (let y = 0; y < zoom; y++) {
        for (let x = 0; x < zoom; x++) picture.data.set(pixel, 4 * (corner + y * wide + x));
      }
    }
    const x = gap + (tile % columns) * (wide + gap),
      y = gap + Math.floor(tile / columns) * (high + gap);
    context.putImageData(picture, x, y);
  }
  if (chosen >= 0) frame_tile(canvas, [count, height, width], columns, zoom, chosen, "--lit");
}

function frame(canvas, x, y, width, height, line, color = "--lit") {
  const context = canvas.getContext("2d");
  context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue(color);
  context.lineWidth = line;
  context.strokeRect(x + line / 2, y + line / 2, width - line, height - line);
}

// A frame around one of the tiles that draw_tiles has drawn.
function frame_tile(canvas, [, height, width], columns, zoom, tile, color) {
  const gap = 3,
    [wide, high] = [width * zoom + gap, height * zoom + gap];
  frame(
    canvas,
    (tile % columns) * wide,
    Math.floor(tile / columns) * high,
    wide + gap,
    high + gap,
    gap,
    color,
  );
}

function dot(canvas, x, y) {
  const context = canvas.getContext("2d");
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--ink");
  context.beginPath();
  context.arc(x, y, 3, 0, 2 * Math.PI);
  context.fill();
}

// The scale of colours between two values; `color` returns a value's, in CSS.
function draw_scale(place, lowest, largest, color) {
  const stops = Array.from({length: 21}, (_, at) => color(lowest + ((largest - lowest) * at) / 20));
  const bar = element("i", {});
  bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  place.replaceChildren(shown(lowest, 2), bar, shown(largest, 2));
}

// The same for tinted cells.
function draw_cell_scale(place, largest) {
  draw_scale(place, -largest, largest, (value) => tint(value, largest));
}

// The same for values that signed_colors draws as pixels; it starts at 0 if none is negative.
function draw_pixel_scale(place, values, color) {
  const largest = largest_of(values),
    lowest = values.some((value) => value < 0) ? -largest : 0;
  draw_scale(place, lowest, largest, (value) => `rgb(${color(value).map(Math.round).join(" ")})`);
}

// By the square root, so that small values are visible next to large ones.
function signed_colors(largest) {
  const {positive, negative, zero} = palette();
  return (value) => {
    const share = Math.sqrt(Math.min(Math.abs(value) / (largest || 1), 1)),
      end = value < 0 ? negative : positive;
    return zero.map((part, place) => part + (end[place] - part) * share);
  };
}

function grey(value) {
  return [value, value, value];
}

function draw_image(canvas, pixels, zoom = 1) {
  draw_tiles(canvas, pixels, [1, SIDE, SIDE], 1, grey, zoom);
}

// An image with a frame around a cell's receptive field.
function draw_field(canvas, pixels, {top, left, size}) {
  const zoom = 8;
  draw_image(canvas, pixels, zoom);
  frame(canvas, left * zoom, top * zoom, size * zoom, size * zoom, 2);
  const rows = [top, top + size - 1].map((row) => Math.min(Math.max(row, 0), SIDE - 1) + 1);
  const columns = [left, left + size - 1].map((column) => Math.min(Math.max(column, 0), SIDE - 1) + 1);
  canvas.setAttribute(
    "aria-label",
    `Receptive field: rows ${rows.join(" to ")}, columns ${columns.join(" to ")}`,
  );
}

// The ten probabilities as bars, the largest in bold. Returns its class; null if the training diverged.
function draw_bars(place, classes, probabilities, name) {
  const largest = probabilities.indexOf(Math.max(...probabilities)); // -1 if there is a NaN
  place.className = `bars ${name}`;
  place.replaceChildren(
    ...classes.flatMap((label, number) => {
      const share = probabilities[number];
      return bar_row(label, share, percent(share), number === largest);
    }),
  );
  return classes[largest] ?? null;
}

// A label, a bar for a share from 0 to 1, and a text; the words are bold if `is_top`.
function bar_row(label, share, text, is_top, color) {
  const top = is_top ? " top" : "",
    bar = element("i", {});
  bar.style.width = `${100 * (share || 0)}%`;
  if (color) bar.style.background = color;
  return [
    element("span", {class: top}, label),
    element("span", {class: "bar"}, bar),
    element("span", {class: `share${top}`}, text),
  ];
}

// Round values that divide the range between two values into at most five steps.
function round_steps(low, high) {
  const rough = (high - low || 1) / 5,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough * 0.999);
  const first = Math.floor(low / step + 1e-6),
    last = Math.ceil(high / step - 1e-6);
  return Array.from({length: last - first + 1}, (_, place) => (first + place) * step);
}

// Curves over a shared axis. Each of `curves` is {name, color, x, y, dashed}; points whose y is null are left
// out. `format` writes the axis, `exact` the values that the pointer shows of the curves with a name.
function draw_curves(place, curves, {label, x_label, lowest, highest, marker, ticks, format, exact}) {
  const width = 360,
    height = 200,
    left = 44,
    right = 12,
    top = 14,
    bottom = 34;
  const steps = round_steps(lowest, highest),
    low = steps[0],
    high = steps.at(-1);
  const digits = Math.max(0, -Math.floor(Math.log10(steps[1] - steps[0]) + 1e-6));
  const xs = curves.flatMap((curve) => curve.x);
  const first = Math.min(...xs),
    last = Math.max(...xs);
  const to_x = (x) => left + ((x - first) / (last - first || 1)) * (width - left - right);
  const to_y = (y) => top + (1 - (y - low) / (high - low || 1)) * (height - top - bottom);
  const svg = (tag, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text) made.textContent = text;
    return made;
  };
  const picture = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label});
  for (const value of steps) {
    const y = to_y(value);
    picture.append(svg("line", {class: "grid", x1: left, x2: width - right, y1: y, y2: y}));
    picture.append(svg("text", {x: left - 6, y: y + 4, "text-anchor": "end"}, format(value, digits)));
  }
  for (const x of new Set(ticks))
    picture.append(svg("text", {x: to_x(x), y: height - bottom + 16, "text-anchor": "middle"}, shown(x)));
  picture.append(
    svg("text", {x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle"}, x_label),
  );
  for (const {color, x, y, dashed} of curves) {
    const points = x.map((value, place) => [value, y[place]]).filter(([, value]) => value !== null);
    const path = points.map(
      ([x, y], place) =>
        `${place ? "L" : "M"}${to_x(x).toFixed(1)} ${to_y(Math.min(Math.max(y, low), high)).toFixed(1)}`,
    );
    picture.append(svg("path", {class: `curve ${color}${dashed ? " train" : ""}`, d: path.join("")}));
    if (points.length === 1)
      picture.append(
        svg("circle", {class: `dot ${color}`, cx: to_x(points[0][0]), cy: to_y(points[0][1]), r: 4}),
      );
  }
  if (marker !== undefined) {
    const x = to_x(Math.min(Math.max(marker, first), last));
    picture.append(svg("line", {class: `marker ${x_label}`, x1: x, x2: x, y1: top, y2: height - bottom}));
  }
  // Made only when the pointer comes: a long curve has hundreds, and each change of a slider draws it again.
  const add_areas = () => {
    const places = [...new Set(xs)].sort((one, other) => one - other);
    places.forEach((x, at) => {
      const near = (other) => to_x((x + (places[other] ?? x)) / 2);
      const values = curves.flatMap((curve) => {
        const value = curve.y[curve.x.indexOf(x)] ?? null;
        return curve.name && value !== null ? [`${curve.name}: ${exact(value)}`] : [];
      });
      const area = svg("rect", {
        class: "area",
        x: near(at - 1),
        width: near(at + 1) - near(at - 1),
        y: top,
        height: height - top - bottom,
      });
      area.append(svg("title", {}, [`${x_label} ${shown(x)}`, ...values].join("\n")));
      picture.append(area);
    });
  };
  picture.addEventListener("pointerenter", add_areas, {once: true});
  place.replaceChildren(picture);
}

// What a CNN predicts for an image of a class, in words.
function said(read, label) {
  if (read === null) return "gives no number: its training diverged";
  return read === label ? "classifies it correctly" : `mistakes it for ${read}`;
}

// Radio buttons; `choose` gets the index of the chosen one.
function draw_choice(place, name, labels, choose) {
  labels.forEach((label, number) => {
    const input = element("input", {
      type: "radio",
      name,
      checked: number === 0,
      onchange: () => choose(number),
    });
    place.append(element("label", {}, input, label));
  });
}

// A sum as a table: rows of a name and numbers, then the bias unless it is null, and the total.
function draw_products(place, rows, bias, total, heads = ["", "input", "weight", "product"], left_out = "") {
  const cells = (texts, tag = "td") => texts.map((text) => element(tag, {}, text));
  const table = element("table", {}, element("tr", {}, ...cells(heads, "th")));
  for (const [name, ...values] of rows)
    table.append(element("tr", {}, ...cells([name, ...values.map((value) => shown(value))])));
  const ends = heads.map(() => "");
  if (left_out) table.append(element("tr", {}, ...cells(left_out)));
  if (bias !== null) table.append(element("tr", {}, ...cells(["bias", ...ends.slice(2), shown(bias)])));
  table.append(element("tr", {class: "total"}, ...cells(["sum", ...ends.slice(2), shown(total)])));
  place.replaceChildren(scrolled(table, "How the value is computed"));
}

// Content wider than a narrow screen scrolls on its own.
function scrolled(wide, label) {
  return element("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": label}, wide);
}
