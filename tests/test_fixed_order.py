"""Float32 sums have the same bytes for any number of threads, any settings, and every CPU with AVX2.

The emulator is qemu in user mode (package qemu-user in Debian and Ubuntu); without it, two tests are skipped.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fingerprint as made
from fashion_cnn.models import fixed_order
from fashion_cnn.project.errors import StageError
from pipeline import environment
from project import ROOT

QEMU = shutil.which("qemu-x86_64")
CPU = Path("/proc/cpuinfo").read_text()
# A CPU of the other vendor, because libraries choose their code by vendor, too.
OTHER = "Haswell-noTSX" if "AuthenticAMD" in CPU else "EPYC"
CAPS = ["AVX2", *(["AVX512_CORE"] if "avx512f" in CPU else []), "ALL"]
THREADS = "1,2,3,16"
EMULATED = ("few:2", "lesson_step", "options_step")  # small, because an emulator is slow
KINDS = {"toy", "convolution", "linear", "product", "lesson", "options"}  # kinds of what is compared there
# In qemu 7.2, the AVX2 gather instructions that torch uses to move images end in a segmentation fault.
SMALL = (*EMULATED, "by_hand", "augmentation", "moves")
UNIT = 2.0**-24  # the largest relative error of one rounding to float32

needs_qemu = pytest.mark.skipif(
    not QEMU or os.uname().machine != "x86_64", reason="needs qemu-x86_64: apt-get install qemu-user"
)
needs_avx2 = pytest.mark.skipif("avx2" not in CPU, reason="needs a CPU with AVX2")


def fingerprint(
    *parts: str, cap: str = "ALL", threads: str = "own", before: tuple[str, ...] = (), **more: str
) -> dict:
    """What the helper prints when `before` starts it, with `more` in its environment."""
    command = [*before, sys.executable, str(ROOT / "tests/helpers/fingerprint.py"), cap, threads, *parts]
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


def differing(*parts: str) -> list[tuple[str, str, str]]:
    """(cap, threads, name) of every digest that differs from that of AVX2 and one thread."""
    found = {cap: fingerprint(*parts, cap=cap, threads=THREADS)["digests"] for cap in CAPS}
    wanted = found["AVX2"]["1"]
    return [
        (cap, threads, name)
        for cap, digests in found.items()
        for threads, values in digests.items()
        for name in wanted
        if values[name] != wanted[name]
    ]


@needs_avx2
@pytest.mark.slow
def test_neither_threads_nor_isa_operation():
    """Neither threads nor instructions change a byte of an operation.

    The bytes are those of outputs and gradients, for usual, last and large batches.
    """
    assert differing("operations:32,24,7,500") == []


@needs_avx2
@pytest.mark.slow
@pytest.mark.parametrize("training", ["lesson", "options"])
def test_neither_threads_nor_isa_training(training):
    """Neither threads nor instructions change a byte of a training.

    The bytes are those of layers, gradients, the weights after 1 and 20 steps, and logits.
    """
    assert differing(training) == []


@pytest.fixture(scope="module")
def here() -> dict:
    return fingerprint(*SMALL)


@pytest.fixture(scope="module")
def toy() -> dict:
    return fingerprint("toy")


@needs_avx2
@pytest.mark.slow
@pytest.mark.parametrize("cap", CAPS[:-1])
def test_instructions_move_no_toy_byte(toy, cap):
    """Instructions do not change a byte of the toy.

    The toy uses one thread, and oneDNN's own order with AVX2.
    """
    assert fingerprint("toy", cap=cap) == toy


@needs_avx2
@pytest.mark.slow
def test_aten_uses_avx2(here):
    """ATen uses AVX2 even if the CPU has more."""
    assert here["instructions"] == "AVX2"


@needs_avx2
@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "threads"),
    [
        (
            {
                "OMP_THREAD_LIMIT": "1",
                "OMP_DYNAMIC": "TRUE",
                "OMP_NUM_THREADS": "7",
                "OMP_MAX_ACTIVE_LEVELS": "0",
                "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
                "MKL_NUM_THREADS": "1",
                "MKL_DYNAMIC": "TRUE",
                "FASHION_CNN_THREADS": "2",
            },
            2,
        ),
        (
            {
                "ATEN_CPU_CAPABILITY": "default",
                "ONEDNN_MAX_CPU_ISA": "SSE41",
                "MKL_CBWR": "SSE4_2",
                "FASHION_CNN_THREADS": "1",
            },
            1,
        ),
        ({"FASHION_CNN_THREADS": "3"}, 3),
    ],
    ids=["libraries", "instructions", "threads"],
)
def test_environment_settings(here, settings, threads):
    """No setting in the environment changes a byte.

    Only FASHION_CNN_THREADS sets the number of threads.
    """
    assert fingerprint(*SMALL, **settings) == here | {"threads": threads}


@needs_avx2
@pytest.mark.slow
def test_one_core_same_bytes(here):
    """A process that is limited to one core uses one thread and gives the same bytes."""
    assert fingerprint(*SMALL, before=("taskset", "-c", "0")) == here | {"threads": 1}


@needs_qemu
@pytest.mark.slow
def test_emulated_cpu_same_bytes(here, toy):
    """An emulated CPU of another vendor gives the same bytes.

    They are those of the toy, operations with their gradients, and a step of each CNN.
    """
    before = (QEMU, "-cpu", OTHER)
    found = fingerprint("toy", *EMULATED, cap="EMULATED", before=before, FASHION_CNN_THREADS="2")
    emulated = found["digests"]["own"]
    wanted = here["digests"]["own"] | toy["digests"]["own"]
    assert emulated == {name: wanted[name] for name in emulated}
    assert {name.split()[0].strip(",") for name in emulated} == KINDS


@needs_qemu
@pytest.mark.slow
def test_cpu_without_avx2():
    """A line names a CPU without AVX2, which still computes."""
    code = (
        "import fingerprint as made; made.leave_out_compiler(); made.prepare_torch('cpu');"
        "print(made.torch.ones(64).exp().sum().item())"
    )
    done = subprocess.run(
        [QEMU, "-cpu", "Nehalem", sys.executable, "-c", code],
        cwd=ROOT / "tests/helpers",
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line, computed = done.stdout.splitlines()
    assert line.endswith("the order of sums is fixed with AVX2, and this CPU (x86_64) has none")
    assert float(computed) == pytest.approx(64 * 2.718282)


def chain(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product of `a` (M, K) and `b` (K, N), as K fused multiply-adds for each number, in order.

    NumPy's longdouble holds the product of two float32 numbers exactly, so each sum is rounded once, to
    float32. (It is rounded to longdouble first, which changes one sum in 10^12.)
    """
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for column, row in zip(a.T, b, strict=True):
        exact = column[:, None].astype(np.longdouble) * row.astype(np.longdouble)
        total = (exact + total).astype(np.float32)
    return total


