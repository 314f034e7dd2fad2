"""What the stages share: a folder for what its users need whole, a file for what some of them need.

A script's own folder is on Python's path, so `from lib.models.cnns import …` works from a fresh
checkout and from the copies in which `dvc exp run --temp` and `--queue` run a stage.
"""

from lib.stage.process import start

start()
