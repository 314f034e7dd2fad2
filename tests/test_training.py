"""Training on a few images: what an epoch sees, what it reports, and that it repeats itself."""

import numpy as np
import pytest
import torch

from lib.errors import StageError
from lib.models import build_cnn, fresh
from lib.runtime import prepare_torch
from lib.training import train_cnn

CPU = torch.device("cpu")
LABELS = np.arange(16, dtype=np.uint8) % 4
TRAIN, VAL = np.arange(12), np.arange(12, 16)


def train(pool, **changes):
    settings = {"epochs": 2, "batch_size": 5, "learning_rate": 0.001, "seed": 0, "device": CPU} | changes
    model = fresh(build_cnn, 0)
    heard = []
    rows = train_cnn(
        model, pool, LABELS, TRAIN, VAL, **settings, on_epoch=lambda row, speed: heard.append((row, speed))
    )
    assert [row for row, _ in heard] == rows
    return model, rows


def test_it_learns_twelve_images_by_heart(images):
    _, rows = train(images[None], epochs=30)
    assert rows[-1]["train_accuracy"] == 1
    assert rows[-1]["train_loss"] < 0.5 < rows[0]["train_loss"]
    assert [row["epoch"] for row in rows] == list(range(1, 31))


def test_the_same_seed_gives_the_same_weights_and_another_does_not(images):
    first, second, other = (train(images[None], seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first[9].weight, second[9].weight)
    assert not torch.equal(first[9].weight, other[9].weight)


def test_an_epoch_takes_every_train_image_once_and_no_other(images, monkeypatch):
    seen = []
    watched = fresh(build_cnn, 0)
    watched.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone()) if module.training else None
    )
    train_cnn(
        watched, images[None], LABELS, TRAIN, VAL,
        epochs=1, batch_size=5, learning_rate=0.001, seed=0, device=CPU, on_epoch=lambda *_: None,
    )  # fmt: skip
    assert [len(batch) for batch in seen] == [5, 5, 2]
    given = (torch.cat(seen)[:, 0] * 255).round().to(torch.uint8).numpy()
    assert sorted(image.tobytes() for image in given) == sorted(image.tobytes() for image in images[TRAIN])


def test_variants_are_drawn_uniformly_for_training_and_never_for_validation():
    # Variant v of every image is filled with v, so a batch tells which variants it drew.
    pool = np.stack([np.full((16, 28, 28), variant, np.uint8) for variant in range(4)])
    drawn, validated = [], []

    def watch(module, args):
        values = (args[0][:, 0, 0, 0] * 255).round().int().tolist()
        (drawn if module.training else validated).extend(values)

    model = fresh(build_cnn, 0)
    model.register_forward_pre_hook(watch)
    train_cnn(
        model, pool, LABELS, TRAIN, VAL,
        epochs=100, batch_size=12, learning_rate=0.001, seed=0, device=CPU, on_epoch=lambda *_: None,
    )  # fmt: skip
    assert set(validated) == {0}
    counts = np.bincount(drawn)
    # 1,200 draws: 300 expected of each; five standard deviations are 75.
    assert counts.sum() == 1200
    assert (abs(counts - 300) < 75).all()


def test_device_and_threads_are_what_was_asked_for():
    assert prepare_torch("cpu", threads=1).type == "cpu"
    assert torch.get_num_threads() == 1
    assert prepare_torch("auto", threads=2).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_says_what_to_do():
    with pytest.raises(StageError, match=r"device is cuda, but .* expected auto or cpu"):
        prepare_torch("cuda", threads=1)
