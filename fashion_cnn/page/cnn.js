"use strict";

// The title of the bars, by a CNN's number of views.
const PROBABILITIES = {
  1: "Probabilities",
  2: "Probabilities, from the mean logits of the image and its mirror image",
  6: "Probabilities, from the mean logits of six views: this one, two shifted by a pixel, and their mirror images",
};

// Part 2: one val image through the CNN. `see` tells part 3 which image was chosen.

function start_cnn(contents, networks, see) {
  const names = Object.keys(networks);
  let name = names[0],
    chosen = 0,
    steps;

  const images = contents.images.map(({pixels}) => unpack_bytes(pixels));
  const pickers = contents.images.map(({label}, number) => {
    const canvas = element("canvas", {});
    draw_image(canvas, images[number]);
    const button = element(
      "button",
      {
        type: "button",
        "aria-label": `${label}, image ${number + 1}`,
        title: label,
        onclick: () => choose(number),
      },
      canvas,
    );
    by_id("picker").append(button);
    return button;
  });
  draw_choice(
    by_id("cnn-model"),
    "cnn-model",
    names.map((one) => `${one} images`),
    (number) => {
      name = names[number];
      update();
      draw_results(contents, name);
    },
  );

  const convs = [];
  networks[name].forEach(({type}, place) => {
    if (type !== "Conv2d") return;
    const before = convs.at(-1); // which draws the maps that this one reads
    convs.push(start_conv(networks[name], place, convs.length + 1, (map) => before?.mark(map)));
  });
  const end = start_end(contents);

  function choose(number) {
    chosen = number;
    pickers.forEach((button, place) => button.setAttribute("aria-pressed", place === number));
    see(images[number], contents.images[number].label);
    update();
  }

  function update() {
    const layers = networks[name],
      {label, index} = contents.images[chosen];
    const input = to_input(images[chosen]);
    const {views} = contents.cnns[name],
      seen = look_at(layers, input, views),
      shares = softmax(seen.logits).values;
    steps = seen.steps;
    by_id("cnn-bars-title").textContent = PROBABILITIES[views];
    const read = draw_bars(by_id("cnn-bars"), contents.classes, shares, name);
    by_id("cnn-parameters").textContent = contents.cnns[name].parameters.toLocaleString("en");
    draw_image(by_id("cnn-image"), images[chosen], 8);
    by_id("cnn-label").textContent =
      `${label}. The CNN ${said(read, label)}. It is number ${index} of the 60,000 images and was held out for validation.`;
    convs.forEach((conv) => conv.update({layers, steps, input, pixels: images[chosen]}));
    end.update(layers, steps, views, images[chosen]);
  }

  choose(0);
  draw_results(contents, name);
  return update;
}
