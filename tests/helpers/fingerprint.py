"""Print what each part of the pipeline computes, as one digest a part: equal on every CPU with AVX2.

Usage: python tests/helpers/fingerprint.py portable|native PART …; the parts are toy, augmentation, moves,
cnn and options.
Small inputs, made by NumPy's generator.
"""

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "stages"))

import lib  # noqa: F401  (sets the environment before torch is loaded)
from lib.models.device import prepare_torch

NUMERICS, PARTS = sys.argv[1], sys.argv[2:]
DEVICE = prepare_torch("cpu", 2, NUMERICS)

import numpy as np
import torch

from lib.augmentation import augment
from lib.by_hand.comparison import compare_layers
from lib.evaluation import mistakes, move
from lib.inference import loss_and_accuracy, predict, to_device
from lib.models.cnns import build_cnn, fresh, to_input
from lib.params import read_yaml
from lib.toy import outputs, train_toy
from lib.training.loop import TrainStep
from lib.training.optimizer import build_optimizer

RNG = np.random.default_rng(0)
# Smooth images, as noise would hide an interpolation that differs.
COARSE = RNG.integers(0, 256, (40, 7, 7), np.uint8)
IMAGES = np.repeat(np.repeat(COARSE, 4, 1), 4, 2)  # (40, 28, 28)
LABELS = RNG.integers(0, 10, 40).astype(np.uint8)
TOY_IMAGES = RNG.integers(-8, 9, (2, 1, 4, 4)).astype(np.float32) / 8
TOY_LABELS = np.array([0, 1], np.float32)
LESSON = read_yaml(Path(__file__).with_name("params.yaml"))["train_cnn"]


def digest(*values) -> str:
    """SHA-256 of arrays' or tensors' bytes in their logical order, shortened."""
    hasher = hashlib.sha256()
    for value in values:
        array = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        hasher.update(np.ascontiguousarray(array))
    return hasher.hexdigest()[:16]


def toy() -> dict[str, str]:
    """The toy's training, outputs, and its errors by hand, as metrics show them."""
    torch.set_num_threads(1)  # as train_toy_cnn does
    model, losses, _ = train_toy(TOY_IMAGES, TOY_LABELS, epochs=100, learning_rate=0.01, seed=0)
    rows = compare_layers(model, TOY_IMAGES)
    torch.set_num_threads(2)
    return {
        "toy weights": digest(*model.state_dict().values()),
        "toy losses": digest(losses),
        "toy outputs": digest(outputs(model, TOY_IMAGES)),
        "toy errors by hand": digest([f"{row['error']:.6g}" for row in rows]),
    }


def augmentation() -> dict[str, str]:
    """imgaug's copies."""
    copies = augment(IMAGES, copies=2, max_shift=4, max_rotation=20.0, seed=0, workers=1)
    return {"augmented copies": digest(*copies)}


def moves() -> dict[str, str]:
    """The moved images of the evaluation."""
    return {transform: digest(move(IMAGES, transform, 3)) for transform in ("rotation", "shift_x")}


def cnn(model: str = "lesson", **options) -> dict[str, str]:
    """Every layer's output, every gradient of one step, the weights after two, and the logits."""
    found = {}
    params = SimpleNamespace(**LESSON | options)
    model = to_device(fresh(partial(build_cnn, model, views=6 if params.flips else 1), 0), DEVICE)
    optimizer = build_optimizer(model, params, DEVICE)
    step = TrainStep(
        model, optimizer, torch.from_numpy(IMAGES[None]), torch.from_numpy(LABELS).long(), params
    )
    values = to_input(torch.from_numpy(IMAGES[:32]))
    with torch.inference_mode():
        for number, layer in enumerate(model):
            values = layer(values)
            found[f"layer {number} {type(layer).__name__}"] = digest(values)
    for index in (torch.arange(32), torch.arange(16, 40)):  # the last batch of an epoch has 24 images
        moves = [torch.zeros_like(index), index % 2, index % 3 - 1, index % 5 - 2, index % 2 + 1]
        step(torch.stack([index, *moves], dim=1))
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:  # Muon drops those of convolutions
                found[f"gradient of {name}, {len(index)} images"] = digest(parameter.grad)
        found[f"weights after {len(index)} images"] = digest(*model.parameters())
    found["losses"] = digest(step.losses)
    logits = predict(model, IMAGES, DEVICE)
    found["logits"] = digest(logits)
    found["loss and accuracy"] = digest(loss_and_accuracy(logits, LABELS))
    found["mistakes"] = digest([row["confidence"] for row in mistakes(IMAGES, LABELS, logits, 40)])
    return found


def options() -> dict[str, str]:
    """The same with the other model, and all options of the training at once."""
    found = cnn(
        "residual",
        optimizer="muon",
        weight_decay=0.05,
        label_smoothing=0.1,
        flips=True,
        shift=2,
        easy=0.5,
    )
    return {f"options, {name}": value for name, value in found.items()}


if __name__ == "__main__":
    digests = {"instructions": torch.backends.cpu.get_cpu_capability()}
    parts = {"toy": toy, "augmentation": augmentation, "moves": moves, "cnn": cnn, "options": options}
    for part in PARTS:
        digests |= parts[part]()
    print(json.dumps(digests))
