"""What the stages share.

A script's own folder is on Python's path, so `from lib.models import …` works from a fresh
checkout and from the copies in which `dvc exp run --temp` and `--queue` run a stage.
"""

import os

# OpenMP reads this when torch is loaded, hence here, before any other import of the project.
# Spinning threads collapse when another process holds a core (5 to 10 times slower a step);
# passive waiting costs nothing that was seen on a quiet machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
