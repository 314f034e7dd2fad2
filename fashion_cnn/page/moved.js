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
  let pixels, label; // of the chosen image
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
      "Back to the middle",
    ),
  );

  function amount(key) {
    return Number(keep[key].input.value);
  }

  function update() {
    const moved = shift(rotate(pixels, amount("angle")), amount("x"), amount("y"));
    draw_image(by_id("moved-image"), moved);
    const read = names.map((name) =>
      draw_bars(
        by_id(`moved-${name}`),
        contents.classes,
        softmax(logits(networks[name], to_input(moved), contents.cnns[name].views)).values,
        name,
      ),
    );
    by_id("moved-label").textContent =
      `${label}. ` +
      names
        .map((name, number) => `The CNN trained on ${name} images ${said(read[number], label)}.`)
        .join(" ");
    for (const [key, {column, table, amounts, axis, unit}] of Object.entries(sliders)) {
      keep[key].told.textContent = `${shown(amount(key), 0)} ${unit}`;
      draw_curves(
        keep[key].place,
        names.map((name) => ({color: name, x: amounts, y: contents.cnns[name][table][column]})),
        {
          label: `Test accuracy of both CNNs by ${axis}`,
          x_label: axis,
          lowest: 0,
          highest: 1,
          marker: amount(key),
          ticks: [amounts[0], 0, last(amounts)],
          format: (value) => `${Math.round(100 * value)} %`,
        },
      );
    }
    by_id("moved-note").textContent =
      `Curves: evaluate_cnn, n = ${shifts.n[0].toLocaleString("en")} test images at each point, one kind of movement at a time.`;
  }

  return {
    update,
    see(chosen, name) {
      pixels = chosen;
      label = name;
      update();
    },
  };
}
