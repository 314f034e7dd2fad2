"""The two models: parameters, shapes, weights on disk; and the toy's training."""

import numpy as np
import pytest
import torch
from torch import nn

from fashion_cnn.lesson.by_hand.comparison import counts_by_formula, counts_by_summary
from fashion_cnn.lesson.toy import is_relu_dead, outputs, train_toy
from fashion_cnn.models import inference
from fashion_cnn.models.cnns import (
    CNN_SHAPE,
    TOY_SHAPE,
    build_cnn,
    build_toy_cnn,
    fresh,
    load_weights,
    save_weights,
    summarize,
    to_input,
)
from fashion_cnn.models.inference import loss_and_accuracy, predict, to_device
from fashion_cnn.project.errors import StageError


@pytest.mark.parametrize(
    ("build", "shape", "counts"),
    [
        (build_toy_cnn, TOY_SHAPE, [10, 0, 0, 0, 2, 0]),
        (build_cnn, CNN_SHAPE, [640, 0, 0, 73_856, 0, 0, 0, 819_456, 0, 2_570]),
    ],
)
def test_parameter_counts(build, shape, counts):
    """The models have the lesson's numbers of parameters, counted in three ways."""
    model = build()
    assert counts_by_formula(model) == counts_by_summary(summarize(model, shape)) == counts
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(counts)


def test_weights_round_trip(tmp_path):
    """Weights are saved as the same bytes whatever their layout, and load unchanged."""
    model = fresh(build_cnn, 0)
    save_weights(model, tmp_path / "a.safetensors")
    save_weights(model.to(memory_format=torch.channels_last), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = load_weights(build_cnn(), tmp_path / "a.safetensors")
    assert not again.training
    assert torch.equal(again[9].weight, model[9].weight)


def test_lesson_layers():
    """The layers of the CNN and of the toy CNN are those of the lesson."""
    shapes = [tuple(tensor.shape) for tensor in build_cnn().state_dict().values()]
    assert shapes == [(64, 1, 3, 3), (64,), (128, 64, 3, 3), (128,), (256, 3200), (256,), (10, 256), (10,)]
    kinds = [type(layer) for layer in build_cnn()]
    block = [nn.Conv2d, nn.MaxPool2d, nn.ReLU]
    assert kinds == [*block, *block, nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    kinds = [type(layer) for layer in build_toy_cnn()]
    assert kinds == [nn.Conv2d, nn.MaxPool2d, nn.ReLU, nn.Flatten, nn.Linear, nn.Sigmoid]
    assert {layer.kernel_size for layer in build_cnn() if isinstance(layer, nn.MaxPool2d)} == {2}


def test_fresh_weights():
    """A fresh model has the weights that torch draws for its seed."""
    torch.manual_seed(7)
    expected = nn.Linear(1, 1).weight
    assert torch.equal(fresh(lambda: nn.Sequential(nn.Linear(1, 1)), 7)[0].weight, expected)


def test_summarize(capsys):
    """A summary is returned as text, is not printed, and leaves the model as it is."""
    model = build_toy_cnn()
    text = summarize(model, TOY_SHAPE)
    assert "Conv2d-1" in text
    assert "Total params: 12" in text
    assert capsys.readouterr().out == ""
    assert not any(layer._forward_hooks for layer in model)


def test_load_other_weights(tmp_path):
    """Weights of another model are refused in one line that names the file."""
    save_weights(build_toy_cnn(), tmp_path / "toy.safetensors")
    with pytest.raises(
        StageError, match=r"toy\.safetensors: weights do not fit the model: Error.* .*Missing key"
    ) as e:
        load_weights(build_cnn(), tmp_path / "toy.safetensors")
    assert "\n" not in str(e.value)
    assert "  " not in str(e.value)


def test_loss_and_accuracy():
    """Loss and accuracy are those computed by hand."""
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])  # undecided: loss ln 2, and argmax takes class 0
    loss, accuracy = loss_and_accuracy(logits, np.array([0, 1], np.uint8))
    assert loss == pytest.approx(np.log(2))
    assert accuracy == 0.5
    sure = torch.tensor([[0.0, np.log(3)], [np.log(3), 0.0], [0.0, np.log(3)]])  # probabilities 1/4 and 3/4
    loss, accuracy = loss_and_accuracy(sure, np.array([1, 1, 1], np.uint8))
    assert loss == pytest.approx((2 * np.log(4 / 3) + np.log(4)) / 3)
    assert accuracy == pytest.approx(2 / 3)


