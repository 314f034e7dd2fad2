"""Take docs/pictures/ anew from this project's page and runs. Usage: python tests/helpers/screenshots.py"""

import io
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from browser import open_page, see_table
from servers import free_port

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs/pictures"


def main() -> None:
    """Look at the page and at MLflow's UI."""
    take_page()
    take_mlflow()


def take_page() -> None:
    """The toy at an early epoch, and an image that is shifted."""
    with open_page(1160, 1000) as page:
        page.goto((ROOT / "page/fashion-cnn.html").as_uri())
        page.locator("#toy-moment").evaluate("slider => slider.value = 4")
        page.locator("#toy-moment").dispatch_event("input")
        page.get_by_role("button", name="Convolution, row 2, column 1").click()
        save("page-toy.png", page.locator("#toy").screenshot())
        page.locator("#picker button").nth(21).click()
        for _ in range(4):
            page.locator("#moved-x").press("ArrowLeft")
        page.locator("#moved-image").click()  # the slider loses its frame
        save("page-moved.png", page.locator("#moved").screenshot())


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
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    picture.save(PICTURES / name, optimize=True)


if __name__ == "__main__":
    main()
