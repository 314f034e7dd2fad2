"""A stage as a process: its argument, its one line and exit code, its end with its parent, torch's set-up."""

import contextlib
import ctypes
import errno
import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch

from fashion_cnn.models import device
from fashion_cnn.models.device import prepare_torch
from fashion_cnn.project import process
from fashion_cnn.project.catalog import named_cnn
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.process import Output, run_stage, usable_threads


class Left(Exception):
    """Stand-in for the end of the process, with its exit code."""


@pytest.fixture
def code_of(monkeypatch, capfd):
    """Run `main` as a stage; returns the exit code."""

    def leave(code):
        raise Left(code)

    def run(main) -> int:
        for name in ("stdout", "stderr"):  # the stage replaces both
            monkeypatch.setattr(sys, name, getattr(sys, name))
        monkeypatch.setattr(process.os, "_exit", leave)
        monkeypatch.setattr(process.atexit, "_run_exitfuncs", lambda: print("exit functions"))
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(Left) as raised:
                run_stage(main)
        finally:
            signal.signal(signal.SIGTERM, before)
        return raised.value.args[0]

    return run


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "line"),
    [
        (lambda: None, 0, ""),
        (failing(StageError("x is 1, expected 2")), 1, "error: x is 1, expected 2\n"),
        (failing(PermissionError(13, "Permission denied", "a/b")), 1, "error: a/b: Permission denied\n"),
        (failing(OSError(28, "No space left on device")), 1, "error: output: No space left on device\n"),
        (failing(OSError("no number")), 1, "error: output: no number\n"),
        (failing(KeyboardInterrupt()), 130, "stopped on request\n"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 130, "stopped on request\n"),
        (lambda: sys.exit(2), 2, ""),  # as argparse does
        (lambda: sys.exit(), 0, ""),
    ],
)
def test_exit_codes(code_of, capfd, main, code, line):
    """A stage ends with an exit code and at most one line."""
    assert code_of(main) == code
    printed = capfd.readouterr()
    assert printed.err == line
    assert printed.out == "exit functions\n"


def test_full_output(code_of, capfd, monkeypatch):
    """A full output is reported when the work is done."""
    done = []
    with open("/dev/full", "w") as full:  # noqa: PTH123
        for main, code, line in (
            (lambda: (print("x"), done.append(1)), 1, "error: standard output: No space left on device\n"),
            (failing(StageError("the fault")), 1, "error: the fault\n"),
        ):
            monkeypatch.setattr(sys, "stdout", full)
            assert code_of(main) == code
            assert capfd.readouterr().err == line
        monkeypatch.undo()
    assert done == [1]


def test_unread_output():
    """An output that nobody reads is not a fault, whereas a full one is."""
    reader, writer = os.pipe()
    os.close(reader)
    with Output(writer, "w") as output:
        assert output.write(b"four") == 4
        assert output.fault is None
    with Output("/dev/full", "w") as output:
        assert output.write(b"four") == 4
        assert output.fault.errno == errno.ENOSPC


def test_work_stream(tmp_path):
    """A line arrives at once, and any character can be written."""
    with (tmp_path / "out").open("w", encoding="ascii") as file, process._for_work(file) as stream:
        stream.write("4×4\n")
        assert (tmp_path / "out").read_text() == "4\\xd74\n"
        assert stream.encoding == "ascii"
    with process._for_work(None) as nowhere:
        nowhere.write("×\n")
        assert nowhere.buffer.raw.name == os.devnull


def test_bug_keeps_traceback(code_of):
    """A bug keeps its traceback."""
    with pytest.raises(ZeroDivisionError):
        code_of(lambda: 1 / 0)


@pytest.mark.parametrize("images", ["original", "augmented"])
def test_named_cnn(monkeypatch, images):
    """The argument says on which images the CNN is trained."""
    monkeypatch.setattr(sys, "argv", ["train_cnn.py", images])
    assert named_cnn().images == images


@pytest.mark.parametrize(
    ("given", "shown"),
    [([], "nothing"), (["both"], "both"), (["original", "augmented"], "original augmented")],
)
def test_wrong_argument(monkeypatch, given, shown):
    """Any other argument is named in the error."""
    monkeypatch.setattr(sys, "argv", ["train_cnn.py", *given])
    with pytest.raises(StageError) as raised:
        named_cnn()
    assert str(raised.value) == f"argument is {shown}, expected one of original, augmented"


