"use strict";

// The layers by explicit loops, for one image: the same as fashion_cnn/lesson/by_hand/layers.py, with the same names
// in the same order. A tensor is {shape, values}: its values in one row, the last index varying fastest.

// Zeros around each map: (C, H, W) to (C, H + 2·width, W + 2·width).
function pad(image, width) {
  const [channels, height, wide] = image.shape,
    out_height = height + 2 * width,
    out_wide = wide + 2 * width;
  const padded = new Float64Array(channels * out_height * out_wide);
  for (let channel = 0; channel < channels; channel++) {
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < wide; x++) {
        padded[(channel * out_height + y + width) * out_wide + x + width] =
          image.values[(channel * height + y) * wide + x];
      }
    }
  }
  return {shape: [channels, out_height, out_wide], values: padded};
}

// Valid cross-correlation, stride 1: (in, H, W) to (out, H - kh + 1, W - kw + 1). Without `bias`, it is 0.
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
        let sum = bias ? bias.values[out] : 0;
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

// Normalises each map by the mean and variance from the training, then scales and shifts it.
function batch_norm(image, scale, shift, mean, variance, epsilon) {
  const size = image.shape[1] * image.shape[2];
  const values = image.values.map((value, place) => {
    const channel = Math.floor(place / size);
    const normal = (value - mean.values[channel]) / Math.sqrt(variance.values[channel] + epsilon);
    return normal * scale.values[channel] + shift.values[channel];
  });
  return {shape: image.shape, values};
}

// A residual block before its ReLU: its inputs plus its layers' outputs for them.
function add(inputs, others) {
  return {shape: inputs.shape, values: inputs.values.map((value, place) => value + others.values[place])};
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
  const steps = [];
  for (const layer of layers) steps.push(through(layer, steps.at(-1) ?? image, steps));
  return steps;
}

// A CNN's logits for an image, from 1, 2 or 6 views: the image, its mirror image, and both shifted, where
// shifted views have half the weight.
function logits(layers, image, views) {
  const read = (view) => forward(layers, view).at(-1);
  if (views === 1) return read(image);
  const both = (view) => mean(read(view), read(mirrored(view)));
  if (views === 2) return both(image);
  return mean(both(image), mean(both(shifted(image, 1)), both(shifted(image, -1))));
}

// Every layer's outputs for the image itself, and the logits from all views.
function look_at(layers, image, views) {
  const steps = forward(layers, image);
  return {steps, logits: views === 1 ? steps.at(-1) : logits(layers, image, views)};
}

function mean(one, other) {
  const {shape, values} = add(one, other);
  return {shape, values: values.map((value) => value / 2)};
}

// Shifted by `by` pixels to the right and down; uncovered pixels are black.
function shifted(image, by) {
  const [, height, width] = image.shape;
  const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : image.values[y * width + x]);
  const values = image.values.map((_, place) => at((place % width) - by, Math.floor(place / width) - by));
  return {shape: image.shape, values};
}

function mirrored(image) {
  const width = image.shape[2];
  const from = (place) => place - (place % width) + width - 1 - (place % width);
  return {shape: image.shape, values: image.values.map((_, place) => image.values[from(place)])};
}

function through(layer, inputs, steps) {
  switch (layer.type) {
    case "Conv2d":
      return conv2d(pad(inputs, layer.padding), layer.weight, layer.bias);
    case "BatchNorm2d":
      return batch_norm(
        inputs,
        layer.weight,
        layer.bias,
        layer.running_mean,
        layer.running_var,
        layer.epsilon,
      );
    case "Add":
      return add(inputs, steps[layer.to]);
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

// The arrays of the page, as contents.py packs them: numbers, or base64 of int16 multiples of a step.
function unpack(packed) {
  if (packed.numbers)
    return {shape: packed.shape, values: Float64Array.from(packed.numbers, (value) => value ?? NaN)};
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
    Object.fromEntries(
      Object.entries(layer).map(([name, value]) => [name, value.shape ? unpack(value) : value]),
    ),
  );
}

// The CNN's input for an image of 28×28 pixels from 0 to 255: (1, 28, 28) from 0 to 1.
function to_input(pixels) {
  return {shape: [1, 28, 28], values: Float64Array.from(pixels, (pixel) => pixel / 255)};
}
