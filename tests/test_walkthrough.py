"""The walkthrough: every line that it writes can be computed, and it follows the model's layers."""

import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import small_stages as small
from fashion_cnn.lesson.by_hand.comparison import compare_layers
from fashion_cnn.lesson.by_hand.walkthrough import parameters_table, weights_table, write_out
from fashion_cnn.models.cnns import build_toy_cnn, fresh

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
def test_computable_lines(build):
    """Every line can be computed and gives the value that it shows."""
    _, rows, text = written(build)
    lines = re.findall(r"^- .*?`(.+)` = \*\*(.+)\*\*$", text, re.MULTILINE)
    names = {"__builtins__": {}, "max": max, "exp": math.exp}
    for expression, value in lines:
        computed = eval(expression.replace("·", "*"), names)
        assert computed == pytest.approx(float(value), abs=2e-3), expression  # weights have four digits
    # One line for each value of each layer except Flatten, which computes nothing.
    assert len(lines) == sum(row["by_hand"].size for row in rows if not row["layer"].startswith("Flatten"))


@pytest.mark.parametrize("build", MODELS)
def test_layer_order(build):
    """The layers come in their order and end in what the model gives."""
    model, _, text = written(build)
    titles = re.findall(r"^(\w+-\d), .*:$", text, re.MULTILINE)
    assert titles == [f"{type(layer).__name__}-{number}" for number, layer in enumerate(model, start=1)]
    values = [float(value) for value in re.findall(r"= \*\*(.+)\*\*$", text, re.MULTILINE)]
    with torch.inference_mode():
        outputs = model(torch.from_numpy(IMAGE[None])).flatten().tolist()
    assert values[-len(outputs) :] == pytest.approx(outputs, abs=1e-6)


def test_every_weight():
    """Every weight is in the table."""
    model = fresh(two_channels_and_no_sigmoid, 3)
    shown = re.findall(r"[-+]\d\.\d{4}", weights_table(model))
    weights = [value.item() for tensor in model.parameters() for value in tensor.flatten()]
    assert sorted(shown) == sorted(f"{value:+.4f}" for value in weights)


def test_model_text():
    """The text of a small model is the one written by hand."""
    model = nn.Sequential(nn.MaxPool2d(2), nn.Flatten())
    image = np.arange(16, dtype=np.float32).reshape(1, 4, 4)
    rows = compare_layers(model, image[None])
    assert write_out(model, image, rows, 1.0) == (
        "The input, label 1:\n"
        "\n"
        "```\n"
        "+0.0000 +1.0000 +2.0000 +3.0000\n"
        "+4.0000 +5.0000 +6.0000 +7.0000\n"
        "+8.0000 +9.0000 +10.0000 +11.0000\n"
        "+12.0000 +13.0000 +14.0000 +15.0000\n"
        "```\n"
        "\n"
        "MaxPool2d-1, the largest of each window:\n"
        "\n"
        "- `max(+0.000000, +1.000000, +4.000000, +5.000000)` = **+5.000000**\n"
        "- `max(+2.000000, +3.000000, +6.000000, +7.000000)` = **+7.000000**\n"
        "- `max(+8.000000, +9.000000, +12.000000, +13.000000)` = **+13.000000**\n"
        "- `max(+10.000000, +11.000000, +14.000000, +15.000000)` = **+15.000000**\n"
        "\n"
        "Flatten-2, the same values in one row:\n"
        "\n"
        "- +5.000000, +7.000000, +13.000000, +15.000000\n"
        "\n"
        "Every layer's outputs:\n"
        "\n"
        "| step | by loops | by torch | absolute error |\n"
        "|---|---|---|---|\n"
        "| MaxPool2d-1 | +5.000000, +7.000000, +13.000000, +15.000000 "
        "| +5.000000, +7.000000, +13.000000, +15.000000 | 0.0e+00 |\n"
        "| Flatten-2 | +5.000000, +7.000000, +13.000000, +15.000000 "
        "| +5.000000, +7.000000, +13.000000, +15.000000 | 0.0e+00 |\n"
    )


