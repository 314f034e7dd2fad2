"""The two models: parameters, shapes, weights on disk; and the toy's training."""

import numpy as np
import pytest
import torch

from lib.errors import StageError
from lib.inference import loss_and_accuracy
from lib.models import (
    CNN_SHAPE,
    TOY_SHAPE,
    build_cnn,
    build_toy_cnn,
    counts_by_formula,
    counts_by_summary,
    fresh,
    load_weights,
    save_weights,
    summarize,
)
from lib.toy import is_relu_dead, outputs, train_toy


@pytest.mark.parametrize(
    ("build", "shape", "counts"),
    [
        (build_toy_cnn, TOY_SHAPE, [10, 0, 0, 0, 2, 0]),
        (build_cnn, CNN_SHAPE, [640, 0, 0, 73_856, 0, 0, 0, 819_456, 0, 2_570]),
    ],
)
def test_parameters_are_those_of_the_lesson_counted_three_ways(build, shape, counts):
    model = build()
    assert counts_by_formula(model) == counts_by_summary(summarize(model, shape)) == counts
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(counts)


def test_weights_come_back_whatever_their_layout(tmp_path):
    model = fresh(build_cnn, 0)
    save_weights(model, tmp_path / "a.safetensors")
    save_weights(model.to(memory_format=torch.channels_last), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = load_weights(build_cnn(), tmp_path / "a.safetensors")
    assert not again.training
    assert torch.equal(again[9].weight, model[9].weight)


def test_weights_of_another_model_are_refused(tmp_path):
    save_weights(build_toy_cnn(), tmp_path / "toy.safetensors")
    with pytest.raises(StageError, match=r"toy\.safetensors: weights do not fit"):
        load_weights(build_cnn(), tmp_path / "toy.safetensors")


def test_loss_and_accuracy_in_the_head():
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])  # undecided: loss ln 2, and argmax takes class 0
    loss, accuracy = loss_and_accuracy(logits, np.array([0, 1], np.uint8))
    assert loss == pytest.approx(np.log(2))
    assert accuracy == 0.5


TOY_IMAGES = np.stack([np.full((1, 4, 4), 0.5), np.full((1, 4, 4), -0.5)]).astype(np.float32)
TOY_LABELS = np.array([0, 1], np.float32)


def test_the_toy_learns_and_repeats_itself():
    model, losses = train_toy(TOY_IMAGES, TOY_LABELS, epochs=300, learning_rate=0.01, seed=0)
    assert losses[-1] < losses[0] / 2
    low, high = outputs(model, TOY_IMAGES)
    assert low < 0.5 < high
    assert train_toy(TOY_IMAGES, TOY_LABELS, epochs=300, learning_rate=0.01, seed=0)[1] == losses


def test_a_dead_relu_is_told_from_a_live_one():
    model = build_toy_cnn()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1)
    assert is_relu_dead(model, TOY_IMAGES)
    with torch.no_grad():
        model[0].bias.fill_(1)
    assert not is_relu_dead(model, TOY_IMAGES)
