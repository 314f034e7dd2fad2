"use strict";

// Part 1, a step of learning: the gradient of one image's loss, and what Adam makes of it.

// Binary cross-entropy, with torch's upper bound.
function cross_entropy(output, label) {
  return Math.min(100, -Math.log(label ? output : 1 - output));
}

// The loss of one image, and its gradients by the chain rule: those of the twelve parameters in torch's order, and
// those that reach each layer in the backward pass.
function toy_gradients(layers, image, label) {
  const steps = forward(layers, image),
    [conv, pool, zero, dense] = ["Conv2d", "MaxPool2d", "ReLU", "Linear"].map((kind) =>
      layers.findIndex(({type}) => type === kind),
    );
  const output = steps.at(-1).values[0],
    loss = cross_entropy(output, label);
  const slope = output * (1 - output), // of the sigmoid
    to_linear = ((output - label) / Math.max(slope, 1e-12)) * slope, // torch's guard against division by zero
    to_relu = to_linear * layers[dense].weight.values[0],
    to_pool = steps[pool].values[0] > 0 ? to_relu : 0,
    winner = best(steps[conv].values);
  const top = Math.floor(winner / 2),
    left = winner % 2,
    patch = Array.from({length: 9}, (_, at) => (top + Math.floor(at / 3)) * 4 + left + (at % 3));
  const gradients = [
    ...patch.map((pixel) => to_pool * image.values[pixel]),
    to_pool,
    to_linear * steps[zero].values[0],
    to_linear,
  ];
  return {loss, gradients, to_linear, to_pool, winner, patch, input: steps[zero].values[0]};
}

// Adam (Kingma and Ba, arXiv 1412.6980), with torch's defaults. Returns each parameter's step and the state after it.
function adam({count, means, squares}, gradients, rate) {
  const next = {
    count: count + 1,
    means: means.map((mean, at) => 0.9 * mean + 0.1 * gradients[at]),
    squares: squares.map((square, at) => 0.999 * square + 0.001 * gradients[at] ** 2),
  };
  const steps = next.means.map((mean, at) => {
    const size = Math.sqrt(next.squares[at] / (1 - 0.999 ** next.count)) + 1e-8;
    return (-rate * (mean / (1 - 0.9 ** next.count))) / size;
  });
  return {steps, next};
}

function no_steps() {
  return {count: 0, means: Array(12).fill(0), squares: Array(12).fill(0)};
}

const PARAMETERS = [
  ...Array.from({length: 9}, (_, at) => `kernel ${Math.floor(at / 3) + 1}, ${(at % 3) + 1}`),
  "kernel's bias",
  "weight",
  "bias",
];

