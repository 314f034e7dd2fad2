"""Take docs/pictures/ anew from this project's runs. Usage: python tests/screenshots.py"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests/helpers"), str(ROOT)]

from browser import open_page, see_models, see_table
from servers import free_port

PICTURES = ROOT / "docs/pictures"


def main() -> None:
    """Serve the UI, and look at the table and the models."""
    settings = os.environ | {"PORT": str(free_port()), "BROWSER": "true"}
    command = [sys.executable, str(ROOT / "tools/ui.py")]
    with subprocess.Popen(command, env=settings, cwd=ROOT, text=True, stdout=subprocess.PIPE) as server:
        try:
            address = next(line.split()[1] for line in server.stdout if line.startswith("MLflow: http"))
            with open_page(1400, 620) as page:
                see_table(page, address)
                page.locator("[data-component-id='mlflow.experiment_page.shared_view.dismiss']").click()
                page.screenshot(path=PICTURES / "mlflow-runs.png")
                see_models(page)
                page.screenshot(path=PICTURES / "mlflow-models.png")
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
