"""Print digests of what operations and trainings compute: equal for any threads, on every CPU with AVX2.

Usage: python tests/helpers/fingerprint.py CAP THREADS PART …

CAP limits oneDNN's instruction set: AVX2, AVX512_CORE, ALL, or EMULATED, which is ALL without what is slow
in an emulator. oneDNN reads it once, so each cap needs its own process. THREADS are numbers such as 1,2,16
(everything is computed for each), or `own`: what prepare_torch has set. A PART is one of PARTS, or
`operations:BATCHES`, such as operations:32,24, or `few:BATCHES`. The part toy, if given, comes first, and
limits oneDNN to AVX2 for the rest.

Prints {"instructions": …, "threads": …, "digests": {THREADS: {NAME: DIGEST}}}. Inputs come from NumPy's
generator.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import yaml

from fashion_cnn.models.device import prepare_torch
from fashion_cnn.project.process import start

start()


def leave_out_compiler() -> None:
    """Stub torch.compile, which optimizers import but nothing here needs: half a minute in an emulator."""
    sys.modules["torch._dynamo"] = MagicMock()
    sys.modules["torch._dynamo"].disable = lambda function, *_, **__: function


if __name__ == "__main__":
    CAP, THREADS, *ASKED = sys.argv[1:]
    if CAP == "EMULATED":
        leave_out_compiler()
    elif CAP != "ALL":
        os.environ["ONEDNN_MAX_CPU_ISA"] = CAP  # after start(), which removes the user's setting
    prepare_torch("cpu", **dict(threads=1, fixed_order=False) if "toy" in ASKED else {})

import numpy as np
import torch
from torch.nn import functional as F

from fashion_cnn.lesson.toy import outputs, train_toy
from fashion_cnn.models.cnns import build_cnn, build_toy_cnn, fresh, to_input
from fashion_cnn.models.inference import loss_and_accuracy, predict, to_device
from fashion_cnn.training.loop import TrainStep
from fashion_cnn.training.optimizer import build_optimizer, orthogonal

RNG = np.random.default_rng(0)
# Smooth images, because noise would hide an interpolation that differs.
COARSE = RNG.integers(0, 256, (40, 7, 7), np.uint8)
IMAGES = np.repeat(np.repeat(COARSE, 4, 1), 4, 2)  # (40, 28, 28)
LABELS = RNG.integers(0, 10, 40).astype(np.uint8)
TOY_IMAGES = RNG.integers(-8, 9, (2, 1, 4, 4)).astype(np.float32) / 8
TOY_LABELS = np.array([0, 1], np.float32)
ROWS = 60_000  # of Fashion-MNIST, the largest batch
TARGETS = torch.from_numpy(RNG.integers(0, 10, ROWS))
LESSON = yaml.safe_load(Path(__file__).with_name("params.yaml").read_text())["train_cnn"]
CPU = torch.device("cpu")
STEPS = 20


def digest(*values) -> str:
    """SHA-256 of arrays' or tensors' bytes in their logical order, shortened."""
    hasher = hashlib.sha256()
    for value in values:
        array = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        hasher.update(np.ascontiguousarray(array))
    return hasher.hexdigest()[:16]


@cache
def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers from -1/2 to 1/2, the same in every process; 4-D tensors are in channels_last."""
    drawn = torch.from_numpy(np.random.default_rng(seed).random(shape, np.float32)) - 0.5
    return drawn.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else drawn


