"""The same bytes on every CPU with AVX2, whatever the environment says: seen on an emulated CPU, too.

The emulator is qemu's user mode, Debian's and Ubuntu's package qemu-user; without it, two tests skip.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import environment
from project import ROOT

pytestmark = pytest.mark.slow

QEMU = shutil.which("qemu-x86_64")
CPU = Path("/proc/cpuinfo").read_text()
# Of the other vendor, since libraries choose their code by that, too.
OTHER = "Haswell-noTSX" if "AuthenticAMD" in CPU else "EPYC"
PARTS = ("toy", "augmentation", "cnn", "options")
# The AVX2 gather instructions of qemu 7.2, with which torch moves images, end in a segmentation fault.
MOVES = "moves"

needs_qemu = pytest.mark.skipif(
    not QEMU or os.uname().machine != "x86_64", reason="needs qemu-x86_64: apt-get install qemu-user"
)
needs_avx2 = pytest.mark.skipif("avx2" not in CPU, reason="needs a CPU with AVX2")


def fingerprint(*parts: str, numerics: str = "portable", cpu: str | None = None, **more: str) -> dict:
    emulator = [QEMU, "-cpu", cpu] if cpu else []
    command = [*emulator, sys.executable, str(ROOT / "tests/helpers/fingerprint.py"), numerics, *parts]
    done = subprocess.run(
        command,
        cwd=ROOT / "tests/helpers",
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def here() -> dict:
    return fingerprint(*PARTS, MOVES)


@needs_avx2
def test_portable_numerics_use_avx2_even_if_the_cpu_has_more(here):
    assert here["instructions"] == "AVX2"


@pytest.mark.parametrize(
    "settings",
    [
        {
            "OMP_THREAD_LIMIT": "1",
            "OMP_DYNAMIC": "TRUE",
            "OMP_NUM_THREADS": "7",
            "OMP_MAX_ACTIVE_LEVELS": "0",
            "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
            "MKL_NUM_THREADS": "1",
            "MKL_DYNAMIC": "TRUE",
        },
        {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "SSE4_2"},
    ],
)
def test_no_setting_in_the_environment_moves_a_byte(here, settings):
    assert fingerprint(*PARTS, MOVES, **settings) == here


@pytest.mark.skipif("avx512f" not in CPU, reason="needs a CPU with AVX-512")
def test_native_numerics_use_what_the_cpu_has(here):
    native = fingerprint("cnn", numerics="native")
    assert native["instructions"] == "AVX512"
    assert native["logits"] != here["logits"]


@needs_qemu
def test_an_emulated_cpu_of_another_vendor_gives_the_same_bytes(here):
    emulated = fingerprint(*PARTS, cpu=OTHER)
    assert emulated == {name: here[name] for name in emulated}


@needs_qemu
def test_a_cpu_without_avx2_is_named_in_a_line():
    code = (
        "import lib; from lib.models.device import prepare_torch; prepare_torch('cpu', 2);"
        "import torch; print(torch.ones(64).exp().sum().item())"
    )
    command = [QEMU, "-cpu", "Nehalem", sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT / "stages", env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    line, computed = done.stdout.splitlines()
    assert line.endswith("portable numerics hold on x86-64 CPUs with AVX2, and this CPU (x86_64) has none")
    assert float(computed) == pytest.approx(64 * 2.718282)