def test_failed_check():
    """A check that fails ends the start with one line."""

    def check():
        raise StageError("argument is x")

    with pytest.raises(SystemExit) as ended:
        process.start(lambda: None, check)
    assert ended.value.code == "error: argument is x"


@pytest.fixture
def calls(monkeypatch):
    """The calls of the C library and of os.kill."""
    made = []

    class Library:
        def __init__(self, name):
            assert name is None  # this process's own

        def prctl(self, *arguments):
            made.append(("prctl", *arguments))

        def mallopt(self, *arguments):
            made.append(("mallopt", *arguments))

    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(process.os, "kill", lambda *arguments: made.append(("kill", *arguments)))
    return made


def test_die_with_parent(calls, monkeypatch):
    """Linux is asked to kill the process when its parent dies."""
    monkeypatch.setattr(process.os, "getsid", lambda pid: 5)
    process.die_with_parent()
    assert calls == [("prctl", 1, signal.SIGKILL)]  # 1 is PR_SET_PDEATHSIG


def test_parent_already_dead(calls, monkeypatch):
    """A process whose parent has already died kills itself."""
    monkeypatch.setattr(process.os, "getppid", lambda: 1)
    monkeypatch.setattr(process.os, "getsid", lambda pid: {1: 1, 0: 5}[pid])
    process.die_with_parent()
    assert calls[1:] == [("kill", os.getpid(), signal.SIGKILL)]


def test_other_platforms(calls, monkeypatch):
    """On other platforms, nothing is asked of the system."""
    monkeypatch.setattr(sys, "platform", "darwin")
    process.die_with_parent()
    prepare_torch("cpu", threads=1, fixed_order=False)
    assert calls == []


def test_process_ends_with_parent():
    """A process ends when its parent does."""
    child = (
        "from fashion_cnn.project.process import die_with_parent; import time\n"
        "die_with_parent(); print('ready', flush=True); time.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "os._exit(0)"
    )
    command = [sys.executable, "-c", parent]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(timeout=20)


def test_freed_memory_is_kept(calls):
    """Freed memory is kept instead of being returned to the system."""
    prepare_torch("cpu", threads=1, fixed_order=False)
    assert calls == [("mallopt", -3, 1 << 30), ("mallopt", -1, 1 << 30)]  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def test_no_mallopt(monkeypatch):
    """A C library without mallopt is left alone."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert prepare_torch("cpu", threads=1, fixed_order=False).type == "cpu"


@pytest.mark.parametrize(("device", "cuda"), [("cpu", False), ("cpu", True), ("auto", True), ("cuda", True)])
def test_deterministic_torch(monkeypatch, device, cuda):
    """Torch is set up so that its results are repeatable."""
    asked = []
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("FASHION_CNN_THREADS", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch, "set_deterministic_debug_mode", asked.append)
    found = prepare_torch(device).type
    assert found == ("cpu" if device == "cpu" else "cuda")
    assert asked == ["warn" if found == "cuda" else "error"]
    assert torch.utils.deterministic.fill_uninitialized_memory is False
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("threads", "fixed_order"), [(None, True), (None, False), (3, True), (1, False)])
def test_torch_threads(monkeypatch, threads, fixed_order):
    """Torch uses the number of threads it is given, or else all cores up to 16."""
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(device, "usable_threads", {16: 11}.get)
    monkeypatch.setattr(device, "_make_portable", lambda *given: taken.append(given))
    prepare_torch("cpu", threads, fixed_order)
    assert taken == [threads or 11, ("cpu", fixed_order, torch)]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs an affinity, which Linux has")
def test_usable_cores(monkeypatch):
    """Only the cores that this process may use are counted."""
    monkeypatch.delenv("FASHION_CNN_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert usable_threads() == 1


def test_cuda_without_device(monkeypatch):
    """If there is no CUDA device, the error says what to choose instead."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StageError) as raised:
        prepare_torch("cuda")
    assert str(raised.value) == "device is cuda, but torch finds no CUDA device here; expected auto or cpu"
    assert prepare_torch("auto").type == "cpu"


