"use strict";

// Part 2, the end: from the last maps to the logits, and what each position and each map adds.

function start_end(contents) {
  const {classes} = contents,
    [chosen, rival] = ["end-class", "end-rival"].map(by_id);
  let layers, steps, views, pixels;
  chosen.append(
    option("the predicted class", "read"),
    ...classes.map((label, number) => option(label, number)),
  );
  rival.append(
    option("the runner-up", "runner-up"),
    option("nothing", -1),
    ...classes.map((label, number) => option(label, number)),
  );
  for (const select of [chosen, rival]) select.addEventListener("change", () => draw());

  function option(text, value) {
    return element("option", {value}, text);
  }

  // The numbers of the compared classes; −1 for no rival, also if the training diverged.
  function pair(values) {
    const one = chosen.value === "read" ? Math.max(best(values), 0) : Number(chosen.value);
    const other = rival.value === "runner-up" ? best(values, one) : Number(rival.value);
    return [one, other === one ? -1 : other];
  }

  function draw() {
    const {values} = steps.at(-1),
      [one, other] = pair(values);
    draw_hidden();
    draw_logits(values, one, other);
    const parts = attribute(layers, steps, signs_of(one, other)),
      [, height, width] = parts.shape,
      places = by_place(parts);
    const what = other < 0 ? `the logit of ${classes[one]}` : `${classes[one]} − ${classes[other]}`;
    by_id("end-places-title").textContent = `What each of the ${height}×${width} positions adds to ${what}`;
    const look = (place) => {
      const cell = [Math.floor(place / width), place % width];
      draw_field(by_id("end-field"), pixels, receptive_field(layers, flatten_of(layers) - 1, cell));
      by_id("end-field-title").textContent = `Receptive field of ${where(place, width)}`;
    };
    draw_places(by_id("end-places"), places, width, largest_of(places), look);
    draw_cell_scale(by_id("end-legend"), largest_of(places));
    look(strongest(places));
    const total = values[one] - (other < 0 ? 0 : values[other]);
    by_id("end-note").textContent = told(what, places, parts, total, width);
    const maps = by_map(parts)
      .map((value, map) => [`map ${map + 1}`, value])
      .sort(([, a], [, b]) => Math.abs(b) - Math.abs(a));
    const rest = maps.slice(9).reduce((sum, [, value]) => sum + value, 0);
    by_id("end-working-title").textContent = `${capital(what)}, by map`;
    draw_products(
      by_id("end-working"),
      maps.slice(0, 9),
      parts.bias,
      total,
      ["from", "adds"],
      [`the other ${maps.length - 9}`, shown(rest)],
    );
  }

  function told(what, places, {bias}, total, width) {
    if (!Number.isFinite(total)) return "This CNN gives no number: its training diverged.";
    const views_said =
      views > 1 ? " These logits are for the unmodified image alone, without the other views." : "";
    if (places.length === 1)
      return `This CNN discards positions: it takes the largest value of each map, wherever it is.${views_said}`;
    const first = strongest(places);
    const sum = places.reduce((all, value) => all + value, 0);
    return (
      `${capital(what)} is ${shown(total, 2)}: the positions add ${shown(sum, 2)}, the biases ${shown(bias, 2)}. ` +
      `The largest contribution in absolute value, ${shown(places[first], 2)}, comes from ${where(first, width)}.` +
      views_said
    );
  }

  function strongest(places) {
    return places.reduce((top, value, place) => (Math.abs(value) > Math.abs(places[top]) ? place : top), 0);
  }

  // The values between the linear layers; a CNN with one linear layer has none.
  function draw_hidden() {
    const place = layers.findLastIndex(({type}) => type === "ReLU"),
      flat = flatten_of(layers);
    by_id("end-hidden").closest("figure").hidden = place < flat;
    if (place < flat) return;
    const {values} = steps[place],
      lit = values.filter((value) => value > 0).length;
    const color = signed_colors(largest_of(values));
    draw_tiles(by_id("end-hidden"), values, [1, values.length / 16, 16], 1, color, 17);
    draw_pixel_scale(by_id("end-hidden-scale"), values, color);
    by_id("end-hidden-title").textContent = `Linear, then ReLU: ${values.length} values`;
    by_id("end-hidden").setAttribute("aria-label", `${values.length} hidden values`);
    by_id("end-hidden-note").textContent = `${lit} of them are on; the others are 0.`;
  }

  function draw_logits(values, one, other) {
    const largest = largest_of(values);
    by_id("end-logits").replaceChildren(
      ...classes.flatMap((label, number) => {
        const value = values[number],
          text = Number.isFinite(value) ? shown(value, 2) : "–",
          color = `var(--${value < 0 ? "negative" : "positive"})`;
        return bar_row(
          label,
          Math.abs(value) / (largest || 1),
          text,
          number === one || number === other,
          color,
        );
      }),
    );
  }

  return {
    update(network, outputs, count, image) {
      [layers, steps, views, pixels] = [network, outputs, count, image];
      draw();
    },
  };
}

function capital(words) {
  return words[0].toUpperCase() + words.slice(1);
}
