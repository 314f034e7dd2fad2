"""Open the page of the trained CNNs, or only print its path if there is no screen."""

import webbrowser

from fashion_cnn.commands.ui import can_show
from fashion_cnn.page.html import PAGE
from fashion_cnn.project.errors import StageError


def main() -> None:
    """Print where the page is, and open it."""
    if not PAGE.is_file():
        raise StageError(f"{PAGE}: not found, expected the page that `make repro` writes")
    print(f"{PAGE}: open it in a browser")
    if can_show():
        webbrowser.open(PAGE.absolute().as_uri())  # not resolve(): DVC may have linked a file without .html
