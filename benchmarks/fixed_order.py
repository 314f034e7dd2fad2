"""What a fixed order of sums costs a training step: benchmarks/fixed_order.csv, docs/machines.md.

Usage, on a quiet machine: python benchmarks/fixed_order.py. Each variant runs in a process of its own, in
turn with the others: torch's own choice; all libraries limited to AVX2, as the project did before; a fixed
order; and a fixed order with oneDNN limited to AVX2, as it behaves on a CPU that has only AVX2.
"""

import csv
import os
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/fixed_order.csv"
WAYS = ("torch's own choice", "all libraries held to AVX2", "fixed order", "fixed order, oneDNN held to AVX2")
THREADS, MODELS = (2, 1), ("lesson", "residual")
ROUNDS, PARTS, STEPS = 3, 3, 60


def main() -> None:
    """Measure, append a row per process to RESULTS, and print the table."""
    from report import cpu_name, spread

    times: dict[tuple, list[float]] = {}
    with RESULTS.open("a", newline="", buffering=1) as file:  # a stop keeps the rows so far
        writer = csv.writer(file, lineterminator="\n")
        if not file.tell():
            writer.writerow(["cpu", "model", "threads", "way", "torch", "ms_per_step"])
        for _, model, threads, way in product(range(ROUNDS), MODELS, THREADS, WAYS):
            command = [sys.executable, __file__, way, str(threads), model]
            said = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.split()
            writer.writerow([cpu_name(), model, threads, way, *said])
            print(model, threads, way, *said, sep="  ", flush=True)
            times.setdefault((model, threads, way), []).append(float(said[-1]))
    print("\n| CNN, threads | " + " | ".join(WAYS) + " |\n|" + "---|" * (len(WAYS) + 1))
    for model, threads in product(MODELS, THREADS):
        cells = [spread(times[model, threads, way]) for way in WAYS]
        print(f"| {model}, {threads} | {' | '.join(cells)} |")


def measure(way: str, threads: int, model: str) -> None:
    """Print torch's version, and milliseconds a step: the median of PARTS, each of STEPS."""
    from fashion_cnn.models.device import PORTABLE, prepare_torch
    from fashion_cnn.project.process import start

    start()

    os.environ["FASHION_CNN_THREADS"] = str(threads)
    if "held" in way:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    if way == "all libraries held to AVX2":
        os.environ |= PORTABLE
    if way.startswith("fixed"):
        prepare_torch("cpu")
    import torch
    from worker import Project, training

    from fashion_cnn.models import device

    torch.set_num_threads(threads)
    device._keep_freed_memory()
    images = Project()
    step, batches = training(images.images[None], images.labels, model)
    takes = iter(batches)
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
