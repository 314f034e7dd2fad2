"use strict";

// Part 1: two images, 12 parameters, and every product. Pixels and parameters can be edited.

function start_toy(toy) {
  const trained = toy.layers.map((layer) => layer.type);
  const conv = trained.indexOf("Conv2d"),
    pool = trained.indexOf("MaxPool2d"),
    zero = trained.indexOf("ReLU");
  const dense = trained.indexOf("Linear"),
    end = trained.indexOf("Sigmoid");
  const moments = toy.moments.length - 1;
  let image = 0,
    looked_at = [conv, 0],
    images,
    layers,
    moment_of = layers_of(moments);

  const edited = []; // every editable cell, and where its number is stored
  const cells = new Map(); // the cells of results

  function restore(moment) {
    images = toy.images.map(unpack);
    by_id("toy-moment").value = moment;
    go_to(moment);
  }

  function go_to(moment) {
    layers = layers_of(moment);
    moment_of = layers_of(moment);
    learning.restart();
    update();
  }

  // An early moment, with something left to learn: the loss has halved.
  function half_way() {
    const {epoch, train_loss} = toy.curve;
    const half = epoch[train_loss.findIndex((loss) => loss <= train_loss[0] / 2)] ?? toy.curve.epochs;
    return toy.moments.findIndex(([at]) => at >= half);
  }

  // The parameters at a moment of the training; at the last one, they are the trained weights.
  function layers_of(moment) {
    const found = unpack_layers(toy.layers);
    if (moment < moments) {
      const [, ...parameters] = toy.moments[moment];
      const kept = [found[conv].weight, found[conv].bias, found[dense].weight, found[dense].bias];
      for (const {values} of kept) values.set(parameters.splice(0, values.length));
    }
    return found;
  }

  function editable(label, find, place) {
    const input = element("input", {
      class: "cell",
      inputmode: "decimal",
      "aria-label": label,
      oninput: () => {
        const value = input.value.trim() === "" ? NaN : Number(input.value.replace("−", "-"));
        input.setAttribute("aria-invalid", !Number.isFinite(value));
        if (!Number.isFinite(value)) return;
        find().values[place] = value;
        learning.edited();
        update(input);
      },
      onblur: () => update(),
    });
    edited.push({input, find, place});
    return input;
  }

  function result(label, layer, place) {
    const look = () => {
      looked_at = [layer, place];
      update(document.activeElement);
    };
    const cell = element("button", {
      class: "cell",
      type: "button",
      "aria-label": label,
      onmouseenter: look,
      onfocus: look,
      onclick: look,
    });
    cells.set(`${layer},${place}`, cell);
    return cell;
  }

  function grid(columns, made) {
    const place = element("div", {class: "cells"}, ...made);
    place.style.gridTemplateColumns = `repeat(${columns}, max-content)`;
    return place;
  }

  function figure(caption, ...children) {
    return element("figure", {}, element("figcaption", {}, caption), ...children);
  }

  function build() {
    const pixels = Array.from({length: 16}, (_, place) =>
      editable(`Pixel, ${where(place, 4)}`, () => images[image], place),
    );
    const kernel = Array.from({length: 9}, (_, place) =>
      editable(`Kernel, ${where(place, 3)}`, () => layers[conv].weight, place),
    );
    const bias = editable("Bias of the kernel", () => layers[conv].bias, 0);
    const weight = editable("Weight of the linear layer", () => layers[dense].weight, 0);
    const last = editable("Bias of the linear layer", () => layers[dense].bias, 0);
    const sums = Array.from({length: 4}, (_, place) =>
      result(`Convolution, ${where(place, 2)}`, conv, place),
    );
    by_id("toy-flow").append(
      figure("Image, 4×4", grid(4, pixels)),
      figure("Kernel, 3×3", grid(3, kernel), element("div", {class: "extra"}, "bias", bias)),
      figure("Convolution", grid(2, sums)),
      figure("Max pooling", result("Largest of the four", pool, 0)),
      figure("ReLU", result("After ReLU", zero, 0)),
      figure(
        "Linear",
        grid(1, [result("After the linear layer", dense, 0)]),
        element("div", {class: "extra"}, "weight", weight),
        element("div", {class: "extra"}, "bias", last),
      ),
      figure("Sigmoid", result("Probability of label 1", end, 0)),
    );
    draw_choice(
      by_id("toy-image"),
      "toy-image",
      toy.labels.map((label) => `label ${label}`),
      (number) => {
        image = number;
        update();
      },
    );
    by_id("toy-moment").max = moments;
    by_id("toy-moment").addEventListener("input", (event) => go_to(Number(event.target.value)));
    by_id("toy-restore").addEventListener("click", () => restore(Number(by_id("toy-moment").value)));
  }

  // `typing` is the cell that is being edited: its text is not replaced.
  function update(typing) {
    const through = images.map((one) => forward(layers, one)),
      steps = through[image];
    const all = [
      ...images.flatMap((one) => [...one.values]),
      ...layers[conv].weight.values,
      ...steps[conv].values,
      ...steps[dense].values,
    ];
    const largest = largest_of(all);
    const untouched = new Map([
      ...images.map((one, number) => [one, toy.images[number].numbers]),
      ...[conv, dense].flatMap((layer) =>
        ["weight", "bias"].map((name) => [layers[layer][name], moment_of[layer][name].values]),
      ),
    ]);
    let changes = 0;
    for (const {input, find, place} of edited) {
      const kept = find(),
        value = kept.values[place];
      if (input !== typing) {
        input.value = String(Number(value.toFixed(3))).replace("-", "−");
        input.removeAttribute("aria-invalid");
      }
      input.style.background = tint(value, largest);
      const changed = untouched.get(kept)[place] !== value;
      input.classList.toggle("changed", changed);
      changes += changed;
    }
    for (const [key, cell] of cells) {
      const [layer, place] = key.split(",").map(Number),
        value = steps[layer].values[place];
      cell.textContent = shown(value, 3);
      cell.style.background = layer === end ? tint(value, 1) : tint(value, largest);
    }
    light(steps);
    const [layer, place] = looked_at;
    draw_cell_scale(by_id("toy-legend"), largest);
    by_id("toy-working-title").textContent = cells.get(`${layer},${place}`).getAttribute("aria-label");
    explain(layer, place, steps);
    tell(through, changes);
    learning.update();
  }

  // Highlights the chosen cell and those from which it is computed.
  function light(steps) {
    const [layer, place] = looked_at,
      lit = new Set([cells.get(`${layer},${place}`)]);
    if (layer === conv) {
      const top = Math.floor(place / 2),
        left = place % 2;
      for (let cell = 0; cell < 9; cell++) {
        lit.add(edited[(top + Math.floor(cell / 3)) * 4 + left + (cell % 3)].input);
        lit.add(edited[16 + cell].input);
      }
    }
    if (layer === pool) for (let cell = 0; cell < 4; cell++) lit.add(cells.get(`${conv},${cell}`));
    const winner = best(steps[conv].values);
    for (let cell = 0; cell < 4; cell++)
      cells.get(`${conv},${cell}`).classList.toggle("winner", cell === winner);
    if (layer === zero) lit.add(cells.get(`${pool},0`));
    if (layer === dense)
      lit
        .add(cells.get(`${zero},0`))
        .add(edited[26].input)
        .add(edited[27].input);
    if (layer === end) lit.add(cells.get(`${dense},0`));
    for (const cell of [...cells.values(), ...edited.map((one) => one.input)])
      cell.classList.toggle("lit", lit.has(cell));
  }

  function explain(layer, place, steps) {
    const target = by_id("toy-working"),
      out = steps[layer].values[place];
    const say = (text) => target.replaceChildren(element("p", {}, text));
    if (layer === conv) {
      const top = Math.floor(place / 2),
        left = place % 2;
      const rows = Array.from({length: 9}, (_, cell) => {
        const pixel = images[image].values[(top + Math.floor(cell / 3)) * 4 + left + (cell % 3)];
        const weight = layers[conv].weight.values[cell];
        return [`${Math.floor(cell / 3) + 1}, ${(cell % 3) + 1}`, pixel, weight, pixel * weight];
      });
      draw_products(target, rows, layers[conv].bias.values[0], out, ["cell", "pixel", "kernel", "product"]);
    } else if (layer === pool) {
      say(
        `The largest of ${[...steps[conv].values].map((value) => shown(value)).join(", ")} is ${shown(out)}, in ` +
          `${where(best(steps[conv].values), 2)}.`,
      );
    } else if (layer === zero) {
      const value = steps[pool].values[0];
      say(
        value > 0
          ? `${shown(value)} is positive and stays.`
          : `${shown(value)} is not positive and becomes 0.`,
      );
    } else if (layer === dense) {
      const value = steps[zero].values[0],
        weight = layers[dense].weight.values[0];
      draw_products(target, [["", value, weight, value * weight]], layers[dense].bias.values[0], out);
    } else {
      const value = steps[dense].values[0];
      say(
        `1 / (1 + e^(−x)) for x = ${shown(value)} is ${shown(out, 6)}: the probability that the label is 1.`,
      );
    }
  }

  function tell(through, changes) {
    const moment = Number(by_id("toy-moment").value),
      epoch = toy.moments[moment][0],
      total = toy.curve.epochs,
      made = learning.steps();
    by_id("toy-epoch").textContent =
      `after epoch ${epoch} of ${total}${made ? ` and ${made} step${made > 1 ? "s" : ""}` : changes ? ", edited" : ""}`;
    by_id("toy-moment").setAttribute("aria-valuetext", `after epoch ${epoch}`);
    const outputs = through.map((steps) => steps[end].values[0]);
    const losses = outputs.map((output, number) => cross_entropy(output, toy.labels[number]));
    const loss = losses.reduce((sum, one) => sum + one, 0) / losses.length;
    const dead = through.every((steps) => steps[zero].values.every((value) => value === 0));
    const thinned = toy.curve.step > 1 ? ` The curve shows one epoch in ${toy.curve.step}.` : "";
    by_id("toy-note").textContent =
      `Now: loss ${shown(loss)}; P(label 1) is ${outputs.map((output, number) => `${shown(output)} for the image with label ${toy.labels[number]}`).join(" and ")}.` +
      (dead ? " The ReLU gives 0 for both images, so no gradient reaches the kernel: a dead ReLU." : "") +
      thinned;
    const highest = Math.max(...toy.curve.train_loss.filter((value) => value !== null), 0.01);
    const curve = {name: "loss", color: "original", x: toy.curve.epoch, y: toy.curve.train_loss},
      dot = {color: "original", x: [epoch], y: [Math.min(loss, highest)]};
    draw_curves(by_id("toy-loss"), Number.isFinite(loss) ? [curve, dot] : [curve], {
      label: "Loss of the toy CNN by epoch",
      x_label: "epoch",
      lowest: 0,
      highest,
      marker: epoch,
      ticks: [toy.curve.epoch[0], Math.round(total / 2), total],
      format: shown,
      exact: shown,
    });
  }

  build();
  const learning = start_step(
    toy,
    () => ({layers, images}),
    () => update(),
  );
  restore(half_way());
  return update;
}
