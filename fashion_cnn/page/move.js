"use strict";

// Moves an image of 28×28 pixels as evaluate_cnn does; uncovered pixels are black.

const SIDE = 28;

// Shifts by whole pixels to the right and down.
function shift(pixels, right, down) {
  const moved = new Uint8Array(SIDE * SIDE);
  for (let y = 0; y < SIDE; y++) {
    for (let x = 0; x < SIDE; x++) moved[y * SIDE + x] = pixel_at(pixels, x - right, y - down);
  }
  return moved;
}

// Rotates counterclockwise about the centre; each pixel is interpolated from the four around where it came from.
// torch rounds every step to single precision. Without that, one pixel in 40,000 would differ by 1.
function rotate(pixels, degrees) {
  const angle = (degrees * Math.PI) / 180,
    half = SIDE / 2;
  const cos = single(single(Math.cos(angle)) / half),
    sin = single(single(Math.sin(angle)) / half);
  const rotated = new Uint8Array(SIDE * SIDE);
  for (let y = 0; y < SIDE; y++) {
    for (let x = 0; x < SIDE; x++) {
      const right = x - half + 0.5,
        down = y - half + 0.5; // from the centre
      const from_x = single(single(right * cos) - single(down * sin)); // from -1 to 1
      const from_y = single(single(right * sin) + single(down * cos));
      rotated[y * SIDE + x] = round_half_even(between(pixels, to_pixels(from_x), to_pixels(from_y)));
    }
  }
  return rotated;
}

const single = Math.fround;

function to_pixels(place) {
  return single(single(single(place + 1) * (SIDE / 2)) - 0.5);
}

// Bilinear interpolation: the four pixels around a point, each weighted by how near it is.
function between(pixels, x, y) {
  const left = Math.floor(x),
    top = Math.floor(y),
    right = single(x - left),
    down = single(y - top);
  let sum = 0;
  for (const [beside, below] of [
    [0, 0],
    [1, 0],
    [0, 1],
    [1, 1],
  ]) {
    const weight = single((beside ? right : single(1 - right)) * (below ? down : single(1 - down)));
    sum = single(sum + pixel_at(pixels, left + beside, top + below) * weight);
  }
  return sum;
}

function pixel_at(pixels, x, y) {
  return x < 0 || y < 0 || x >= SIDE || y >= SIDE ? 0 : pixels[y * SIDE + x];
}

function round_half_even(value) {
  const down = Math.floor(value),
    rest = value - down;
  return rest > 0.5 || (rest === 0.5 && down % 2) ? down + 1 : down;
}