def test_to_input():
    """The input has one channel, whose values are fractions of 255."""
    images = torch.tensor([[[0, 51], [102, 255]]], dtype=torch.uint8)
    given = to_input(images)
    assert (given.shape, given.dtype) == ((1, 1, 2, 2), torch.float32)
    assert given.flatten().tolist() == pytest.approx([0, 0.2, 0.4, 1])
    assert images.flatten().tolist() == [0, 51, 102, 255]


def test_predict(images, monkeypatch):
    """Predictions are made in eval mode, batch by batch, and returned in order."""
    monkeypatch.setattr(inference, "BATCH", 5)  # 5, 5, 5 and 1
    batches = []

    class Mean(nn.Module):
        """Returns the mean, in train mode twice the mean; records its batch sizes."""

        def forward(self, inputs):
            batches.append(len(inputs))
            return inputs.mean((1, 2, 3))[:, None].repeat(1, 10) * (2 if self.training else 1)

    logits = predict(Mean().train(), images, torch.device("cpu"))
    assert logits[:, 3].tolist() == pytest.approx((images.mean((1, 2)) / 255).tolist())
    assert batches == [5, 5, 5, 1]
    assert logits.is_inference()


def test_to_device():
    """A model moves to a device in the channels-last layout, in which convolutions are fastest."""
    model = to_device(build_cnn(), torch.device("cpu"))
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert to_device(model, torch.device("meta"))[3].weight.device.type == "meta"


TOY_IMAGES = np.stack([np.full((1, 4, 4), 0.5), np.full((1, 4, 4), -0.5)]).astype(np.float32)
TOY_LABELS = np.array([0, 1], np.float32)


def test_toy_training():
    """The toy learns to tell its images apart, and a second training gives the same losses."""
    model, losses, _ = train_toy(TOY_IMAGES, TOY_LABELS, epochs=300, learning_rate=0.01, seed=0)
    assert losses[-1] < losses[0] / 2
    low, high = outputs(model, TOY_IMAGES)
    assert low < 0.5 < high
    assert train_toy(TOY_IMAGES, TOY_LABELS, epochs=300, learning_rate=0.01, seed=0)[1] == losses


def test_toy_first_steps():
    """The toy's first loss and first steps are those computed by hand."""
    initial = fresh(build_toy_cnn, 3)
    [first, second] = outputs(initial, TOY_IMAGES)
    # Negligible steps: the losses of labels 0 and 1 are those of the initial outputs.
    _, losses, _ = train_toy(TOY_IMAGES, TOY_LABELS, epochs=2, learning_rate=1e-12, seed=3)
    expected = (-np.log(1 - first) - np.log(second)) / 2
    assert losses == pytest.approx([expected, expected], rel=1e-5)
    # The same image and label twice: each of Adam's two steps equals the learning rate.
    same, label = np.stack([TOY_IMAGES[0]] * 2), np.zeros(2, np.float32)
    model, _, _ = train_toy(same, label, epochs=1, learning_rate=0.001, seed=3)
    assert not model.training
    moved = (model[4].bias - initial[4].bias).abs().item()
    assert moved == pytest.approx(0.002, rel=0.02)


@pytest.mark.parametrize(("epochs", "kept"), [(300, 101), (7, 8), (1, 2)])
def test_toy_history(epochs, kept):
    """The toy's parameters are kept at up to about 100 epochs, the first and the last among them."""
    model, _, history = train_toy(TOY_IMAGES, TOY_LABELS, epochs=epochs, learning_rate=0.01, seed=4)
    assert len(history) == kept
    assert [history[0]["epoch"], history[-1]["epoch"]] == [0, epochs]
    for row, network in ((history[0], fresh(build_toy_cnn, 4)), (history[-1], model)):
        assert row["kernel_21"] == network[0].weight[0, 0, 2, 1].item()
        assert row["kernel_bias"] == network[0].bias.item()
        assert (row["weight"], row["bias"]) == (network[4].weight.item(), network[4].bias.item())
    assert history[1] | {"epoch": 0} != history[0]


def test_toy_lacks_label():
    """An image of the toy without a label raises an error."""
    with pytest.raises(ValueError, match="shorter"):
        train_toy(TOY_IMAGES, TOY_LABELS[:1], epochs=1, learning_rate=0.01, seed=0)


def test_is_relu_dead():
    """A dead ReLU is distinguished from a live one."""
    model = build_toy_cnn()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1)
    assert is_relu_dead(model, TOY_IMAGES)
    with torch.no_grad():
        model[0].bias.fill_(1)
    assert not is_relu_dead(model, TOY_IMAGES)