def norm(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Batch norm in training: the outputs, and the running mean and variance."""
    mean, variance = torch.zeros_like(weight), torch.ones_like(weight)
    return F.batch_norm(images, mean, variance, weight, bias, training=True), mean, variance


def padded(images, weight):
    return F.conv2d(images, weight, padding=1)


def by_rows(a, b):
    """The product of transposed factors, which are stored column by column."""
    return a.T @ b.T


N = -1  # stands for the number of images
# Names, functions, and the shapes of their arguments.
CONVOLUTIONS = {
    "convolution 1→64": (F.conv2d, (N, 1, 28, 28), (64, 1, 3, 3), (64,)),
    "convolution 64→128": (F.conv2d, (N, 64, 13, 13), (128, 64, 3, 3), (128,)),
    "convolution 1→32": (F.conv2d, (N, 1, 28, 28), (32, 1, 3, 3)),
    "convolution 32→32, padded": (padded, (N, 32, 13, 13), (32, 32, 3, 3)),
    "convolution 32→64": (F.conv2d, (N, 32, 13, 13), (64, 32, 3, 3)),
    "convolution 64→64, padded": (padded, (N, 64, 5, 5), (64, 64, 3, 3)),
    "convolution 64→128, padded": (padded, (N, 64, 5, 5), (128, 64, 3, 3)),
    "convolution 128→128, padded": (padded, (N, 128, 2, 2), (128, 128, 3, 3)),
    "convolution of pixels, 48→40": (F.conv2d, (N, 48, 6, 7), (40, 48, 1, 1), (40,)),
    "convolution of rows, 16→24": (partial(F.conv2d, padding=(0, 2)), (N, 16, 6, 7), (24, 16, 1, 3)),
    "convolution of columns, 80→16": (partial(F.conv2d, padding=(2, 0)), (N, 80, 6, 7), (16, 80, 3, 1)),
    "convolution 24→100, padded by 2": (partial(F.conv2d, padding=2), (N, 24, 7, 6), (100, 24, 3, 3), (100,)),
    "convolution 3→9": (F.conv2d, (N, 3, 12, 11), (9, 3, 3, 3), (9,)),
    "convolution 5→1": (F.conv2d, (N, 5, 12, 11), (1, 5, 3, 3), (1,)),
    "convolution 8→2 by 2×2": (partial(F.conv2d, padding=1), (N, 8, 5, 6), (2, 8, 2, 2)),
}
LINEAR = {
    "linear 3200→256": (F.linear, (N, 3200), (256, 3200), (256,)),
    "linear 256→10": (F.linear, (N, 256), (10, 256), (10,)),
    "linear 128→10": (F.linear, (N, 128), (10, 128), (10,)),
    "linear without bias, of three dimensions": (F.linear, (N, 3, 50), (7, 50)),
}
LENGTHS = (1, 3, 320, 321, 509, 1000, 2047, 21_632)
PRODUCTS = {f"product of {k} terms": (torch.matmul, (37, k), (k, 45)) for k in LENGTHS}
PRODUCTS |= {f"product of {k} terms, transposed": (by_rows, (k, 37), (45, k)) for k in LENGTHS}
PRODUCTS |= {
    "product of a row and a column": (torch.matmul, (1, 3000), (3000, 1)),
    "products of three": (torch.bmm, (3, 20, 330), (3, 330, 17)),
}
OTHERS = {
    "batch norm of 32": (norm, (N, 32, 13, 13), (32,), (32,)),
    "batch norm of 64": (norm, (N, 64, 5, 5), (64,), (64,)),
    "batch norm of 128": (norm, (N, 128, 2, 2), (128,), (128,)),
    "pooling": (lambda images: F.max_pool2d(images.relu(), 2), (N, 64, 26, 26)),  # with ties
    "cross entropy": (lambda logits: F.cross_entropy(logits, TARGETS), (ROWS, 10)),
    "orthogonal 64×9": (torch.no_grad()(orthogonal), (64, 9)),
    "orthogonal 128×1152": (torch.no_grad()(orthogonal), (128, 1152)),
}
OPERATIONS = CONVOLUTIONS | LINEAR | PRODUCTS | OTHERS
FEW = ("convolution 1→64", "convolution 64→128", *LINEAR, "product of 321 terms, transposed")


def computed(name: str, batch: int, kind: Callable = torch.clone) -> dict[str, torch.Tensor]:
    """The outputs of an operation, and the gradients of their sum, weighted by `numbers`, by each argument.

    `kind` converts each argument and these weights, for example to float64 or to ones.
    """
    function, *shapes = OPERATIONS[name]
    filled = [[batch if side == N else side for side in shape] for shape in shapes]
    given = [kind(numbers(*shape, seed=seed)).requires_grad_() for seed, shape in enumerate(filled)]
    found = function(*given)
    found, *more = found if isinstance(found, tuple) else [found]
    values = {"outputs": found, **{f"more {number}": value for number, value in enumerate(more)}}
    if not found.requires_grad:
        return values
    gradients = torch.autograd.grad(found, given, kind(numbers(*found.shape, seed=9)))
    return values | {f"gradient {number}": value for number, value in enumerate(gradients)}


def operations(names, *batches: int) -> dict[str, str]:
    """Digests of what each operation gives for each batch size."""
    found = {}
    for name in names:
        depends = any(N in shape for shape in OPERATIONS[name][1:])
        for batch in batches if depends else batches[:1]:
            values = computed(name, batch)
            title = f"{name}, {batch} images" if depends else name
            found |= {f"{title}, {part}": digest(value) for part, value in values.items()}
    return found


def toy() -> dict[str, str]:
    """The toy's training, and its outputs."""
    model, losses, _ = train_toy(TOY_IMAGES, TOY_LABELS, epochs=100, learning_rate=0.01, seed=0)
    found = {
        "toy weights": digest(*model.state_dict().values()),
        "toy losses": digest(losses),
        "toy outputs": digest(outputs(model, TOY_IMAGES)),
    }
    prepare_torch("cpu")  # for what comes after it
    return found


def by_hand() -> dict[str, str]:
    """The toy's errors by hand, as metrics show them."""
    from fashion_cnn.lesson.by_hand.comparison import compare_layers

    rows = compare_layers(fresh(build_toy_cnn, 0), TOY_IMAGES)
    return {"toy errors by hand": digest([f"{row['error']:.6g}" for row in rows])}


def augmentation() -> dict[str, str]:
    """imgaug's copies."""
    from fashion_cnn.lesson.augmentation import augment

    copies = augment(IMAGES, copies=2, max_shift=4, max_rotation=20.0, seed=0, workers=1)
    return {"augmented copies": digest(*copies)}


def moves() -> dict[str, str]:
    """The moved images of the evaluation."""
    from fashion_cnn.lesson.evaluation import move

    return {transform: digest(move(IMAGES, transform, 3)) for transform in ("rotation", "shift_x")}


def training(name: str, steps: int, batch: int, model: str = "lesson", **options) -> dict[str, str]:
    """Every layer's output, every gradient of the first step, weights, losses and logits."""
    found = {}
    params = SimpleNamespace(**LESSON | options)
    model = to_device(fresh(partial(build_cnn, model, views=6 if params.flips else 1), 0), CPU)
    optimizer = build_optimizer(model, params, CPU)
    step = TrainStep(
        model, optimizer, torch.from_numpy(IMAGES[None]), torch.from_numpy(LABELS).long(), params
    )
    values = to_input(torch.from_numpy(IMAGES[:batch]))
    with torch.inference_mode():
        for number, layer in enumerate(model):
            values = layer(values)
            found[f"layer {number} {type(layer).__name__}"] = digest(values)
    for number in range(steps):
        count = batch if number % 2 == 0 else batch * 3 // 4  # like the last batch of an epoch
        index = (torch.arange(count) + 7 * number) % len(IMAGES)
        moves = [torch.zeros_like(index), index % 2, index % 3 - 1, index % 5 - 2, index % 2 + 1]
        step(torch.stack([index, *moves], dim=1))
        if number == 0:
            for key, parameter in model.named_parameters():
                if parameter.grad is not None:  # Muon drops those of convolutions
                    found[f"gradient of {key}"] = digest(parameter.grad)
            found["weights after a step"] = digest(*model.state_dict().values())
    found[f"weights after {steps} steps"] = digest(*model.state_dict().values())
    found["losses"] = digest(step.losses, step.loss_sum)
    logits = predict(model, IMAGES[: batch + 3], CPU)
    found["logits"] = digest(logits)
    found["loss and accuracy"] = digest(loss_and_accuracy(logits, LABELS[: len(logits)]))
    found["confidences"] = digest(logits.softmax(1))
    return {f"{name}, {title}": value for title, value in found.items()}


ALL_OPTIONS = {
    "model": "residual", "optimizer": "muon", "weight_decay": 0.05, "label_smoothing": 0.1,
    "flips": True, "shift": 2, "prune_easy": 0.5,
}  # fmt: skip
PARTS = {
    "toy": toy,
    "by_hand": by_hand,
    "augmentation": augmentation,
    "moves": moves,
    "lesson": partial(training, "lesson", STEPS, 32),
    "options": partial(training, "options", STEPS, 32, **ALL_OPTIONS),
    "lesson_step": partial(training, "lesson", 1, 4),
    "options_step": partial(training, "options", 1, 4, **ALL_OPTIONS),
    "operations": partial(operations, OPERATIONS),
    "few": partial(operations, FEW),
}


def main() -> None:
    found: dict = {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    found["digests"] = {}
    for threads in THREADS.split(","):
        if threads != "own":
            torch.set_num_threads(int(threads))
        digests = found["digests"][threads] = {}
        for part in ASKED:
            name, _, batches = part.partition(":")
            digests.update(PARTS[name](*[int(batch) for batch in batches.split(",") if batch]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
