"use strict";

// What the bars show, by a CNN's number of views.
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

  // One block for each convolution: all its maps before and after what follows it up to the ReLU, and one map
  // enlarged.
  const convs = networks[name]
    .map((layer, place) => [layer, place])
    .filter(([layer]) => layer.type === "Conv2d")
    .map(([, place], number) => build_conv(place, number + 1));

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
    steps = forward(layers, input);
    const {views} = contents.cnns[name],
      shares = softmax(logits(layers, input, views)).values;
    by_id("cnn-bars-title").textContent = PROBABILITIES[views];
    const read = draw_bars(by_id("cnn-bars"), contents.classes, shares, name);
    by_id("cnn-parameters").textContent = contents.cnns[name].parameters.toLocaleString("en");
    by_id("cnn-label").textContent =
      `${label}. The CNN ${said(read, label)}. Number ${index} of the train file.`;
    convs.forEach((conv) => conv.update(input));
  }

  function build_conv(place, number) {
    const {
        weight: {shape},
        padding,
      } = networks[name][place],
      [maps, channels] = shape;
    const to_relu = networks[name].slice(place).findIndex(({type}) => type === "ReLU");
    const between = networks[name].slice(place + 1, place + to_relu).map((layer) => words_for(layer));
    const followed = capital([...between, "then ReLU"].join(", "));
    const before = element("canvas", {class: "atlas", role: "img"}),
      after = element("canvas", {class: "atlas", role: "img"});
    const kernels = element("canvas", {class: "atlas", role: "img"});
    // An application, so that screen readers leave it the arrow keys.
    const one = element("canvas", {tabindex: 0, role: "application"});
    const slider = element("input", {
      type: "range",
      min: 0,
      max: maps - 1,
      value: 0,
      oninput: () => {
        map = Number(slider.value);
        draw();
      },
    });
    const told = element("span", {class: "value"}),
      title = element("h3", {"aria-live": "polite"}),
      working = element("div", {});
    const figure = (caption, canvas) => element("figure", {}, element("figcaption", {}, caption), canvas);
    const of_kernels = element("span", {});
    by_id("cnn-convs").append(
      element(
        "div",
        {class: "conv"},
        element(
          "div",
          {class: "thirds"},
          figure(`Convolution ${number}: ${maps} maps`, before),
          figure(followed, after),
          figure(of_kernels, kernels),
        ),
        element(
          "div",
          {class: "chosen"},
          element(
            "figure",
            {},
            element("label", {class: "slider"}, element("span", {}, "Map ", told), slider),
            one,
            element("p", {class: "note"}, "Point at a cell, or move with the arrow keys."),
          ),
          element("div", {class: "working", id: `conv-${number}-working`}, title, working),
        ),
      ),
    );
    const columns = maps > 64 ? 16 : 8;
    let map = 0,
      cell = null,
      input;

    // Pointing at a tile chooses its map.
    for (const canvas of channels === 1 ? [before, after, kernels] : [before, after]) {
      canvas.addEventListener("click", (event) => {
        const box = canvas.getBoundingClientRect();
        const x = Math.floor(((event.clientX - box.left) / box.width) * columns);
        const y = Math.floor(((event.clientY - box.top) / box.height) * (maps / columns));
        map = Math.min(Math.max(y * columns + x, 0), maps - 1);
        slider.value = map;
        draw();
      });
    }
    const point = (event) => {
      const box = one.getBoundingClientRect(),
        [, height, width] = steps[place].shape;
      const x = Math.floor(((event.clientX - box.left) / box.width) * width);
      const y = Math.floor(((event.clientY - box.top) / box.height) * height);
      look(y, x);
    };
    one.addEventListener("mousemove", point);
    one.addEventListener("click", point);
    one.addEventListener("keydown", (event) => {
      const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
      if (!step) return;
      event.preventDefault();
      look(cell[0] + step[0], cell[1] + step[1]);
    });

    function look(y, x) {
      const [, height, width] = steps[place].shape;
      cell = [Math.min(Math.max(y, 0), height - 1), Math.min(Math.max(x, 0), width - 1)];
      draw_one();
    }

    function draw() {
      const sums = steps[place],
        kept = steps[place + to_relu];
      const color = signed_colors(largest_of(sums.values));
      draw_tiles(before, sums.values, sums.shape, columns, color, 2, map);
      draw_tiles(after, kept.values, kept.shape, columns, signed_colors(largest_of(kept.values)), 4, map);
      before.setAttribute("aria-label", `The ${maps} maps of convolution ${number}`);
      after.setAttribute("aria-label", `The ${maps} maps after convolution ${number}: ${followed}`);
      // All kernels if there is one for each map, else those of the chosen map, one for each map before.
      const {values} = networks[name][place].weight;
      const drawn = channels === 1 ? values : values.subarray(map * channels * 9, (map + 1) * channels * 9);
      const count = drawn.length / 9;
      draw_tiles(
        kernels,
        drawn,
        [count, 3, 3],
        count > 64 ? 16 : 8,
        signed_colors(largest_of(drawn)),
        count > 64 ? 8 : 17,
        channels === 1 ? map : -1,
      );
      of_kernels.textContent =
        channels === 1 ? `The ${count} kernels, 3×3` : `The ${count} kernels of map ${map + 1}, 3×3`;
      kernels.setAttribute("aria-label", of_kernels.textContent);
      told.textContent = `${map + 1} of ${maps}`;
      draw_one();
    }

    function draw_one() {
      const sums = steps[place],
        [, height, width] = sums.shape,
        size = height * width;
      const values = sums.values.subarray(map * size, (map + 1) * size);
      const zoom = Math.round(312 / width);
      draw_tiles(one, values, [1, height, width], 1, signed_colors(largest_of(values)), zoom);
      frame(one, cell[1] * zoom, cell[0] * zoom, zoom, zoom, 2);
      one.setAttribute("aria-label", `Map ${map + 1}, cell in row ${cell[0] + 1}, column ${cell[1] + 1}`);
      title.textContent = `Map ${map + 1}, row ${cell[0] + 1}, column ${cell[1] + 1}`;
      if (channels === 1) mark_patch(cell, padding);
      explain();
    }

    // The cell's patch and kernel. With more than one channel: what each adds, the largest first.
    function explain() {
      const {weight, bias} = networks[name][place],
        [y, x] = cell,
        inputs = pad(input_of(), padding),
        [, height, width] = inputs.shape;
      const bias_of = bias ? bias.values[map] : 0;
      const products = Array.from({length: channels * 9}, (_, at) => {
        const channel = Math.floor(at / 9),
          row = Math.floor((at % 9) / 3),
          column = at % 3;
        const value = inputs.values[(channel * height + y + row) * width + x + column];
        const factor = weight.values[map * channels * 9 + at];
        return [`${row + 1}, ${column + 1}`, value, factor, value * factor];
      });
      const total = steps[place].values[(map * steps[place].shape[1] + y) * steps[place].shape[2] + x];
      if (channels === 1)
        return draw_products(working, products, bias_of, total, ["cell", "pixel", "kernel", "product"]);
      const shares = Array.from({length: channels}, (_, channel) => [
        `map ${channel + 1}`,
        products.slice(channel * 9, channel * 9 + 9).reduce((sum, [, , , product]) => sum + product, 0),
      ]);
      shares.sort(([, a], [, b]) => Math.abs(b) - Math.abs(a));
      const rest = shares.slice(9).reduce((sum, [, share]) => sum + share, 0);
      const left_out = [`the other ${channels - 9}`, shown(rest)];
      draw_products(working, shares.slice(0, 9), bias_of, total, ["from", "sum of 9 products"], left_out);
    }

    function input_of() {
      return place === 0 ? input : steps[place - 1];
    }

    return {
      update(image) {
        input = image;
        cell ??= [Math.floor(steps[place].shape[1] / 2), Math.floor(steps[place].shape[2] / 2)];
        draw();
      },
    };
  }

  function words_for({type, size}) {
    return {
      MaxPool2d: `largest of each ${size}×${size}`,
      BatchNorm2d: "batch norm",
      Add: "plus the block's inputs",
    }[type];
  }

  function capital(words) {
    return words[0].toUpperCase() + words.slice(1);
  }

  // The patch of the first convolution, on the image itself.
  function mark_patch([y, x], padding) {
    const canvas = by_id("cnn-image"),
      zoom = 8;
    draw_image(canvas, images[chosen], zoom);
    frame(canvas, (x - padding) * zoom, (y - padding) * zoom, 3 * zoom, 3 * zoom, 2);
  }

  choose(0);
  draw_results(contents, name);
  return update;
}