def windows(images: np.ndarray, height: int, width: int, down: int, right: int) -> np.ndarray:
    """Each output's input patch in a convolution, by row, column and channel: (N·H·W, height·width·C)."""
    padded = np.pad(images, ((0, 0), (0, 0), (down, down), (right, right)))
    met = np.lib.stride_tricks.sliding_window_view(padded, (height, width), (2, 3))
    return met.transpose(0, 2, 3, 4, 5, 1).reshape(-1, height * width * images.shape[1])


def flat(images: np.ndarray) -> np.ndarray:
    """(N, C, H, W) as (N·H·W, C)."""
    return images.transpose(0, 2, 3, 1).reshape(-1, images.shape[1])


def kernels(weight: np.ndarray) -> np.ndarray:
    """(O, C, height, width) as (height·width·C, O)."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """The values of `made.numbers` as an array."""
    return made.numbers(*shape, seed=seed).numpy()


# Channels, outputs, height and width of the kernel, padding down and right.
LAYERS = [
    (1, 64, 3, 3, 0, 0),
    (64, 128, 3, 3, 0, 0),
    (1, 32, 3, 3, 0, 0),
    (32, 32, 3, 3, 1, 1),
    (128, 128, 3, 3, 1, 1),
    (48, 40, 1, 1, 0, 0),
    (16, 24, 1, 3, 0, 2),
    (80, 16, 3, 1, 2, 0),
    (3, 6, 3, 3, 0, 0),
    (24, 20, 3, 3, 1, 1),
    (7, 5, 3, 2, 2, 1),
    (9, 33, 2, 3, 1, 2),
]
each_layer = pytest.mark.parametrize(("channels", "outputs", "height", "width", "down", "right"), LAYERS)


@needs_avx2
@each_layer
def test_convolution_order(channels, outputs, height, width, down, right):
    """A convolution is a chain by row, column and channel, and its bias is added last."""
    images, weight = drawn(2, channels, 6, 7), drawn(outputs, channels, height, width, seed=1)
    bias = drawn(outputs, seed=2)
    found = F.conv2d(*map(torch.from_numpy, (images, weight, bias)), padding=(down, right)).numpy()
    assert (flat(found) == chain(windows(images, height, width, down, right), kernels(weight)) + bias).all()


@needs_avx2
@each_layer
def test_convolution_gradients_order(channels, outputs, height, width, down, right):
    """A convolution's gradients are chains.

    By images: one with the flipped kernel, by row, column, output; by weights: by image, row, column.
    """
    images, weight = made.numbers(2, channels, 6, 7), made.numbers(outputs, channels, height, width, seed=1)
    given = images.clone().requires_grad_(), weight.clone().requires_grad_()
    found = F.conv2d(*given, padding=(down, right))
    upstream = made.numbers(*found.shape, seed=9)
    by_images, by_weight = torch.autograd.grad(found, given, upstream)
    met = windows(upstream.numpy(), height, width, height - 1 - down, width - 1 - right)
    turned = weight.numpy()[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
    assert (flat(by_images.numpy()) == chain(met, kernels(turned))).all()
    by_pixels = windows(images.numpy(), height, width, down, right)
    assert (chain(flat(upstream.numpy()).T, by_pixels) == kernels(by_weight.numpy()).T).all()


@needs_avx2
@pytest.mark.parametrize(
    ("terms", "chains"), [(1, 1), (3, 1), (320, 1), (321, 3), (509, 2), (1000, 4), (2047, 7)]
)
@pytest.mark.parametrize(("rows", "columns"), [(9, 32), (1, 45), (45, 1), (1, 1)])
def test_product_order(terms, chains, rows, columns):
    """A product consists of chains of at most 320 terms.

    The chains are equally long, zero-padded at the end if the terms do not divide, and added in order.
    """
    a, b = drawn(rows, terms), drawn(terms, columns, seed=1)
    more = -terms % chains
    parts = zip(
        np.split(np.pad(a, ((0, 0), (0, more))), chains, 1),
        np.split(np.pad(b, ((0, more), (0, 0))), chains, 0),
        strict=True,
    )
    total = np.zeros((rows, columns), np.float32)
    for part in parts:
        total += chain(*part)
    assert ((torch.from_numpy(a) @ torch.from_numpy(b)).numpy() == total).all()


def test_empty_product():
    """A product of no terms is zero."""
    assert (torch.ones(2, 0) @ torch.ones(0, 3)).tolist() == [[0] * 3] * 2
    assert (torch.ones(0, 2) @ torch.ones(2, 3)).shape == (0, 3)


@needs_avx2
def test_logits_independent_of_batch():
    """The logits of an image are the same in any batch."""
    images = made.numbers(40, 1, 28, 28)
    for model in ("lesson", "residual"):
        cnn = made.fresh(partial(made.build_cnn, model), 0).eval()
        assert torch.equal(cnn(images), torch.cat([cnn(image[None]) for image in images]))


def test_batch_norm_without_image_gradients():
    """Batch norm has gradients even if its images do not need them."""
    scale, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    F.batch_norm(torch.ones(2, 3, 4, 4), None, None, scale, bias, training=True).sum().backward()
    assert (scale.grad.tolist(), bias.grad.tolist()) == ([0] * 3, [32] * 3)


def test_convolution_of_ones():
    """A convolution of ones with ones counts the pixels below the kernel."""
    found = F.conv2d(torch.ones(1, 1, 5, 5), torch.ones(1, 1, 3, 3), padding=1)
    edge, inside = [4, 6, 6, 6, 4], [6, 9, 9, 9, 6]
    assert found[0, 0].tolist() == [edge, inside, inside, inside, edge]


def test_product_by_hand():
    """Products of two 2×2 matrices agree with a computation by hand."""
    a, b = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[5.0, 6], [7, 8]])
    assert (a @ b).tolist() == [[19, 22], [43, 50]]
    assert (a.T @ b).tolist() == [[26, 30], [38, 44]]


def test_weight_gradient_of_one_pixel():
    """The gradient by the weights of one output pixel is the input that they met, here times 2."""
    images, weight = torch.arange(9.0).view(1, 1, 3, 3), torch.ones(1, 1, 3, 3, requires_grad=True)
    (2 * F.conv2d(images, weight)).sum().backward()
    assert weight.grad[0, 0].tolist() == [[0, 2, 4], [6, 8, 10], [12, 14, 16]]


def sizes(value: torch.Tensor) -> torch.Tensor:
    return value.double().abs()


def ones(value: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(value, dtype=torch.float64)


@pytest.mark.parametrize("name", [*made.CONVOLUTIONS, *made.LINEAR, *made.PRODUCTS])
def test_sums_exactness(name):
    """Sums are as exact as float32 can be.

    A term is rounded once for each later term of its chain, and once for each later chain.

    So the error is at most UNIT times these roundings times the sum of the terms' absolute values. Absolute
    values as arguments give that sum, ones the number of terms, and torch's own float64 the exact values.
    """
    batch = 2
    found, exact = made.computed(name, batch), made.computed(name, batch, torch.Tensor.double)
    bounds, terms = made.computed(name, batch, sizes), made.computed(name, batch, ones)
    for part, value in found.items():
        long = name not in made.CONVOLUTIONS or part not in ("outputs", "gradient 0")
        roundings = terms[part]
        if long:  # at most 320 terms a chain; at most twice the chains needed, plus one for each image
            roundings = roundings.minimum(320 + 2 * (terms[part] / 320).ceil() + batch)
        error = (value.double() - exact[part]).abs()
        assert value.dtype == torch.float32
        assert (error <= UNIT * (1 + roundings) * bounds[part]).all(), part


def test_pooling_is_exact():
    found, exact = (made.computed("pooling", 2, kind) for kind in (torch.clone, torch.Tensor.double))
    assert all(torch.equal(found[part].double(), exact[part]) for part in exact)


@pytest.mark.parametrize("name", ["batch norm of 32", "batch norm of 64", "batch norm of 128"])
def test_batch_norm_exactness(name):
    """Batch norm is as exact as float32 can be.

    The numbers here and their statistics are below 1, and the scale is at most 2 (1 / 0.29).

    Sums are in float64, so only a few roundings remain, except in the gradients by weights and biases.
    """
    found, exact = (made.computed(name, 8, kind) for kind in (torch.clone, torch.Tensor.double))
    for part in ("outputs", "more 0", "more 1", "gradient 0"):
        assert (found[part].double() - exact[part]).abs().max() < 16 * UNIT * 3.5, part
    for part in ("gradient 1", "gradient 2"):
        assert found[part].double() == pytest.approx(exact[part], abs=1e-3), part


def test_cross_entropy_exactness():
    """Cross-entropy is as exact as float32 can be.

    The loss is near log 10, and each gradient is at most 1 / 60,000.
    """
    found, exact = (made.computed("cross entropy", 0, kind) for kind in (torch.clone, torch.Tensor.double))
    assert found["outputs"].item() == pytest.approx(exact["outputs"].item(), abs=16 * UNIT * math.log(10))
    error = (found["gradient 0"].double() - exact["gradient 0"]).abs().max()
    assert error <= 16 * UNIT * 0.5 / made.ROWS


@pytest.mark.parametrize("name", ["orthogonal 64×9", "orthogonal 128×1152"])
def test_orthogonal_exactness(name):
    """Orthogonalization is as exact as float32 can be.

    Each of five steps amplifies an error up to 3.4445 times; there are 16 products of numbers up to 1.
    """
    found, exact = (made.computed(name, 0, kind) for kind in (torch.clone, torch.Tensor.double))
    error = (found["outputs"].double() - exact["outputs"]).abs().max()
    assert error < 16 * UNIT * 3.4445**5


PLAIN = "an empty, strided, dilated, transposed, grouped or not 2-D convolution", "a plain one"
LARGE = "a convolution with weights {}", "at most [128, 128, 3, 3]"
WIDE = "padding {}", "less than the kernel, {}"
NAMED = "{}", "mm, bmm or a linear layer"
FACTORS = "addmm with beta {}", "1 and 1"
IMAGES, SQUARE, ROW = (1, 16, 8, 8), (4, 4), (4,)
# A function, the shapes of its arguments (all ones), what its error line says and expects, what fills the
# braces of both, and the numbers that it gives in float64.
REFUSED = {
    "stride 2": (partial(F.conv2d, stride=2), [IMAGES, (16, 16, 3, 3)], PLAIN, [], {144}),
    "dilation 2": (partial(F.conv2d, dilation=2), [IMAGES, (16, 16, 3, 3)], PLAIN, [], {144}),
    "groups 2": (partial(F.conv2d, groups=2), [IMAGES, (16, 8, 3, 3)], PLAIN, [], {72}),
    "transposed": (F.conv_transpose2d, [IMAGES, (16, 16, 1, 1)], PLAIN, [], {16}),
    "one dimension": (F.conv1d, [(1, 16, 8), (2, 16, 3)], PLAIN, [], {48}),
    "144 channels": (F.conv2d, [(1, 144, 8, 8), (16, 144, 1, 1)], LARGE, ["[16, 144, 1, 1]"], {144}),
    "144 outputs": (F.conv2d, [IMAGES, (144, 16, 1, 1)], LARGE, ["[144, 16, 1, 1]"], {16}),
    "a kernel of 5×5": (F.conv2d, [IMAGES, (16, 16, 5, 5)], LARGE, ["[16, 16, 5, 5]"], {400}),
    "padding by 1 of 1": (
        partial(F.conv2d, padding=1), [IMAGES, (16, 16, 1, 1)], WIDE, ["[1, 1]", "[1, 1]"], {0, 16},
    ),
    "mv": (torch.mv, [SQUARE, ROW], NAMED, ["mv"], {4}),
    "addmv": (torch.addmv, [ROW, SQUARE, ROW], NAMED, ["addmv"], {5}),
    "dot": (torch.dot, [ROW, ROW], NAMED, ["dot"], {4}),
    "vdot": (torch.vdot, [ROW, ROW], NAMED, ["vdot"], {4}),
    "in place": (lambda *given: given[0].addmm_(*given[1:]), [SQUARE] * 3, NAMED, ["addmm_"], {5}),
    "into a tensor": (
        lambda a, b: torch.mm(a, b, out=torch.empty_like(a)), [SQUARE] * 2, NAMED, ["mm.out"], {4},
    ),
    "no images": (F.conv2d, [(0, 16, 8, 8), (16, 16, 1, 1)], PLAIN, [], set()),
    "baddbmm": (torch.baddbmm, [(2, *SQUARE)] * 3, NAMED, ["baddbmm"], {5}),
    "beta 0.5": (partial(torch.addmm, beta=0.5), [SQUARE] * 3, FACTORS, ["0.5 and alpha 1"], {4.5}),
    "alpha 2": (partial(torch.addmm, alpha=2), [SQUARE] * 3, FACTORS, ["1 and alpha 2"], {9}),
}  # fmt: skip
each_refused = pytest.mark.parametrize("what", REFUSED)


@needs_avx2
@each_refused
def test_refuse_operation_without_order(what):
    """An operation without a fixed order is refused with a one-line error."""
    function, shapes, line, named, _ = REFUSED[what]
    with pytest.raises(StageError) as raised:
        function(*(torch.ones(shape) for shape in shapes))
    wanted = " has no fixed order of sums in fashion_cnn.models.fixed_order, expected ".join(line)
    assert str(raised.value) == wanted.format(*named)


@each_refused
def test_float64_unchanged(what):
    """Operations in float64 are computed as before."""
    function, shapes, *_, found = REFUSED[what]
    assert {*function(*(torch.ones(shape).double() for shape in shapes)).unique().tolist()} == found


@needs_avx2
def test_use_fixed_order_twice(monkeypatch):
    """A second call of `use_fixed_order` changes nothing."""

    def refuse(*_):
        raise AssertionError("registered again")

    before = fixed_order.use_fixed_order()
    monkeypatch.setattr(torch.library, "Library", refuse)
    assert fixed_order.use_fixed_order() is before


@needs_avx2
@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            "torch.ops.mkldnn = types.SimpleNamespace(_convolution_pointwise=1)",
            "'types.SimpleNamespace' object",
        ),
        ("torch.library.get_kernel = fail", "no such kernel"),
        ("del torch.library.get_kernel", "module 'torch.library' has no attribute 'get_kernel'"),
    ],
)
def test_torch_without_operation(change, fault):
    """The error names a torch that lacks an operation, and where the expected one is pinned.

    With such a torch, a stage ends with one line, whatever changed in torch.
    """
    code = (
        "import torch, types\n"
        "from fashion_cnn.models.device import prepare_torch\n"
        "from fashion_cnn.project.process import run_stage\n"
        "def fail(*_): raise RuntimeError('no such kernel\\nand a second line')\n"
        f"{change}\n"
        "run_stage(lambda: prepare_torch('cpu'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    start = f"error: torch {torch.__version__} cannot sum in a fixed order ({fault}"
    assert done.stderr.startswith(start)
    assert done.stderr.endswith("); expected the torch that requirements.lock pins\n")
    assert done.stderr.count("\n") == 1


# Digests of the outputs and gradients of each operation, for two images.
DIGESTS = {
    "convolution 1→64": "e2c64ef71053bdbb",
    "convolution 64→128": "f7cb5135b12dc5d7",
    "convolution 32→32, padded": "4d6d69578f2aefea",
    "linear 3200→256": "534390d575a031ec",
    "product of 2047 terms": "dfbe1f23ebcf3096",
    "products of three": "6a1b9ca49ea26332",
    "batch norm of 32": "99f498a92e9c9148",
    "pooling": "93657f1ff79d4d73",
    "cross entropy": "9b32336d885383d3",
    "orthogonal 64×9": "66139c678ba042db",
}


@needs_avx2
def test_torch_keeps_tested_order():
    """This torch sums in the order of the one that was tested.

    This test is for upgrades of torch.
    """
    found = {name: made.digest(*made.computed(name, 2).values()) for name in DIGESTS}
    assert found == DIGESTS, (
        f"torch {torch.__version__} gives different bytes from 2.14.1. If the other tests here pass, the "
        "order is fixed, but different: run `make repro`, and put these digests here. If they fail, it is "
        "not fixed: keep the older torch, or change fashion_cnn/models/fixed_order.py."
    )
