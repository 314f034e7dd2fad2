"""The device that torch computes on, set up for repeatable results."""

import ctypes
import os
import platform
import sys

from fashion_cnn.project.errors import StageError
from fashion_cnn.project.process import usable_threads

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
KEEP_BYTES = 1 << 30


# ATen and MKL choose code by CPU, which changes the last bits of their sums. Restricted to AVX2, and to the
# one mode in which MKL guarantees equal results on the CPUs of Intel and of other makers, they sum alike on
# every x86-64 CPU with AVX2; fixed_order.py replaces their sums, and oneDNN's, that still differ. Both read
# these settings when they first compute; fashion_cnn.project.process removes those of the user's environment.
PORTABLE = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"}
MOST_THREADS = 16  # by default: a batch of 32 images has little work for more


def prepare_torch(device: str, threads: int | None = None, fixed_order: bool = True):
    """Return the torch.device for "auto", "cpu" or "cuda", with torch set up for repeatable results.

    On an x86-64 CPU with AVX2, float32 results have the same bytes for any number of `threads`; None takes
    the usable cores, at most MOST_THREADS. Without `fixed_order` this holds for one thread only; it is for
    models so small that kernels in Python would cost more than the computation. Call this before torch
    computes anything. Raises StageError if `device` is "cuda" and there is none.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # required for cuBLAS to be deterministic
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise StageError("device is cuda, but torch finds no CUDA device here; expected auto or cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads or usable_threads(MOST_THREADS))
    _make_portable(device, fixed_order, torch)
    # torch.use_deterministic_algorithms does the same, but imports torch.compile's modules: a second or more.
    # "warn" on CUDA: torch lists the pooling gradient as nondeterministic, true only if windows overlap.
    torch.set_deterministic_debug_mode("warn" if device == "cuda" else "error")
    # The fill guards against reads of uninitialised memory, at 5 % of a step; no layer here has such reads.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    _keep_freed_memory()
    return torch.device(device)


def why_not_portable(device: str = "auto") -> str | None:
    """The reason, as a clause, why this machine's results differ from others'; None if they do not."""
    import torch

    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return "the order of sums is fixed on CPUs, and this is a GPU"
    if not torch.cpu._is_avx2_supported():
        return f"the order of sums is fixed with AVX2, and this CPU ({platform.machine()}) has none"
    return None


def _make_portable(device: str, fixed_order: bool, torch) -> None:
    # ATen does not check, so a CPU without AVX2 would hit an illegal instruction.
    if reason := why_not_portable(device):
        print(f"the last digits of results differ from those of other machines: {reason}")
        return
    os.environ |= PORTABLE
    used = torch.backends.cpu.get_cpu_capability()
    if used != PORTABLE["ATEN_CPU_CAPABILITY"].upper():
        raise RuntimeError(f"torch computed before prepare_torch: it uses {used}, expected AVX2")
    if fixed_order:
        from fashion_cnn.models.fixed_order import use_fixed_order

        use_fixed_order()
    else:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"


def _keep_freed_memory() -> None:
    """Stop glibc from returning freed memory: each training step would fault its pages in again.

    Saves a fifth of a training step on the CPU. Other C libraries have no mallopt.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
