"""What the stages share.

A script's own folder is on Python's path, so `from lib.models import …` works from a fresh
checkout and from the copies in which `dvc exp run --temp` and `--queue` run a stage.
"""

import gc
import os

from lib.process import die_with_parent

# Before the imports that take seconds, in which DVC can be killed.
if "DVC_STAGE" in os.environ:
    die_with_parent()

# What these libraries read from the environment changes the last bits of results, or the speed. No
# setting of the user's reaches them, since neither params nor tags would know of it.
LIBRARIES = ("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_", "OPENCV_", "NPY_")
for name in [name for name in os.environ if name.startswith(LIBRARIES)]:
    del os.environ[name]

# They are read when torch is loaded or first computes, hence here, before any other import of the
# project. A thread that waits for the others spins for a moment, then sleeps. Left alone, it spins on,
# and a training step takes 100 ms where another process holds a core; sleeping at once, it takes 30 ms
# there but 16.3 on a quiet machine. This takes 33 and 14.4.
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}

# Imports make some 300,000 objects that stay. Python's collector, left alone, goes through them again
# and again: a quarter of the time that MLflow adds to a training (4.0 s, 3.1 with this).
gc.set_threshold(50_000)
