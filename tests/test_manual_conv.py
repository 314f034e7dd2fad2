"""The layers as loops: first with numbers that can be checked by hand, then against torch."""

import numpy as np
import pytest
import torch
from torch import nn

from fashion_cnn.lesson.by_hand import comparison, layers
from fashion_cnn.lesson.by_hand.comparison import (
    compare_counts,
    compare_gradients,
    compare_layers,
    fill_batch_norms,
)
from fashion_cnn.models.cnns import build_cnn, build_toy_cnn, fresh
from fashion_cnn.models.residual import Residual

ONES = np.ones((1, 1, 3, 3))


def test_conv2d_counts_neighbours():
    """A kernel of ones over padded ones counts the ones around each cell, itself included."""
    padded = np.pad(np.ones((1, 1, 5, 5)), ((0, 0), (0, 0), (1, 1), (1, 1)))
    counts = layers.conv2d(padded, ONES, np.zeros(1))[0, 0]
    assert counts.tolist() == [[4, 6, 6, 6, 4], *([[6, 9, 9, 9, 6]] * 3), [4, 6, 6, 6, 4]]


def test_conv2d_bias_and_channels():
    """A convolution sums over the channels and adds the bias once."""
    images = np.stack([np.full((3, 3), 1.0), np.full((3, 3), 10.0)])[None]  # (1, 2, 3, 3)
    assert layers.conv2d(images, np.ones((1, 2, 3, 3)), np.array([0.5])).item() == 9 + 90 + 0.5


def test_conv2d_kernel_orientation():
    """A kernel is laid over each patch as it is, without being flipped or transposed."""
    images = np.arange(12.0).reshape(1, 1, 3, 4)
    kernel = np.array([[[[1.0, 0, 0], [0, 0, 10.0]]]])  # 2×3: its corners distinguish rows from columns
    by_hand = [[0 + 60 + 2, 1 + 70 + 2], [4 + 100 + 2, 5 + 110 + 2]]
    assert layers.conv2d(images, kernel, np.array([2.0]))[0, 0].tolist() == by_hand


def test_max_pool2d():
    """Max pooling takes the largest value of each window and drops an incomplete border."""
    images = np.arange(25.0).reshape(1, 1, 5, 5)
    assert layers.max_pool2d(images)[0, 0].tolist() == [[6, 8], [16, 18]]


def test_linear_relu_and_sigmoid():
    """The linear layer, ReLU and the sigmoid return the values computed by hand."""
    assert layers.linear(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]), np.array([5.0])).item() == 16
    assert layers.relu(np.array([-1.0, 2.0])).tolist() == [0, 2]
    assert layers.sigmoid(np.zeros(1)).item() == 0.5


def test_conv2d_gradients():
    """The gradients of a convolution are those computed by hand."""
    images = np.arange(9.0).reshape(1, 1, 3, 3)
    by_image, by_kernel, by_bias = layers.conv2d_gradients(images, 2 * ONES, np.full((1, 1, 1, 1), 3.0))
    assert by_image.tolist() == (6 * ONES).tolist()
    assert by_kernel.tolist() == (3 * images).tolist()
    assert by_bias.tolist() == [3]


def test_layers_match_torch():
    """Layers on random inputs, and the gradients of a convolution, agree with torch."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 3, 7, 6), np.float32)
    layer = nn.Conv2d(3, 4, kernel_size=(2, 3))
    rows = compare_layers(nn.Sequential(layer, nn.MaxPool2d(3), nn.ReLU(), nn.Flatten()), images)
    assert [row["layer"] for row in rows] == ["Conv2d-1", "MaxPool2d-2", "ReLU-3", "Flatten-4"]
    assert max(row["error"] for row in rows) < 1e-5
    assert compare_gradients(layer, images, rng) < 1e-4


def test_batch_norm():
    """Batch norm's statistics and outputs, and padding, are those computed by hand."""
    values = np.array([1.0, 3, 5, 7]).reshape(2, 1, 1, 2)
    mean, variance = layers.batch_statistics(values)
    assert (mean.item(), variance.item()) == (4, 5)
    outputs = layers.batch_norm(values, np.array([2.0]), np.array([1.0]), mean, variance, 4.0)  # divides by 3
    assert outputs.ravel().tolist() == pytest.approx([-1, 1 / 3, 5 / 3, 3])
    assert layers.pad(np.ones((1, 1, 1, 2)), 1)[0, 0].tolist() == [[0] * 4, [0, 1, 1, 0], [0] * 4]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.Conv2d(4, 3, 3, padding=2),
        nn.BatchNorm2d(4),
        Residual(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)),
        Residual(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_residual_layers_match_torch(layer):
    """The residual CNN's layers agree with torch during training and after it."""
    rng = np.random.default_rng(1)
    images = rng.standard_normal((3, 4, 6, 7))
    model = nn.Sequential(layer)
    fill_batch_norms(model, rng)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert compare_gradients(layer, images, rng) < 1e-12
    for name, tensor in model.state_dict().items():  # the comparison uses a copy
        assert torch.equal(tensor, before[name])
    for training in (True, False):
        [row] = compare_layers(model.train(training), images.astype(np.float32))
        assert row["error"] < 1e-5
    rows = compare_counts(nn.Sequential(layer), (4, 6, 7))
    assert sum(row["by_formula"] for row in rows) == sum(p.numel() for p in layer.parameters())
    assert all(row["by_formula"] == row["by_summary"] for row in rows)


@pytest.mark.parametrize("wrong", ["batch_statistics", "batch_norm", "batch_norm_gradients", "pad", "relu"])
def test_residual_block_errors(monkeypatch, wrong):
    """An error in any part of a residual block shows in the comparison."""
    block = Residual(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)).train()
    images = np.random.default_rng(2).standard_normal((2, 2, 5, 5))
    right = getattr(layers, wrong)

    def slightly(*args):
        found = right(*args)
        first = found[0] if isinstance(found, tuple) else found
        first += 0.01 * np.arange(first.size).reshape(first.shape)
        return found

    monkeypatch.setattr(layers, wrong, slightly)
    by_hand = [row["error"] for row in compare_layers(nn.Sequential(block), images.astype(np.float32))]
    gradients = compare_gradients(block, images, np.random.default_rng(0))
    assert max(*by_hand, gradients) > 0.001


