"""The command fashion-cnn as `python -m fashion_cnn`, which runs the code of the current folder."""

from fashion_cnn.cli import main

main()
