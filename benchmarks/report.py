"""The benchmark's report: its lines, its conditions, and figures with their spread."""

import os
import platform
import statistics
import textwrap
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Report:
    """The lines of results.md."""

    def __init__(self):
        self.lines = ["# Benchmark results", "", "Written by `make bench`.", ""]

    def heading(self, title: str, note: str = "") -> None:
        """Begin a section."""
        print(f"\n## {title}", flush=True)
        self.lines += [f"## {title}", ""]
        if note:
            self.note(note)

    def note(self, text: str) -> None:
        """Add a paragraph."""
        self.lines += [textwrap.fill(text, 110), ""]

    def table(self, header: str, rows: list[str]) -> None:
        """Add a table; rows are already joined by |."""
        columns = header.count("|") + 1
        self.lines += [f"| {header} |", "|" + "---|" * columns, *(f"| {row} |" for row in rows), ""]
        print("\n".join(rows), flush=True)


def spread(values: list[float], digits: int = 1) -> str:
    """Median, with minimum and maximum."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def cpu_name() -> str:
    """The CPU's name in Linux; the machine's architecture elsewhere."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


def conditions() -> str:
    """Versions, CPU, threads and load."""
    import torch

    names = ("torch", "torchvision", "imgaug", "numpy", "dvc", "mlflow")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return (
        f"Python {platform.python_version()}, {versions}. {cpu_name()}, {os.cpu_count()} cores, "
        f"instruction set {torch.backends.cpu.get_cpu_capability()}, 2 threads; "
        f"load at the start {os.getloadavg()[0]:.2f}. "
        "Median (min-max) of the rounds; both sides run in turn, each in a process of its own."
    )