def test_fill_batch_norms():
    """The numbers of a batch norm are drawn so that each of them matters."""
    model = fresh(lambda: build_cnn("residual"), 0)
    fill_batch_norms(model, np.random.default_rng(0))
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 6
    for layer in norms:
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            assert len(tensor.unique()) == len(tensor)
        assert min(layer.weight.min(), layer.running_var.min()) >= 0.5


@pytest.mark.parametrize("number", [0, 1])
def test_wrong_layer(number, monkeypatch):
    """An error in a layer shows in its own row and in no row before it."""
    wrong = {0: "conv2d", 1: "max_pool2d"}[number]
    right = getattr(layers, wrong)
    monkeypatch.setattr(layers, wrong, lambda *args: right(*args) + 0.01)
    rows = compare_layers(fresh(build_toy_cnn, 0), np.ones((1, 1, 4, 4), np.float32))
    assert rows[number]["error"] > 0.009
    assert all(row["error"] < 1e-5 for row in rows[:number])


def test_errors_propagate(monkeypatch):
    """A layer's error is its largest one, and it carries on through the layers after it."""
    model = build_toy_cnn()
    with torch.no_grad():
        for layer, weight, bias in ((0, 1.0, 0.0), (4, 2.0, -18.0)):
            model[layer].weight.fill_(weight)
            model[layer].bias.fill_(bias)
    right = layers.conv2d

    def wrong(*args):
        result = right(*args)  # 9 in all four places
        result[0, 0, 0, 0] += 0.5
        return result

    monkeypatch.setattr(layers, "conv2d", wrong)
    rows = compare_layers(model, np.ones((1, 1, 4, 4), np.float32))
    assert [row["layer"] for row in rows] == [
        "Conv2d-1", "MaxPool2d-2", "ReLU-3", "Flatten-4", "Linear-5", "Sigmoid-6",
    ]  # fmt: skip
    by_hand = [row["by_hand"].max() for row in rows]
    assert by_hand == pytest.approx([9.5, 9.5, 9.5, 9.5, 1, 1 / (1 + np.exp(-1))])
    assert [row["by_torch"].max() for row in rows] == [9, 9, 9, 9, 0, 0.5]
    assert [row["error"] for row in rows] == pytest.approx(
        [0.5, 0.5, 0.5, 0.5, 1, 1 / (1 + np.exp(-1)) - 0.5]
    )


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_wrong_gradient(monkeypatch, which, value):
    """An error in any of the gradients shows with its size."""
    right = layers.conv2d_gradients

    def wrong(*args):
        gradients = right(*args)
        gradients[which].flat[0] += value
        return gradients

    rng = np.random.default_rng(0)
    images, layer = rng.standard_normal((2, 3, 5, 5), np.float32), nn.Conv2d(3, 2, 3)
    assert compare_gradients(layer, images, rng) < 1e-4
    monkeypatch.setattr(layers, "conv2d_gradients", wrong)
    assert compare_gradients(layer, images, rng) == pytest.approx(value, abs=1e-4, nan_ok=True)


def test_unknown_layer():
    """A layer of an unknown type raises an error that names it."""
    with pytest.raises(TypeError, match="Tanh"):
        compare_layers(nn.Sequential(nn.Tanh()), np.ones((1, 1), np.float32))


def test_compare_counts():
    """The numbers of parameters by formula and by summary are compared layer by layer."""
    rows = compare_counts(build_toy_cnn(), (1, 4, 4))
    counts = {"Conv2d-1": 10, "MaxPool2d-2": 0, "ReLU-3": 0, "Flatten-4": 0, "Linear-5": 2, "Sigmoid-6": 0}
    assert rows == [
        {"layer": layer, "by_formula": count, "by_summary": count} for layer, count in counts.items()
    ]
    rows = compare_counts(build_cnn(), (1, 28, 28))
    assert sum(row["by_formula"] for row in rows) == sum(row["by_summary"] for row in rows) == 896_522


def test_summary_lacks_layer(monkeypatch):
    """A layer that the summary lacks raises an error."""
    monkeypatch.setattr(comparison, "counts_by_summary", lambda table: [10, 0, 0])
    with pytest.raises(ValueError, match="shorter"):
        compare_counts(build_toy_cnn(), (1, 4, 4))
