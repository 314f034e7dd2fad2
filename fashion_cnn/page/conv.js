"use strict";

// Part 2, one convolution: all its maps and what each layer up to the ReLU makes of them, one map enlarged, and how
// one of its cells is computed. `mark` gets the number of the input map that is open.
function start_conv(network, place, number, mark) {
  const {
      weight: {
        shape: [maps, channels],
      },
      padding,
    } = network[place],
    last = place + network.slice(place).findIndex(({type}) => type === "ReLU"),
    columns = maps > 64 ? 16 : 8;
  let map = 0,
    marked = -1, // the map after the ReLU that is open in the next convolution; -1: none
    source = -1, // the input map to open; -1: the one that adds most
    drawn = -1, // the input map that is marked in the drawn atlases; -1: none
    cell = null,
    now; // {layers, steps, input, pixels}

  const atlases = [];
  for (let at = place; at <= last; at++) {
    const title = at === place ? `Convolution: ${maps} maps` : words_for(network[at]);
    const canvas = element("canvas", {class: "atlas", role: "img", "aria-label": title});
    canvas.addEventListener("click", (event) => {
      map = tile_at(event, canvas, columns, maps);
      draw();
    });
    atlases.push({at, canvas, title, scale: element("div", {class: "scale"})});
  }
  const kernels = element("canvas", {class: "atlas", role: "img"}),
    of_kernels = element("span", {}),
    kernel_scale = element("div", {class: "scale"});
  kernels.addEventListener("click", (event) => {
    if (channels === 1) map = tile_at(event, kernels, columns, maps);
    else source = tile_at(event, kernels, channels > 64 ? 16 : 8, channels);
    draw();
  });
  const slider = element("input", {type: "range", min: 0, max: maps - 1, value: 0});
  slider.addEventListener("input", () => {
    map = Number(slider.value);
    draw();
  });
  // An application, so that screen readers pass it the arrow keys.
  const one = element("canvas", {tabindex: 0, role: "application"}),
    told = element("span", {class: "value"}),
    pooled = element("p", {class: "note"}),
    title = element("h4", {"aria-live": "polite"}),
    working = element("div", {}),
    opened = element("div", {}),
    read = element("canvas", {role: "img"}),
    field = element("canvas", {role: "img"});
  const of_read = element("figcaption", {}),
    of_field = element("figcaption", {});
  const figure = (caption, ...children) =>
    element("figure", {}, element("figcaption", {}, caption), ...children);
  by_id("cnn-convs").append(
    element(
      "details",
      {class: "conv", open: true},
      element("summary", {}, element("h3", {}, `Convolution ${number}`)),
      element(
        "div",
        {class: "atlases"},
        ...atlases.map((atlas) => figure(atlas.title, atlas.canvas, atlas.scale)),
        figure(of_kernels, kernels, kernel_scale),
      ),
      element(
        "div",
        {class: "chosen"},
        element(
          "figure",
          {},
          element("label", {class: "slider"}, element("span", {}, "Map ", told), slider),
          one,
          element(
            "p",
            {class: "note"},
            `Point at a cell, or move with the arrow keys.${channels > 1 ? " Press an input map in the table to open it; a frame marks it above." : ""}`,
          ),
          pooled,
        ),
        element(
          "div",
          {class: "working", id: `conv-${number}-working`},
          title,
          element("div", {class: "tables"}, working, opened),
        ),
        element(
          "div",
          {class: "fields"},
          channels > 1 ? element("figure", {}, of_read, read) : "",
          element("figure", {}, of_field, field),
        ),
      ),
    ),
  );

  const point = (event) => {
    const box = one.getBoundingClientRect(),
      [, height, width] = now.steps[place].shape;
    look(
      Math.floor(((event.clientY - box.top) / box.height) * height),
      Math.floor(((event.clientX - box.left) / box.width) * width),
    );
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
    const [, height, width] = now.steps[place].shape;
    cell = [Math.min(Math.max(y, 0), height - 1), Math.min(Math.max(x, 0), width - 1)];
    source = -1;
    draw_one();
  }

  // The first view: the map with the largest value after the ReLU, and its middle cell.
  function open() {
    const {values, shape} = now.steps[last];
    map = Math.floor(Math.max(best(values), 0) / (shape[1] * shape[2]));
    cell = now.steps[place].shape.slice(1).map((side) => Math.floor(side / 2));
  }

  function draw() {
    slider.value = map;
    told.textContent = `${map + 1} of ${maps}`;
    for (const atlas of atlases) draw_atlas(atlas);
    if (channels === 1) draw_kernels(-1);
    drawn = -1;
    draw_one();
  }

  function draw_atlas({at, canvas, scale}) {
    const {values, shape} = now.steps[at],
      color = signed_colors(largest_of(values)),
      zoom = Math.max(2, Math.round((columns === 16 ? 24 : 52) / shape[2]));
    draw_tiles(canvas, values, shape, columns, color, zoom, map);
    if (at === last && marked >= 0) frame_tile(canvas, shape, columns, zoom, marked, "--ink");
    draw_pixel_scale(scale, values, color);
  }

  // All kernels if there is one input map; otherwise those of the chosen map, one for each input map.
  function draw_kernels(chosen) {
    const {values} = now.layers[place].weight;
    const drawn = channels === 1 ? values : values.subarray(map * channels * 9, (map + 1) * channels * 9);
    const count = drawn.length / 9,
      wide = count > 64 ? 16 : 8,
      zoom = count > 64 ? 8 : 17,
      color = signed_colors(largest_of(drawn));
    draw_tiles(kernels, drawn, [count, 3, 3], wide, color, zoom, channels === 1 ? map : -1);
    if (channels > 1) frame_tile(kernels, [count, 3, 3], wide, zoom, chosen, "--ink");
    draw_pixel_scale(kernel_scale, drawn, color);
    of_kernels.textContent =
      channels === 1 ? `The ${count} kernels, 3×3` : `The ${count} kernels of map ${map + 1}, 3×3`;
    kernels.setAttribute("aria-label", of_kernels.textContent);
  }

  // The chosen map on the scale of all maps, the chosen cell, and its pooling window.
  function draw_one() {
    const {values, shape} = now.steps[place],
      [, height, width] = shape,
      size = height * width,
      own = values.subarray(map * size, (map + 1) * size),
      zoom = Math.round(312 / width);
    draw_tiles(one, own, [1, height, width], 1, signed_colors(largest_of(values)), zoom);
    pooled.textContent = "";
    const next = now.layers[place + 1];
    if (next.type === "MaxPool2d") draw_window(own, width, height, next.size, zoom);
    frame(one, cell[1] * zoom, cell[0] * zoom, zoom, zoom, 2);
    one.setAttribute("aria-label", `Map ${map + 1}, cell in ${where(cell[0] * width + cell[1], width)}`);
    title.textContent = `Map ${map + 1}, ${where(cell[0] * width + cell[1], width)}`;
    const seen = receptive_field(now.layers, place, cell);
    of_field.textContent = `Its receptive field in the image, ${seen.size}×${seen.size}`;
    draw_field(field, now.pixels, seen);
    explain();
  }

  function draw_window(values, width, height, size, zoom) {
    const [top, left] = cell.map((at) => Math.floor(at / size) * size);
    if (top + size > height || left + size > width) {
      pooled.textContent = "This cell is in no pooling window: pooling drops this border.";
      return;
    }
    const window = Array.from(
      {length: size * size},
      (_, at) => (top + Math.floor(at / size)) * width + left + (at % size),
    );
    const winner = window[best(window.map((at) => values[at]))];
    if (winner === undefined) return; // there is none if a value is NaN
    const [y, x] = [Math.floor(winner / width), winner % width];
    frame(one, left * zoom, top * zoom, size * zoom, size * zoom, 2, "--ink");
    dot(one, (x + 0.5) * zoom, (y + 0.5) * zoom);
    pooled.textContent =
      `The largest value of its ${size}×${size} pooling window is ${shown(values[winner])}, in ${where(winner, width)} (dot). ` +
      `${said_next(values[winner])}`;
  }

  function said_next(value) {
    if (now.layers[place + 2].type !== "ReLU") return "";
    return value > 0 ? "ReLU passes it unchanged." : "ReLU makes it 0.";
  }

  // The cell's patch and kernel. With several channels: what each adds, the largest first, and one of them opened.
  function explain() {
    const {weight, bias} = now.layers[place],
      [y, x] = cell,
      before = place === 0 ? now.input : now.steps[place - 1],
      inputs = pad(before, padding),
      [, height, width] = inputs.shape,
      [, out_height, out_width] = now.steps[place].shape;
    const bias_of = bias ? bias.values[map] : 0;
    const products = Array.from({length: channels * 9}, (_, at) => {
      const channel = Math.floor(at / 9),
        row = Math.floor((at % 9) / 3),
        column = at % 3;
      const value = inputs.values[(channel * height + y + row) * width + x + column];
      const factor = weight.values[map * channels * 9 + at];
      return [`${row + 1}, ${column + 1}`, value, factor, value * factor];
    });
    const total = now.steps[place].values[(map * out_height + y) * out_width + x];
    if (channels === 1) {
      draw_products(working, products, bias_of, total, ["cell", "pixel", "kernel", "product"]);
      return;
    }
    const shares = Array.from({length: channels}, (_, channel) => [
      channel,
      products.slice(channel * 9, channel * 9 + 9).reduce((sum, [, , , product]) => sum + product, 0),
    ]);
    shares.sort(([, a], [, b]) => Math.abs(b) - Math.abs(a));
    const opened_one = source < 0 ? shares[0][0] : source;
    const rows = shares.slice(0, 9).map(([channel, share]) => [name_of(channel, opened_one), share]);
    const rest = shares.slice(9).reduce((sum, [, share]) => sum + share, 0);
    draw_products(
      working,
      rows,
      bias_of,
      total,
      ["from", "sum of 9 products"],
      [`the other ${channels - 9}`, shown(rest)],
    );
    const own = products.slice(opened_one * 9, opened_one * 9 + 9),
      sum = own.reduce((all, [, , , product]) => all + product, 0);
    draw_products(opened, own, null, sum, ["cell", `map ${opened_one + 1}`, "kernel", "product"]);
    draw_read(before, opened_one);
    if (opened_one === drawn) return; // so that pointing at cells does not redraw the atlases
    drawn = opened_one;
    draw_kernels(drawn);
    mark(drawn);
  }

  function name_of(channel, chosen) {
    const button = element(
      "button",
      {type: "button", class: "name", "aria-pressed": String(channel === chosen)},
      `map ${channel + 1}`,
    );
    button.addEventListener("click", () => {
      source = channel;
      draw_one();
      working.querySelector("[aria-pressed=true]").focus();
    });
    return button;
  }

  // The opened input map, on the scale of all of them, and the patch that the kernel covers.
  function draw_read({values, shape: [, height, width]}, channel) {
    const size = height * width,
      zoom = Math.round(208 / width),
      own = values.subarray(channel * size, (channel + 1) * size);
    draw_tiles(read, own, [1, height, width], 1, signed_colors(largest_of(values)), zoom);
    frame(read, (cell[1] - padding) * zoom, (cell[0] - padding) * zoom, 3 * zoom, 3 * zoom, 2);
    of_read.textContent = `Input map ${channel + 1}`;
    read.setAttribute("aria-label", `${of_read.textContent}, with the patch of 3×3`);
  }

  return {
    update(found) {
      now = found;
      if (cell === null) open();
      draw();
    },
    mark(number) {
      marked = number;
      draw_atlas(atlases.at(-1));
    },
  };
}

function words_for({type, size}) {
  return {
    MaxPool2d: `Max pooling, ${size}×${size}`,
    BatchNorm2d: "Batch norm",
    Add: "Sum with the block's input (skip connection)",
    ReLU: "ReLU",
  }[type];
}

// The number of the tile that an event is on.
function tile_at(event, canvas, columns, count) {
  const box = canvas.getBoundingClientRect(),
    rows = Math.ceil(count / columns);
  const x = Math.floor(((event.clientX - box.left) / box.width) * columns),
    y = Math.floor(((event.clientY - box.top) / box.height) * rows);
  return Math.min(Math.max(y * columns + x, 0), count - 1);
}
