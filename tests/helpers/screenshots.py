"""Retake docs/pictures/ from this project's page and runs. Usage: python tests/helpers/screenshots.py"""

import io
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from browser import open_page, see_table
from servers import free_port

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "page/fashion-cnn.html"
PICTURES = ROOT / "docs/pictures"
DRESS = 9  # one of the page's images


def main() -> None:
    """Take the pictures of the page and of MLflow's UI."""
    take_page()
    take_mlflow()


def take_page() -> None:
    """The toy at an early epoch, the last maps' places, and an image that moves, as an animation."""
    with open_page(1160, 1000) as page:
        page.goto(PAGE.as_uri())
        page.get_by_role("button", name="Convolution, row 2, column 1").click()
        save("page-toy.png", page.locator("#toy").screenshot())
        page.locator("#picker button").nth(DRESS).click()
        save("page-places.png", page.locator("#cnn-end").screenshot())
        hidden = "header, main > :not(#moved), #moved > summary ~ p, #moved-curves, #moved-note, footer"
        page.add_style_tag(content=f"{hidden} {{ display: none }}")
        box = page.locator("#moved").bounding_box() | {"height": 800}
        frames = []
        for by in (0, 1, 2, 3, 4, 5, 3, 1, -1, -2, -3, -4, -5, -3, -1):
            page.locator("#moved-x").evaluate("(slider, by) => (slider.value = by)", by)
            page.locator("#moved-x").dispatch_event("input")
            frames.append(picture(page.screenshot(clip=box)).resize((800, 571), Image.Resampling.LANCZOS))
    moved = PICTURES / "page-moved.webp"
    frames[0].save(moved, save_all=True, append_images=frames[1:], duration=700, loop=0, quality=80, method=6)


def take_mlflow() -> None:
    """The table of runs; MLFLOW_TRACKING_URI may name another store than this project's."""
    settings = os.environ | {"BROWSER": "true"}
    command = [sys.executable, "-m", "fashion_cnn", "ui", "--port", str(free_port())]
    with subprocess.Popen(command, env=settings, cwd=ROOT, text=True, stdout=subprocess.PIPE) as server:
        try:
            address = next(line.split()[1] for line in server.stdout if line.startswith("MLflow: http"))
            with open_page(1500, 640) as page:
                see_table(page, address)
                page.locator("[data-component-id='mlflow.experiment_page.shared_view.dismiss']").click()
                save("mlflow-runs.png", page.screenshot())
        finally:
            server.terminate()


def save(name: str, png: bytes) -> None:
    """Write a picture with 128 colours, a third of the bytes."""
    picture(png).quantize(128, dither=Image.Dither.NONE).save(PICTURES / name, optimize=True)


def picture(png: bytes) -> Image.Image:
    """A screenshot without its transparency."""
    return Image.open(io.BytesIO(png)).convert("RGB")


if __name__ == "__main__":
    main()
