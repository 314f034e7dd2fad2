"use strict";

// Unpacks the contents and starts the three parts.

const contents = JSON.parse(by_id("contents").textContent);
const networks = Object.fromEntries(
  Object.entries(contents.cnns).map(([name, cnn]) => [name, unpack_layers(cnn.layers)]),
);
const moved = start_moved(contents, networks);
const parts = [start_toy(contents.toy), start_cnn(contents, networks, moved.see), moved.update];

// Redraws the canvases, whose colours are those of the light or the dark page.
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
  parts.forEach((update) => update()),
);

// On a narrow screen, all parts but the first are folded; a link to one opens it.
const folds = [...document.querySelectorAll("details")];
if (matchMedia("(max-width: 44rem)").matches) folds.slice(1).forEach((fold) => (fold.open = false));
for (const link of document.querySelectorAll("nav a"))
  link.addEventListener("click", () => (document.querySelector(link.hash).open = true));
addEventListener("beforeprint", () => folds.forEach((fold) => (fold.open = true)));
