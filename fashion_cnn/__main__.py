"""The command fashion-cnn as `python -m fashion_cnn`, which runs the code of the current folder."""

import sys

try:
    from fashion_cnn.cli import main
except ModuleNotFoundError as error:
    sys.exit(f"error: {sys.executable} has no {error.name}; `make setup` makes .venv/bin/fashion-cnn")
main()
