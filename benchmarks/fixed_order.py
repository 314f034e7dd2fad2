"""What a fixed order of sums costs a training step: benchmarks/fixed_order.csv, docs/machines.md.

Usage, on a quiet machine: python benchmarks/fixed_order.py. Each way to compute runs in a process of its own,
in turn with the others: torch's own choice; all libraries held to AVX2, as the project did before; a fixed
order; and a fixed order on a CPU with AVX2 alone, as oneDNN behaves if it is held to that.
"""

import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "stages"), str(ROOT)]
RESULTS = ROOT / "benchmarks/fixed_order.csv"
WAYS = ("own choice", "held to AVX2", "fixed order", "fixed order, oneDNN held to AVX2")
THREADS, MODELS = (2, 1), ("lesson", "residual")
ROUNDS, PARTS, STEPS = 3, 3, 60


def main() -> None:
    """Measure, append a row a process to RESULTS, and print the table."""
    from benchmarks.report import cpu_name, spread

    rows = []
    for _ in range(ROUNDS):
        for model in MODELS:
            for threads in THREADS:
                for way in WAYS:
                    command = [sys.executable, __file__, way, str(threads), model]
                    said = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
                    rows.append([cpu_name(), model, threads, way, *said.split()])
                    print(*rows[-1], sep="  ", flush=True)
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not file.tell():
            writer.writerow(["cpu", "model", "threads", "way", "torch", "ms_per_step"])
        writer.writerows(rows)
    print("\n| CNN, threads | " + " | ".join(WAYS) + " |\n|" + "---|" * (len(WAYS) + 1))
    for model in MODELS:
        for threads in THREADS:
            cells = []
            for way in WAYS:
                times = [float(row[-1]) for row in rows if row[1:4] == [model, threads, way]]
                cells.append(spread(times))
            print(f"| {model}, {threads} | {' | '.join(cells)} |")


def measure(way: str, threads: int, model: str) -> None:
    """Print torch's version, and milliseconds a step: the median of PARTS, each of STEPS."""
    import lib  # noqa: F401  (sets the environment before torch is loaded)
    from lib.models.device import PORTABLE, prepare_torch

    os.environ["FASHION_CNN_THREADS"] = str(threads)
    if "held" in way:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    if way == "held to AVX2":
        os.environ |= PORTABLE
    if way.startswith("fixed"):
        prepare_torch("cpu")
    import numpy as np
    import torch

    from lib.fashion_mnist import RAW_DIR, TRAIN_IMAGES, TRAIN_LABELS, read_idx
    from lib.inference import to_device
    from lib.models import device
    from lib.models.cnns import build_cnn, fresh
    from lib.params import read_yaml
    from lib.training.batches import draw_epoch
    from lib.training.loop import TrainStep
    from lib.training.optimizer import build_optimizer

    torch.set_num_threads(threads)
    device._keep_freed_memory()
    images, labels = (read_idx(path, ROOT / RAW_DIR).copy() for path in (TRAIN_IMAGES, TRAIN_LABELS))
    params = SimpleNamespace(**read_yaml(ROOT / "tests/helpers/params.yaml")["train_cnn"])
    cpu = torch.device("cpu")
    cnn = to_device(fresh(lambda: build_cnn(model), 0), cpu)
    step = TrainStep(
        cnn.train(), build_optimizer(cnn, params, cpu), torch.from_numpy(images[None]),
        torch.from_numpy(labels).long(), params,
    )  # fmt: skip
    takes = iter(torch.from_numpy(draw_epoch(np.arange(len(images)), 1, params, 1)).split(32))
    times = []
    for _ in range(1 + PARTS):  # the first warms up
        began = time.perf_counter()
        for _ in range(STEPS):
            step(next(takes))
        times.append((time.perf_counter() - began) / STEPS * 1000)
    print(torch.__version__, f"{statistics.median(times[1:]):.2f}")


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else:
        main()
