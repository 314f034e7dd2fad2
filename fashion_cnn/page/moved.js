"use strict";

// Part 3: the chosen image, shifted and rotated, as both CNNs read it.

function start_moved(contents, networks) {
  const names = Object.keys(networks);
  const last = (values) => values[values.length - 1];
  const {shifts, rotations} = contents.cnns[names[0]];
  const sliders = {
    x: {
      title: "Shift right",
      unit: "px",
      amounts: shifts.pixels,
      column: "shift_x",
      table: "shifts",
      axis: "pixels to the right",
    },
    y: {
      title: "Shift down",
      unit: "px",
      amounts: shifts.pixels,
      column: "shift_y",
      table: "shifts",
      axis: "pixels down",
    },
    angle: {
      title: "Rotate counterclockwise",
      unit: "°",
      amounts: rotations.degrees,
      column: "rotation",
      table: "rotations",
      axis: "degrees counterclockwise",
    },
  };
  let pixels,
    label,
    before = {}; // all of the chosen image; `before` has each CNN's outputs before it is moved
  const keep = {};

  for (const [key, {title, unit, amounts}] of Object.entries(sliders)) {
    const input = element("input", {
      type: "range",
      id: `moved-${key}`,
      min: amounts[0],
      max: last(amounts),
      step: 1,
      value: 0,
      oninput: () => update(),
    });
    const told = element("span", {class: "value"});
    keep[key] = {input, told, unit, place: element("div", {})};
    by_id("moved-sliders").append(
      element("label", {class: "slider"}, element("span", {}, `${title}: `, told), input),
    );
    by_id("moved-curves").append(
      element(
        "figure",
        {},
        element("figcaption", {}, `Test accuracy: ${title.toLowerCase()}`),
        keep[key].place,
      ),
    );
  }
  by_id("moved-sliders").append(
    element(
      "button",
      {
        type: "button",
        onclick: () => {
          for (const {input} of Object.values(keep)) input.value = 0;
          update();
        },
      },
      "Reset",
    ),
  );

  function amount(key) {
    return Number(keep[key].input.value);
  }

  function update() {
    const moved = shift(rotate(pixels, amount("angle")), amount("x"), amount("y"));
    draw_image(by_id("moved-image"), moved);
    const read = names.map((name) => {
      const {steps, logits} = look_at(networks[name], to_input(moved), contents.cnns[name].views);
      const is_moved = Object.keys(sliders).some(amount);
      before[name] ??= is_moved ? forward(networks[name], to_input(pixels)) : steps;
      explain(name, steps);
      return draw_bars(by_id(`moved-${name}`), contents.classes, softmax(logits).values, name);
    });
    by_id("moved-label").textContent =
      `${label}. ` +
      names
        .map((name, number) => `The CNN trained on ${name} images ${said(read[number], label)}.`)
        .join(" ");
    for (const [key, {column, table, amounts, axis, unit}] of Object.entries(sliders)) {
      keep[key].told.textContent = `${shown(amount(key), 0)} ${unit}`;
      draw_curves(
        keep[key].place,
        names.map((name) => ({name, color: name, x: amounts, y: contents.cnns[name][table][column]})),
        {
          label: `Test accuracy of both CNNs by ${axis}`,
          x_label: axis,
          lowest: 0,
          highest: 1,
          marker: amount(key),
          ticks: [amounts[0], 0, last(amounts)],
          format: (value) => `${Math.round(100 * value)} %`,
          exact: percent,
        },
      );
    }
    const unmoved = names.map((name) => contents.cnns[name].shifts.shift_x[shifts.pixels.indexOf(0)]);
    by_id("moved-note").textContent =
      `The curves are from the stage evaluate_cnn: n = ${shifts.n[0].toLocaleString("en")} test images at each point, ` +
      "moved in one way at a time. Of the unmoved images, the CNN trained on original images classifies " +
      `${percent(unmoved[0])} correctly, the other ${percent(unmoved[1])}.`;
  }

  // Which positions favour the label and which its strongest rival, before and after the move.
  function explain(name, steps) {
    const layers = networks[name],
      own = contents.classes.indexOf(label),
      rival = best(steps.at(-1).values, own),
      signs = signs_of(own, rival);
    if (rival < 0) return; // its training diverged
    const parts = [before[name], steps].map((one) => attribute(layers, one, signs));
    const [, , width] = parts[0].shape,
      grids = parts.map(by_place),
      largest = largest_of(grids.flat());
    const what = `${label} − ${contents.classes[rival]}`,
      legend = element("div", {class: "scale"});
    draw_cell_scale(legend, largest);
    by_id(`moved-${name}-places`).replaceChildren(
      element("p", {class: "note"}, `What each position of the last maps adds to ${what}:`),
      element(
        "div",
        {class: "pair"},
        ...["unmoved", "moved"].map((caption, number) => {
          const cells = element("div", {class: "cells small"});
          draw_places(cells, grids[number], width, largest);
          return element("figure", {}, element("figcaption", {}, caption), cells);
        }),
      ),
      legend,
      element("p", {class: "note"}, told(what, grids, parts, width)),
    );
  }

  function told(what, grids, parts, width) {
    // Round first, so that the difference is that of the numbers shown.
    const [first, second] = grids
      .map((grid, number) => grid.reduce((sum, value) => sum + value, 0) + parts[number].bias)
      .map((total) => Math.round(10 * total) / 10);
    if (!Number.isFinite(first + second)) return "";
    const total = `${what}: ${tenths(first)} unmoved, ${tenths(second)} moved.`;
    const changes = grids[0].map((value, place) => grids[1][place] - value);
    if (first === second || changes.length === 1) return total;
    const toward = Math.sign(second - first); // `most` is the position that moves furthest that way
    const most = changes.reduce(
      (top, value, place) => (toward * value > toward * changes[top] ? place : top),
      0,
    );
    return (
      `${total} This is a change of ${tenths(second - first)}. The largest part, ${tenths(changes[most])}, is at ` +
      `${where(most, width)}, where the same weights now get another part of the image.`
    );
  }

  return {
    update,
    see(chosen, name) {
      pixels = chosen;
      label = name;
      before = {};
      update();
    },
  };
}