@pytest.mark.parametrize(("set_to", "most", "found"), [("", None, 5), ("", 4, 4), ("", 9, 5), ("7", 4, 7)])
def test_usable_threads(monkeypatch, set_to, most, found):
    """There are as many threads as cores unless the user asks for another number.

    Cores are the physical ones that affinity and cgroup allow, as joblib counts them.
    """
    monkeypatch.setattr("joblib.cpu_count", lambda only_physical_cores: 5 if only_physical_cores else 10)
    monkeypatch.setenv("FASHION_CNN_THREADS", set_to)
    assert usable_threads(most) == found


@pytest.mark.parametrize("wrong", ["0", "two", "-1", "1.5", " 2", "²"])
def test_wrong_threads(monkeypatch, wrong):
    """A wrong number of threads gives an error of one line."""
    monkeypatch.setenv("FASHION_CNN_THREADS", wrong)
    with pytest.raises(StageError) as raised:
        usable_threads()
    assert str(raised.value) == f"FASHION_CNN_THREADS is {wrong}, expected a whole number of 1 or more"


def test_why_not_portable(monkeypatch):
    """The reason why results differ from those of other machines is given for each device."""
    for cuda, avx2, reasons in (
        (False, True, {"auto": None, "cpu": None, "cuda": GPU}),
        (True, True, {"auto": GPU, "cpu": None, "cuda": GPU}),
        (False, False, {"auto": NO_AVX2, "cpu": NO_AVX2, "cuda": GPU}),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda avx2=avx2: avx2)
        monkeypatch.setattr(device.platform, "machine", lambda: "arm64")
        assert {name: device.why_not_portable(name) for name in reasons} == reasons
        assert device.why_not_portable() == reasons["auto"]


GPU = "the order of sums is fixed on CPUs, and this is a GPU"
NO_AVX2 = "the order of sums is fixed with AVX2, and this CPU (arm64) has none"


def test_unportable_machine(monkeypatch, capsys):
    """A machine whose results are not portable is reported and left as it is."""
    monkeypatch.setattr(device, "why_not_portable", {"cpu": "it is odd"}.get)
    monkeypatch.setattr(os, "environ", {})
    device._make_portable("cpu", True, torch)
    assert (
        capsys.readouterr().out
        == "the last digits of results differ from those of other machines: it is odd\n"
    )
    assert os.environ == {}


def test_portable_machine(monkeypatch, capsys):
    """A machine whose results are portable is limited to AVX2."""
    monkeypatch.setattr(device, "why_not_portable", lambda device: None)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr("fashion_cnn.models.fixed_order.use_fixed_order", lambda: asked.append("fixed order"))
    asked: list[str] = []
    wanted = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"}
    device._make_portable("cpu", True, torch)
    assert (os.environ, asked) == (wanted, ["fixed order"])
    device._make_portable("cpu", False, torch)  # oneDNN's own order, on one thread
    assert (os.environ, asked) == (wanted | {"ONEDNN_MAX_CPU_ISA": "AVX2"}, ["fixed order"])
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with pytest.raises(RuntimeError, match=r"it uses AVX512, expected AVX2"):
        device._make_portable("cpu", True, torch)


def test_environment():
    """The environment is set before torch computes.

    This runs in a process of its own, with user settings that must have no effect.
    """
    code = (
        "import os, sys; from fashion_cnn.project.process import start; start()\n"
        "assert 'torch' not in sys.modules\n"
        "from fashion_cnn.models.device import prepare_torch; prepare_torch('cpu')\n"
        "import psutil, torch\n"
        "tensor = torch.ones(100, 1 << 20); full = psutil.Process().memory_info().rss\n"
        "del tensor; kept = psutil.Process().memory_info().rss\n"
        "print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'),\n"
        "      os.environ.get('OMP_NUM_THREADS'), torch.get_num_threads(), kept / full > 0.9)"
    )
    of_the_user = {
        "FASHION_CNN_THREADS": "2",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "ACTIVE",
    }
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | of_the_user,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    assert printed.split() == ["PASSIVE", "2000", "None", "2", "True"]


def test_jupyter_backend():
    """A Matplotlib backend set by Jupyter does not prevent the figures."""
    code = "from fashion_cnn.project.process import start; start(); import fashion_cnn.lesson.figures"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"MPLBACKEND": "none-such"}, check=True)
