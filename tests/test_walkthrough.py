"""The walkthrough: every line that it writes can be computed, and it follows the layers as they are."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from lib.models import build_toy_cnn, fresh
from lib.verification import compare_layers
from lib.walkthrough import weights_table, write_out

IMAGE = np.random.default_rng(0).integers(-8, 9, (1, 4, 4)).astype(np.float32) / 8


def relu_before_pool() -> nn.Sequential:
    conv, pool, relu, *rest = build_toy_cnn()
    return nn.Sequential(conv, relu, pool, *rest)


def two_channels_and_no_sigmoid() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Conv2d(2, 1, 2), nn.Flatten(), nn.ReLU(), nn.Linear(4, 2))


MODELS = [build_toy_cnn, relu_before_pool, two_channels_and_no_sigmoid]


def written(build) -> tuple[nn.Sequential, list[dict], str]:
    model = fresh(build, 3)
    rows = compare_layers(model, IMAGE[None])
    return model, rows, write_out(model, IMAGE, rows, 1.0)


@pytest.mark.parametrize("build", MODELS)
def test_every_line_can_be_computed(build):
    _, rows, text = written(build)
    lines = re.findall(r"^- .*?`(.+)` = \*\*(.+)\*\*$", text, re.MULTILINE)
    names = {"__builtins__": {}, "max": max, "exp": math.exp}
    for expression, value in lines:
        computed = eval(expression.replace("·", "*"), names)
        assert computed == pytest.approx(float(value), abs=2e-3), expression  # weights have four digits
    # One line for each value of each layer, but for Flatten's, which computes nothing.
    assert len(lines) == sum(row["by_hand"].size for row in rows if not row["layer"].startswith("Flatten"))


@pytest.mark.parametrize("build", MODELS)
def test_layers_come_in_their_order_and_end_in_what_the_model_gives(build):
    model, _, text = written(build)
    titles = re.findall(r"^(\w+-\d), .*:$", text, re.MULTILINE)
    assert titles == [f"{type(layer).__name__}-{number}" for number, layer in enumerate(model, start=1)]
    values = [float(value) for value in re.findall(r"= \*\*(.+)\*\*$", text, re.MULTILINE)]
    with torch.inference_mode():
        outputs = model(torch.from_numpy(IMAGE[None])).flatten().tolist()
    assert values[-len(outputs) :] == pytest.approx(outputs, abs=1e-6)


def test_every_weight_is_in_the_table():
    model = fresh(two_channels_and_no_sigmoid, 3)
    shown = re.findall(r"[-+]\d\.\d{4}", weights_table(model))
    weights = [value.item() for tensor in model.parameters() for value in tensor.flatten()]
    assert sorted(shown) == sorted(f"{value:+.4f}" for value in weights)
