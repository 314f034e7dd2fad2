"use strict";

// Why a CNN predicts a class: what each position of its last maps adds to a logit, or to a difference of two.

// Splits Σ signs · logits into what each input of the linear layers adds, and what their biases add. For one image,
// each ReLU between them is on or off, so these layers act as one linear layer: its products and its bias sum to the
// logit exactly. This is "gradient times input" (Shrikumar et al., arXiv 1605.01713).
function attribute(layers, steps, signs) {
  const flat = flatten_of(layers);
  let slopes = signs,
    bias = 0;
  for (let place = layers.length - 1; place > flat; place--) {
    const layer = layers[place];
    if (layer.type === "ReLU") {
      slopes = slopes.map((slope, at) => (steps[place].values[at] > 0 ? slope : 0));
    } else {
      bias += slopes.reduce((sum, slope, at) => sum + slope * layer.bias.values[at], 0);
      slopes = times_transposed(layer.weight, slopes);
    }
  }
  const values = steps[flat].values.map((value, at) => value * slopes[at]);
  return {shape: steps[flat - 1].shape, values, bias};
}

// The index of the layer after which a CNN has no maps.
function flatten_of(layers) {
  return layers.findIndex(({type}) => type === "Flatten");
}

// (out) times weights (out, in): (in).
function times_transposed({shape: [n_out, n_in], values}, slopes) {
  const sums = new Float64Array(n_in);
  for (let out = 0; out < n_out; out++) {
    if (slopes[out] === 0) continue;
    for (let place = 0; place < n_in; place++) sums[place] += slopes[out] * values[out * n_in + place];
  }
  return sums;
}

// What each position adds, summed over all maps (C, H, W): H·W values.
function by_place({shape: [maps, height, width], values}) {
  const size = height * width;
  return Array.from({length: size}, (_, place) => {
    let sum = 0;
    for (let map = 0; map < maps; map++) sum += values[map * size + place];
    return sum;
  });
}

// What each map adds, summed over all positions.
function by_map({shape: [maps, height, width], values}) {
  const size = height * width;
  return Array.from({length: maps}, (_, map) =>
    values.subarray(map * size, (map + 1) * size).reduce((sum, value) => sum + value, 0),
  );
}

// 1 for a class, −1 for its rival, if there is one.
function signs_of(number, rival) {
  const signs = new Float64Array(10);
  signs[number] += 1;
  if (rival >= 0) signs[rival] -= 1;
  return signs;
}

// The class with the largest logit, except `but`; −1 if there is a NaN.
function best(values, but = -1) {
  const found = [...values].map((value, place) => (place === but ? -Infinity : value));
  return found.indexOf(Math.max(...found));
}

// The receptive field of a layer's cell: the square of the image from which the cell is computed.
function receptive_field(layers, place, [y, x]) {
  let top = y,
    left = x,
    size = 1;
  for (const {type, size: window, padding, weight} of layers.slice(0, place + 1).reverse()) {
    if (type === "MaxPool2d") [top, left, size] = [top * window, left * window, size * window];
    if (type === "Conv2d") [top, left, size] = [top - padding, left - padding, size + weight.shape[2] - 1];
  }
  return {top, left, size};
}

function tenths(value) {
  return Number.isFinite(value) ? value.toFixed(1).replace("-0.0", "0.0").replace("-", "−") : "–";
}

// The positions as a grid of numbers, tinted on a scale up to `largest`. `look` gets the one under the pointer.
function draw_places(target, values, width, largest, look) {
  const cells = values.map((value, place) => {
    const title = `${where(place, width)}: ${shown(value)}`;
    const cell = element(look ? "button" : "span", {class: "cell", title}, tenths(value));
    if (look) {
      cell.type = "button";
      cell.setAttribute("aria-label", title);
      for (const event of ["mouseenter", "focus", "click"]) cell.addEventListener(event, () => look(place));
    }
    cell.style.background = tint(value, largest);
    return cell;
  });
  target.style.gridTemplateColumns = `repeat(${width}, max-content)`;
  target.replaceChildren(...cells);
}
