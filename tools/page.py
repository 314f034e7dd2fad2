"""Open the page of the trained CNNs, or print its path where there is no screen. Usage: make page"""

import sys
import webbrowser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))

from lib.page.html import PAGE
from lib.stage.errors import StageError
from lib.stage.process import run_stage
from ui import can_show


def main() -> None:
    """Print where the page is, and open it."""
    if not PAGE.is_file():
        raise StageError(f"{PAGE}: not found, expected the page that `make repro` writes")
    print(f"{PAGE}: open it in a browser")
    if can_show():
        webbrowser.open(PAGE.resolve().as_uri())


if __name__ == "__main__":
    run_stage(main)