// `now` returns the current layers and both images; `stepped` is called after they have changed.
function start_step(toy, now, stepped) {
  let state,
    looked_at = 0;

  // Where each of the twelve parameters is stored.
  function kept() {
    const found = now()
      .layers.filter(({weight}) => weight)
      .flatMap(({weight, bias}) => [weight, bias]);
    return found.flatMap(({values}) => [...values.keys()].map((at) => ({values, at})));
  }

  function next() {
    const {layers, images} = now(),
      turn = state.count % 2; // one image per step, in order, as in the training
    const found = toy_gradients(layers, images[turn], toy.labels[turn]);
    return {...found, turn, ...adam(state, found.gradients, toy.learning_rate)};
  }

  function step(count) {
    const before = mean_loss(),
      {turn, loss} = next();
    for (let made = 0; made < count; made++) {
      const found = next();
      kept().forEach(({values, at}, number) => (values[at] += found.steps[number]));
      state = found.next;
    }
    stepped();
    const {images, layers} = now(),
      own = toy_gradients(layers, images[turn], toy.labels[turn]).loss;
    by_id("step-note").textContent =
      (count > 1
        ? `The last ${count} steps`
        : `The last step fitted the image with label ${toy.labels[turn]}, whose loss went from ${shown(loss, 6)} to ` +
          `${shown(own, 6)}. It`) +
      ` changed the mean loss of both images from ${shown(before, 6)} to ${shown(mean_loss(), 6)}. ` +
      `Steps so far: ${state.count}.`;
  }

  function mean_loss() {
    const {layers, images} = now();
    return images.reduce((sum, image, at) => sum + toy_gradients(layers, image, toy.labels[at]).loss, 0) / 2;
  }

  function update() {
    const found = next(),
      largest = largest_of(found.gradients);
    by_id("step-turn").textContent =
      `The next step takes the image with label ${toy.labels[found.turn]}. Its loss is ${shown(found.loss, 6)}.`;
    const rows = kept().map(({values, at}, number) => {
      const look = () => look_at_gradient(number);
      const name = element(
        "button",
        {
          type: "button",
          class: "name",
          "aria-pressed": String(number === looked_at),
          onclick: look,
          onmouseenter: look,
          onfocus: look,
        },
        PARAMETERS[number],
      );
      const change = found.steps[number],
        gradient = element("td", {}, shown(found.gradients[number]));
      gradient.style.background = tint(found.gradients[number], largest);
      return element(
        "tr",
        {},
        element("td", {}, name),
        element("td", {}, shown(values[at])),
        gradient,
        element("td", {}, `${change > 0 ? "↑" : change < 0 ? "↓" : ""} ${shown(Math.abs(change), 5)}`),
        element("td", {}, shown(values[at] + change)),
      );
    });
    const heads = ["", "value", "gradient", "step", "new value"].map((text) => element("th", {}, text));
    by_id("step-table").replaceChildren(
      scrolled(element("table", {}, element("tr", {}, ...heads), ...rows), "The step"),
    );
    explain(found);
  }

  // Keeps the table: an element under the pointer or with the focus must not be replaced.
  function look_at_gradient(number) {
    if (number === looked_at) return;
    looked_at = number;
    by_id("step-table")
      .querySelectorAll(".name")
      .forEach((name, at) => name.setAttribute("aria-pressed", at === number));
    explain(next());
  }

  // How the chosen gradient is computed.
  function explain({to_linear, to_pool, winner, patch, input, gradients, turn}) {
    const {images, layers} = now(),
      weight = layers.findLast(({type}) => type === "Linear").weight.values[0],
      cell = where(winner, 2),
      value = gradients[looked_at];
    by_id("step-title").textContent =
      `Gradient of ${PARAMETERS[looked_at]}, image with label ${toy.labels[turn]}`;
    const lines = [
      to_linear === 0
        ? "The sigmoid is saturated: its slope is 0, so no gradient passes through it."
        : `The gradient at the linear layer's output is P(label 1) minus the label: ${shown(to_linear)}.`,
    ];
    if (looked_at < 10 && input > 0) {
      lines.push(
        `Multiplied by the weight, ${shown(weight)}, it is ${shown(to_pool)}. The ReLU is on and passes this back to ` +
          `the largest cell of the convolution, ${cell}. The other three cells get 0, because pooling passed on only ` +
          "the largest.",
      );
    } else if (looked_at < 10) {
      lines.push(
        "The ReLU is off for this image, so the kernel's gradient is 0. The kernel moves only if Adam " +
          "remembers earlier gradients.",
      );
    }
    if (looked_at < 9) {
      const pixel = patch[looked_at];
      lines.push(
        `In the largest cell of the convolution, this weight is multiplied by the pixel in ${where(pixel, 4)}: ` +
          `${shown(to_pool)} × ${shown(images[turn].values[pixel])} = ${shown(value)}.`,
      );
    } else if (looked_at === 9) {
      lines.push(`The bias is added to the largest cell, so its gradient is that cell's: ${shown(value)}.`);
    } else if (looked_at === 10) {
      lines.push(
        `This weight is multiplied by the ReLU's output: ${shown(to_linear)} × ${shown(input)} = ${shown(value)}.`,
      );
    } else {
      lines.push(`This bias is added to the output, so its gradient is the output's: ${shown(value)}.`);
    }
    by_id("step-working").replaceChildren(...lines.map((line) => element("p", {}, line)));
  }

  by_id("step-rate").textContent = String(toy.learning_rate);
  by_id("step-one").addEventListener("click", () => step(1));
  by_id("step-ten").addEventListener("click", () => step(10));

  return {
    update,
    // Resets Adam's state, as at the start of a training.
    restart() {
      state = no_steps();
      by_id("step-note").textContent = "";
    },
    steps: () => state.count,
    // After an edit, the note about the last step no longer holds.
    edited() {
      by_id("step-note").textContent = "";
    },
  };
}
