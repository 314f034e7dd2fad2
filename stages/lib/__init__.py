"""What the stages share.

A script's own folder is on Python's path, so `from lib.models import …` works from a fresh
checkout and from the copies in which `dvc exp run --temp` and `--queue` run a stage.
"""

import os

from lib.process import die_with_parent

# Before the imports that take seconds, in which DVC can be killed.
if "DVC_STAGE" in os.environ:
    die_with_parent()

# OpenMP reads these when torch is loaded, hence here, before any other import of the project. A
# thread that waits for the others spins for a moment, then sleeps. Left alone, it spins on, and a
# training step takes 100 ms where another process holds a core; sleeping at once, it takes 28 ms
# there but 15 on a quiet machine. This takes 32 and 12.7.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