def test_weights_text():
    """The text of weights and of counts of parameters is the one written by hand."""
    model = nn.Sequential(nn.Conv2d(2, 1, (1, 2)), nn.ReLU(), nn.Linear(2, 1))
    for parameter, values in zip(model.parameters(), ([1, 2, 3, 4], [5], [6, -7], [-8]), strict=True):
        parameter.data = torch.tensor(values, dtype=torch.float32).reshape(parameter.shape)
    assert weights_table(model) == (
        "The kernel of Conv2d-1, with bias +5.0000:\n"
        "\n"
        "```\n+1.0000 +2.0000\n```\n"
        "\n"
        "```\n+3.0000 +4.0000\n```\n"
        "\n"
        "Linear-3: weight +6.0000, -7.0000, bias -8.0000.\n"
    )
    assert parameters_table([{"layer": "Conv2d-1", "by_formula": 1000, "by_summary": 2}]) == (
        "| layer | (in·kh·kw + 1)·out | torchsummary |\n"
        "|---|---|---|\n"
        "| Conv2d-1 | 1,000 | 2 |\n"
        "| total | 1,000 | 2 |\n"
    )


def test_rows_of_another_model():
    """Rows of another model raise an error."""
    model, rows, _ = written(build_toy_cnn)
    with pytest.raises(ValueError, match="shorter"):
        write_out(model, IMAGE, rows[:-1], 1.0)


LAYERS = ["Conv2d-1", "MaxPool2d-2", "ReLU-3", "Flatten-4", "Linear-5", "Sigmoid-6"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return small.Results(tmp_path_factory.mktemp("walkthrough"))


@pytest.fixture
def file(results):
    """The folder in which the stage has just run, and the two images' parts of its text."""
    folder = results.rerun("verify_manual_conv")
    text = (folder / "metrics/verify_manual_conv.md").read_text()
    head, *images = re.split(r"\n## Image \d\n", text)
    assert len(images) == 2
    images[1], tables = images[1].split("\n## The toy's parameters\n")
    return folder, head, images, tables


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?(?:e-\d+)?", text)]


def matrices(text: str) -> list[list[list[float]]]:
    blocks = re.findall(r"```\n(.*?)\n```", text, re.DOTALL)
    return [[numbers(line) for line in block.splitlines()] for block in blocks]


def test_weights_and_inputs(file):
    """The weights and inputs in the text are those of the files."""
    folder, head, images, _ = file
    weights, toy = (
        load_file(folder / "models/toy_cnn.safetensors"),
        load_file(folder / "data/toy.safetensors"),
    )
    [kernel] = matrices(head)
    assert np.allclose(kernel, weights["0.weight"][0, 0], atol=5.1e-5)
    in_text = [value for block in head.split("```")[::2] for value in numbers(block)]
    for name in ("0.bias", "4.weight", "4.bias"):
        assert any(abs(value - weights[name].item()) <= 5.1e-5 for value in in_text), name
    for text, image, label in zip(images, toy["images"], toy["labels"], strict=True):
        [shown] = matrices(text)
        assert shown == image[0].tolist()
        assert f"The input, label {int(label)}:" in text


def test_outputs_table(file):
    """The table has every layer's outputs, by loops and by torch."""
    folder, _, images, _ = file
    model = build_toy_cnn()
    model.load_state_dict(load_file(folder / "models/toy_cnn.safetensors"))
    for text, image in zip(images, load_file(folder / "data/toy.safetensors")["images"], strict=True):
        rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
        assert rows[0] == ["step", "by loops", "by torch", "absolute error"]
        assert [row[0] for row in rows[2:]] == LAYERS
        values = image[None]
        for layer, (_, by_loops, by_torch, error) in zip(model, rows[2:], strict=True):
            with torch.inference_mode():
                values = layer(values)
            for column in (by_loops, by_torch):
                assert numbers(column) == pytest.approx(values.flatten().tolist(), abs=2e-6)
            assert 0 <= float(error) < 1e-6


def test_parameters_tables(file):
    """The tables of parameters add up."""
    *_, tables = file
    toy, cnn = tables.split("\n## The Fashion-MNIST CNN's parameters\n")
    for text, total in ((toy, 12), (cnn, 896_522)):
        _, _, *rows, last = [
            line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")
        ]
        counts = [[int(count.replace(",", "")) for count in row[1:]] for row in rows]
        assert all(formula == summary for formula, summary in counts)
        assert sum(formula for formula, _ in counts) == total
        assert last == ["total", f"{total:,}", f"{total:,}"]
    assert [row.split(" | ")[0] for row in re.findall(r"^\| (\w+-\d+ .*)$", toy, re.M)] == LAYERS
