"use strict";

// Unpacks the contents, and starts the three parts.

const contents = JSON.parse(by_id("contents").textContent);
const networks = Object.fromEntries(
  Object.entries(contents.cnns).map(([name, cnn]) => [name, unpack_layers(cnn.layers)]),
);
const moved = start_moved(contents, networks);
const parts = [start_toy(contents.toy), start_cnn(contents, networks, moved.see), moved.update];

// What is drawn as pixels has the colours of the light or the dark page.
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
  parts.forEach((update) => update()),
);
