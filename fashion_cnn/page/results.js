"use strict";

// Part 2, below the layers: how a CNN learned, and which classes it confuses.

function draw_results(contents, name) {
  const curves = Object.keys(contents.cnns).flatMap((one) => {
    const {epoch, val_accuracy, train_accuracy} = contents.cnns[one].curve;
    return [
      {name: `${one}, val`, color: one, x: epoch, y: val_accuracy},
      {name: `${one}, train`, color: one, x: epoch, y: train_accuracy, dashed: true},
    ];
  });
  const seen = curves.flatMap((curve) => curve.y).filter((value) => value !== null);
  const {epochs, step} = contents.cnns[name].curve;
  draw_curves(by_id("cnn-curves"), curves, {
    label: "Accuracy of both CNNs by epoch, on train and val images",
    x_label: "epoch",
    lowest: Math.min(0.95, ...seen),
    highest: 1,
    format: (value) => `${Math.round(100 * value)} %`,
    exact: percent,
    ticks: epochs > 10 ? [1, epochs] : Array.from({length: epochs}, (_, place) => place + 1),
  });
  by_id("cnn-curves").append(
    element(
      "p",
      {class: "note"},
      element("i", {class: "key original"}),
      "original ",
      element("i", {class: "key augmented"}),
      `augmented; lines: val, dashes: train.${step > 1 ? ` One epoch in ${step} is drawn.` : ""}`,
    ),
  );
  draw_confusion(contents, name);
}

// Pressing a cell shows its most confident mistakes; a second press deselects it.
function draw_confusion(contents, name) {
  const {confusion, mistakes} = contents.cnns[name],
    {classes} = contents;
  const images = confusion.flat().reduce((sum, count) => sum + count, 0);
  by_id("cnn-confusion-title").textContent =
    `CNN trained on ${name} images: test images by class (rows) and prediction (columns), n = ${images.toLocaleString("en")}`;
  const buttons = [];
  const show = (button, actual, predicted) => {
    if (button.getAttribute("aria-pressed") === "true") return draw_confusion(contents, name);
    const found = mistakes.filter(
      (row) => row.label === classes[actual] && row.prediction === classes[predicted],
    );
    buttons.forEach((one) => one.setAttribute("aria-pressed", one === button));
    by_id("cnn-confusion-note").textContent =
      `${classes[actual]} taken for ${classes[predicted]}: ${confusion[actual][predicted]} ` +
      (confusion[actual][predicted] === 1
        ? "image, which is shown."
        : `images, of which the most confident ${found.length > 1 ? `${found.length} are` : "is"} shown.`);
    by_id("cnn-mistakes").replaceChildren(
      ...found.map((row) => {
        const canvas = element("canvas", {
          role: "img",
          "aria-label": `${row.label}, read as ${row.prediction}`,
        });
        draw_image(canvas, unpack_bytes(row.pixels));
        return element("div", {}, canvas, percent(row.confidence));
      }),
    );
  };
  const body = classes.map((label, actual) => {
    const total = confusion[actual].reduce((sum, count) => sum + count, 0);
    return element(
      "tr",
      {},
      element("th", {scope: "row"}, label),
      ...classes.map((other, predicted) => {
        const count = confusion[actual][predicted];
        const has = mistakes.some((row) => row.label === label && row.prediction === other);
        const cell = has
          ? element(
              "button",
              {
                type: "button",
                "aria-label": `${count} of ${label} are read as ${other}`,
                onclick: () => show(cell, actual, predicted),
              },
              String(count),
            )
          : element("span", {}, count ? String(count) : "");
        if (has) buttons.push(cell);
        cell.style.background = `color-mix(in srgb, var(--${name}) ${Math.round((45 * count) / (total || 1))}%, var(--card))`;
        return element("td", {}, cell);
      }),
    );
  });
  const head = element(
    "thead",
    {},
    element("tr", {}, element("td", {}), ...classes.map((label) => element("th", {scope: "col"}, label))),
  );
  by_id("cnn-confusion").replaceChildren(
    scrolled(element("table", {}, head, element("tbody", {}, ...body)), "Confusion matrix"),
  );
  by_id("cnn-mistakes").replaceChildren();
  by_id("cnn-confusion-note").textContent = "Framed cells have images: press one.";
}
