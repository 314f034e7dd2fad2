"use strict";

// The layers by explicit loops, for one image: the same as stages/lib/by_hand/layers.py, with the same names
// in the same order. A tensor is {shape, values}: its values in one row, the last index running fastest.

// Valid cross-correlation, stride 1: (in, H, W) to (out, H - kh + 1, W - kw + 1).
function conv2d(image, kernels, bias) {
  const [n_in, height, width] = image.shape;
  const [n_out, , kernel_height, kernel_width] = kernels.shape;
  const out_height = height - kernel_height + 1,
    out_width = width - kernel_width + 1;
  const sums = new Float64Array(n_out * out_height * out_width);
  let place = 0;
  for (let out = 0; out < n_out; out++) {
    for (let i = 0; i < out_height; i++) {
      for (let j = 0; j < out_width; j++) {
        let sum = bias.values[out];
        let weight = out * n_in * kernel_height * kernel_width;
        for (let channel = 0; channel < n_in; channel++) {
          for (let y = 0; y < kernel_height; y++) {
            const row = (channel * height + i + y) * width + j;
            for (let x = 0; x < kernel_width; x++) sum += image.values[row + x] * kernels.values[weight++];
          }
        }
        sums[place++] = sum;
      }
    }
  }
  return {shape: [n_out, out_height, out_width], values: sums};
}

// Largest value of each size×size window; a border too small for a window is dropped.
function max_pool2d(image, size) {
  const [channels, height, width] = image.shape;
  const out_height = Math.floor(height / size),
    out_width = Math.floor(width / size);
  const pooled = new Float64Array(channels * out_height * out_width);
  let place = 0;
  for (let channel = 0; channel < channels; channel++) {
    for (let i = 0; i < out_height; i++) {
      for (let j = 0; j < out_width; j++) {
        let largest = -Infinity;
        for (let y = 0; y < size; y++) {
          for (let x = 0; x < size; x++) {
            largest = Math.max(
              largest,
              image.values[(channel * height + i * size + y) * width + j * size + x],
            );
          }
        }
        pooled[place++] = largest;
      }
    }
  }
  return {shape: [channels, out_height, out_width], values: pooled};
}

// (in) to (out), with weights (out, in).
function linear(inputs, weights, bias) {
  const [n_out, n_in] = weights.shape;
  const outputs = new Float64Array(n_out);
  for (let out = 0; out < n_out; out++) {
    let sum = bias.values[out];
    for (let place = 0; place < n_in; place++)
      sum += inputs.values[place] * weights.values[out * n_in + place];
    outputs[out] = sum;
  }
  return {shape: [n_out], values: outputs};
}

// Negative values become 0.
function relu(inputs) {
  return {shape: inputs.shape, values: inputs.values.map((value) => Math.max(value, 0))};
}

// Any value becomes one between 0 and 1.
function sigmoid(inputs) {
  return {shape: inputs.shape, values: inputs.values.map((value) => 1 / (1 + Math.exp(-value)))};
}

// Logits become probabilities that sum to 1.
function softmax(logits) {
  const largest = Math.max(...logits.values);
  const powers = logits.values.map((value) => Math.exp(value - largest));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return {shape: logits.shape, values: powers.map((power) => power / total)};
}

// The outputs of every layer for one image (C, H, W), in order.
function forward(layers, image) {
  let values = image;
  return layers.map((layer) => (values = through(layer, values)));
}

function through(layer, inputs) {
  switch (layer.type) {
    case "Conv2d":
      return conv2d(inputs, layer.weight, layer.bias);
    case "MaxPool2d":
      return max_pool2d(inputs, layer.size);
    case "ReLU":
      return relu(inputs);
    case "Flatten":
      return {shape: [inputs.values.length], values: inputs.values};
    case "Linear":
      return linear(inputs, layer.weight, layer.bias);
    case "Sigmoid":
      return sigmoid(inputs);
  }
  throw new Error(`no loops for ${layer.type}`);
}

// The arrays of the page, as contents.py packs them: numbers, or base64 of whole numbers of steps.
function unpack(packed) {
  if (packed.numbers) return {shape: packed.shape, values: Float64Array.from(packed.numbers)};
  const steps = new Int16Array(unpack_bytes(packed.int16).buffer),
    values = new Float64Array(steps.length);
  for (let place = 0; place < values.length; place++) {
    values[place] = steps[place] === -32768 ? NaN : steps[place] * packed.step;
  }
  return {shape: packed.shape, values};
}

function unpack_bytes(base64) {
  const text = atob(base64),
    bytes = new Uint8Array(text.length);
  for (let place = 0; place < bytes.length; place++) bytes[place] = text.charCodeAt(place);
  return bytes;
}

function unpack_layers(layers) {
  return layers.map((layer) =>
    layer.weight ? {...layer, weight: unpack(layer.weight), bias: unpack(layer.bias)} : layer,
  );
}

// An image of 28×28 pixels from 0 to 255, as the CNN takes it: (1, 28, 28) from 0 to 1.
function to_input(pixels) {
  return {shape: [1, 28, 28], values: Float64Array.from(pixels, (pixel) => pixel / 255)};
}
