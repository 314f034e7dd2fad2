"""Every number, picture and curve that the stages write, computed a second time in another way."""

import itertools
import json
import os
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import small_stages as small
from fashion_cnn.data import fashion_mnist
from fashion_cnn.data.fashion_mnist import CLASSES
from fashion_cnn.lesson import figures, plain_loop
from fashion_cnn.lesson.by_hand import layers
from fashion_cnn.models.cnns import build_cnn, build_toy_cnn, fresh
from fashion_cnn.project.errors import StageError
from project import ROOT
from small_stages import IMAGES, PARAMS, run_stage, table

SIX_DIGITS = 1e-5  # relative: six digits in files, and float32 against float64


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return small.Results(tmp_path_factory.mktemp("values"))


@pytest.fixture
def again(results, tmp_path):
    """Return a copy of the folder in which a stage has run, to run it there again."""
    return lambda *stage: results.copy(tmp_path / "again", *stage)


def pool_of(folder, images):
    """(variants, N, 28, 28), the originals first."""
    paths = sorted((folder / "data/augmented").glob("copy_*.npy")) if images == "augmented" else []
    return np.stack([small.read_data(folder, "TRAIN_IMAGES"), *map(np.load, paths)])


@pytest.mark.parametrize("images", IMAGES)
def test_val_metrics(results, images):
    """The val metrics are those of the written weights on the original val images."""
    folder = results.rerun("train_cnn", images)
    pixels, labels = small.read_data(folder, "TRAIN_IMAGES"), small.read_data(folder, "TRAIN_LABELS")
    _, val = small.split(labels)
    loss, accuracy = small.evaluate(folder / f"models/cnn_{images}.safetensors", pixels[val], labels[val])
    written = json.loads((folder / f"metrics/train_cnn/{images}.json").read_text())
    assert written["val_loss"] == pytest.approx(loss, rel=SIX_DIGITS)
    assert written["val_accuracy"] == pytest.approx(accuracy, rel=SIX_DIGITS)
    last = table(folder / f"metrics/train_cnn/{images}.csv")[-1]
    assert {name: float(value) for name, value in last.items()} == {
        "epoch": PARAMS["train_cnn"]["epochs"],
        **{name: value for name, value in written.items() if name != "weights_sha256"},
    }


@pytest.mark.parametrize("images", IMAGES)
def test_plain_training(results, images):
    """A plain training gives the written weights and train metrics."""
    folder = results.rerun("train_cnn", images)
    weights, rows = small.train(pool_of(folder, images), small.read_data(folder, "TRAIN_LABELS"))
    written = table(folder / f"metrics/train_cnn/{images}.csv")
    assert len(written) == len(rows)
    for mine, row in zip(rows, written, strict=True):
        assert float(row["train_loss"]) == pytest.approx(mine["train_loss"], rel=1e-3)
        assert float(row["train_accuracy"]) == pytest.approx(mine["train_accuracy"], abs=0.01)
    for name, tensor in load_file(folder / f"models/cnn_{images}.safetensors").items():
        # Adam's steps all have one size, so a rounding error can flip a few with a gradient near 0.
        assert (tensor - weights[name]).abs().mean() < 0.02 * PARAMS["train_cnn"]["learning_rate"], name


@pytest.mark.parametrize("images", IMAGES)
def test_plain_loop(results, images, capsys):
    """The plain loop prints the numbers of the training."""
    folder = results.rerun("train_cnn", images)
    capsys.readouterr()
    with small.small_data(folder) as patch:
        patch.setattr("sys.argv", ["plain_loop", images])
        plain_loop.main()
    printed = [
        {name: float(value) for name, value in (word.split(" ") for word in line.split(", "))}
        for line in capsys.readouterr().out.splitlines()
    ]
    for row, written in zip(printed, table(folder / f"metrics/train_cnn/{images}.csv"), strict=True):
        assert row["train_loss"] == pytest.approx(float(written["train_loss"]), rel=1e-3)
        for name in ("train_accuracy", "val_accuracy"):
            assert row[name] == pytest.approx(float(written[name]), abs=0.02)


def test_notebook_runs(results, monkeypatch):
    """The notebook runs and holds no outputs.

    Its cells run in order, as in Jupyter; every figure that it shows has something drawn.
    """
    notebook = json.loads((ROOT / "docs/lesson.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    for stage in (("train_cnn", "original"), ("train_cnn", "augmented"), ("build_toy_tensors",)):
        results.need(*stage)
    folder, shown, names = results.folder, [], {}
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    matplotlib.use("Agg")
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: shown.append(len(plt.gcf().axes)))
    with small.small_data(folder, fashion_mnist):
        for cell in cells:
            exec("".join(cell["source"]), names)
            plt.close("all")
    assert shown == [1, 10, 1]
    assert names["outputs"].ravel() == pytest.approx(names["by_torch"].ravel(), abs=1e-6)
    assert names["kernel_gradient"] == pytest.approx(names["model"][0].weight.grad.numpy(), abs=1e-6)
    assert [row["epoch"] for row in names["rows"]] == [1]
    assert len(names["accuracies"]) == 11


def test_notebook_prepares_torch(results):
    """The notebook prepares torch before it computes.

    A process runs the notebook's first part, then prepare_torch, which refuses another set-up.
    """
    results.need("build_toy_tensors")
    (results.folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    notebook = json.loads((ROOT / "docs/lesson.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    first = itertools.takewhile(lambda cell: "TRAIN_IMAGES" not in cell, cells)
    code = "\n".join([*first, "assert by_torch.shape == (2, 1)", "prepare_torch('cpu')"])
    settings = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=results.folder, env=settings, check=True)


def test_plain_toy_training(results):
    """A plain training gives the written weights of the toy and its curve."""
    folder = results.rerun("train_toy_cnn")
    params, model = PARAMS["train_toy_cnn"], fresh(build_toy_cnn, PARAMS["train_toy_cnn"]["seed"])
    toy = load_file(folder / "data/toy.safetensors")
    optimizer = torch.optim.Adam(model.parameters(), lr=params["learning_rate"])
    curve = []
    for _ in range(params["epochs"]):
        losses = []
        for image, label in zip(toy["images"], toy["labels"], strict=True):
            probability = model(image[None]).squeeze()
            loss = -torch.log(probability if label == 1 else 1 - probability)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curve.append(sum(losses) / 2)
    written = table(folder / "metrics/train_toy_cnn.csv")
    assert [int(row["epoch"]) for row in written] == list(range(1, params["epochs"] + 1))
    assert [float(row["train_loss"]) for row in written] == pytest.approx(curve, rel=1e-4)
    metrics = json.loads((folder / "metrics/train_toy_cnn.json").read_text())
    probabilities = model(toy["images"]).flatten().tolist()
    assert metrics["train_loss"] == pytest.approx(curve[-1], rel=1e-4)
    assert [metrics["output_image_0"], metrics["output_image_1"]] == pytest.approx(probabilities, rel=1e-4)
    for name, tensor in load_file(folder / "models/toy_cnn.safetensors").items():
        assert torch.allclose(tensor, model.state_dict()[name], atol=1e-5), name


def test_toy_images(results):
    """The toy's images are those of the lesson."""
    folder = results.rerun("build_toy_tensors")
    toy = load_file(folder / "data/toy.safetensors")
    assert (toy["images"][:, 0] * 8).tolist() == [
        [[1, 2, 3, 4], [2, 3, 4, 5], [5, 6, 7, 8], [1, 3, 4, 5]],
        [[-1, 2, 3, -4], [2, -3, 4, 5], [-5, 6, -7, 8], [-1, -3, -4, -5]],
    ]
    assert toy["labels"].tolist() == [0, 1]


def test_model_seed(again):
    """The model's seed is that of train_cnn and not that of the split."""
    folder = again("train_cnn", "original")
    run_stage(folder, "train_cnn", "original", train_cnn__learning_rate=1e-12)  # so small that nothing moves
    initial = fresh(build_cnn, PARAMS["train_cnn"]["seed"]).state_dict()
    for name, tensor in load_file(folder / "models/cnn_original.safetensors").items():
        assert torch.allclose(tensor, initial[name], atol=1e-9), name


@pytest.mark.parametrize("images", IMAGES)
def test_test_metrics(results, images):
    """The test metrics are those of the written weights."""
    folder = results.rerun("evaluate_cnn", images)
    pixels, labels = small.read_data(folder, "TEST_IMAGES"), small.read_data(folder, "TEST_LABELS")
    loss, accuracy = small.evaluate(folder / f"models/cnn_{images}.safetensors", pixels, labels)
    written = json.loads((folder / f"metrics/evaluate_cnn/{images}.json").read_text())
    assert written["test_loss"] == pytest.approx(loss, rel=SIX_DIGITS)
    assert written["test_accuracy"] == pytest.approx(accuracy, rel=SIX_DIGITS)


@pytest.mark.parametrize("images", IMAGES)
def test_confusion_and_classes(results, images):
    """The tables of confusion and of classes are those of the written weights."""
    folder = results.rerun("evaluate_cnn", images)
    pixels, labels = small.read_data(folder, "TEST_IMAGES"), small.read_data(folder, "TEST_LABELS")
    weights = load_file(folder / f"models/cnn_{images}.safetensors")
    predictions = small.logits_of(weights, pixels).argmax(1)
    written = table(folder / f"metrics/evaluate_cnn/{images}_confusion.csv")
    pairs = [(CLASSES.index(row["actual"]), CLASSES.index(row["predicted"])) for row in written]
    assert pairs == list(zip(labels, predictions, strict=True))
    for number, row in enumerate(table(folder / f"metrics/evaluate_cnn/{images}_per_class.csv")):
        hits = pairs.count((number, number))
        predicted, actual = list(predictions).count(number), list(labels).count(number)
        assert (row["class"], int(row["n"])) == (CLASSES[number], actual)
        assert float(row["precision"]) == pytest.approx(hits / predicted if predicted else 0, rel=SIX_DIGITS)
        assert float(row["recall"]) == pytest.approx(hits / actual, rel=SIX_DIGITS)


@pytest.mark.parametrize("images", IMAGES)
def test_mistakes(results, images):
    """The mistakes are the surest wrong predictions, with the pixels of their own images."""
    folder = results.rerun("evaluate_cnn", images)
    pixels, labels = small.read_data(folder, "TEST_IMAGES"), small.read_data(folder, "TEST_LABELS")
    weights = load_file(folder / f"models/cnn_{images}.safetensors")
    probabilities = small.probabilities(small.logits_of(weights, pixels))
    confidences = {
        number: row.max() for number, row in enumerate(probabilities) if row.argmax() != labels[number]
    }
    surest = sorted(confidences, key=confidences.get, reverse=True)[: PARAMS["evaluate_cnn"]["mistakes"]]
    mistakes = lists(folder / f"metrics/evaluate_cnn/{images}_mistakes.json")
    written = mistakes["surest"]
    assert mistakes["test_mistakes"] == len(confidences)
    assert [row["image"] for row in written] == surest
    firsts: dict[tuple[int, int], int] = {}
    for number in sorted(confidences, key=confidences.get, reverse=True):
        firsts.setdefault((labels[number], probabilities[number].argmax()), number)
    written_firsts = mistakes["of_each_kind"]
    assert [row["image"] for row in written_firsts] == list(firsts.values())
    for number, row in zip([*surest, *firsts.values()], [*written, *written_firsts], strict=True):
        assert row["pixels"] == pixels[number].tobytes().hex()
        assert row["label"] == CLASSES[labels[number]]
        assert row["prediction"] == CLASSES[probabilities[number].argmax()]
        assert row["confidence"] == pytest.approx(confidences[number], rel=SIX_DIGITS)


@pytest.mark.parametrize("images", IMAGES)
def test_robustness(results, images):
    """The robustness is that of the written weights on moved images."""
    folder = results.rerun("evaluate_cnn", images)
    n = PARAMS["evaluate_cnn"]["robustness_images"]
    pixels, labels = (small.read_data(folder, name)[:n] for name in ("TEST_IMAGES", "TEST_LABELS"))
    moved = {("shift_x", amount): small.shifted(pixels, amount, 0) for amount in range(-5, 6)}
    moved |= {("shift_y", amount): small.shifted(pixels, 0, amount) for amount in range(-5, 6)}
    moved |= {("rotation", amount): small.rotated(pixels, amount) for amount in range(-30, 31, 5)}
    weights = folder / f"models/cnn_{images}.safetensors"
    accuracies = {key: small.evaluate(weights, batch, labels)[1] for key, batch in moved.items()}
    metrics = lists(folder / f"metrics/evaluate_cnn/{images}.json")
    assert {row["n"] for row in metrics["shifts"] + metrics["rotations"]} == {n}
    written = {
        (transform, row["pixels"]): row[transform]
        for row in metrics["shifts"]
        for transform in ("shift_x", "shift_y")
    }
    written |= {("rotation", row["degrees"]): row["rotation"] for row in metrics["rotations"]}
    assert written == pytest.approx(accuracies, rel=SIX_DIGITS)
    by_3 = [accuracies[axis, sign * 3] for axis in ("shift_x", "shift_y") for sign in (-1, 1)]
    by_15 = [accuracies["rotation", sign * 15] for sign in (-1, 1)]
    assert metrics["test_accuracy_shift_3px"] == pytest.approx(np.mean(by_3), rel=SIX_DIGITS)
    assert metrics["test_accuracy_rotation_15deg"] == pytest.approx(np.mean(by_15), rel=SIX_DIGITS)


def test_augmented_copies(results):
    """Each augmented copy has every image, in order."""
    folder = results.rerun("augment_images")
    pool, labels = pool_of(folder, "augmented"), small.read_data(folder, "TRAIN_LABELS")
    assert len(pool) == 1 + PARAMS["augment_images"]["copies"]
    assert (np.load(folder / "data/augmented/labels.npy") == labels).all()


def test_figure_tables(again, monkeypatch):
    """Each figure is drawn from its own tables."""
    folder, drawn, saved = again("plot_results"), {}, {}
    for name in ("toy_loss", "training_curves", "robustness", "confusion", "mistakes", "augmentation"):
        # Each figure's name stands in for the figure.
        monkeypatch.setattr(figures, name, lambda *given, name=name: drawn.__setitem__(name, given) or name)
    monkeypatch.setattr(
        figures, "save", lambda figure, path, dpi: saved.__setitem__(path.stem, (figure, dpi))
    )
    run_stage(folder, "plot_results")
    variants, labels = drawn.pop("augmentation")
    pool = pool_of(folder, "augmented")
    assert (np.stack(variants) == pool[:, :8]).all()
    assert (labels == small.read_data(folder, "TRAIN_LABELS")[:8]).all()
    metrics = folder / "metrics"
    of_both = ("training_curves", "confusion", "robustness", "mistakes")
    expected = {name: {} for name in of_both} | {"toy_loss": numbers(table(metrics / "train_toy_cnn.csv"))}
    for images in IMAGES:
        tested = metrics / f"evaluate_cnn/{images}.json"
        moved = lists(tested)
        surest = lists(tested.with_name(f"{images}_mistakes.json"))["surest"]
        expected["training_curves"][images] = numbers(table(metrics / f"train_cnn/{images}.csv"))
        expected["confusion"][images] = table(tested.with_name(f"{images}_confusion.csv"))
        expected["robustness"][images] = {name: moved[name] for name in ("shifts", "rotations")}
        expected["mistakes"][images] = [
            {name: row[name] for name in ("label", "prediction", "confidence", "pixels")} for row in surest
        ]
        for row in drawn["mistakes"][0][images]:
            row["pixels"] = row["pixels"].tobytes().hex()
    assert {name: tables for name, (tables,) in drawn.items()} == expected
    names = [*drawn, "augmentation"]
    assert saved == {name: (name, PARAMS["plot_results"]["dpi"]) for name in names}


def numbers(rows: list[dict[str, str]]) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in row.items()} for row in rows]


def lists(path) -> dict:
    """A file of metrics, with its lists of rows."""
    return json.loads(path.read_text())


def verified(folder) -> dict[str, float]:
    return json.loads((folder / "metrics/verify_manual_conv.json").read_text())


def wrong(name: str, add: float, condition=lambda inputs: True):
    """A function of layers with `add` added to one value of its result, if `condition` holds."""
    right = getattr(layers, name)

    def spoiled(*arguments):
        result = right(*arguments)
        if condition(arguments[0]):
            (result[-1] if isinstance(result, tuple) else result).flat[-1] += add
        return result

    return spoiled


# The wrong function, for which of its inputs, and the error metric that is then exactly that large.
WRONG = [
    ("conv2d", lambda images: images.shape[1] == 64, "max_abs_error_cnn_conv"),
    ("max_pool2d", lambda images: images.shape[1] == 128, "max_abs_error_cnn_pool"),
    ("linear", lambda inputs: inputs.shape[1] == 256, "max_abs_error_cnn_linear"),
    ("sigmoid", lambda scores: scores.item() < 0, "max_abs_error_toy_forward"),  # of the first image
    ("sigmoid", lambda scores: scores.item() > 0, "max_abs_error_toy_forward"),  # of the second
    ("conv2d_gradients", lambda images: images.shape[1] == 1, "max_abs_error_conv_gradients"),
    ("conv2d_gradients", lambda images: images.shape[1] == 64, "max_abs_error_conv_gradients"),
]


@pytest.mark.parametrize(("name", "condition", "metric"), WRONG)
def test_wrong_value_by_hand(again, monkeypatch, name, condition, metric):
    """A wrong value by hand causes exactly the error that is written."""
    folder = again("verify_manual_conv")
    assert verified(folder)[metric] < 1e-4
    monkeypatch.setattr(layers, name, wrong(name, 0.25, condition))
    run_stage(folder, "verify_manual_conv", verify_manual_conv__tolerance=1.0)
    assert verified(folder)[metric] == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize(("name", "condition", "metric"), WRONG)
def test_nan_by_hand(again, monkeypatch, name, condition, metric):
    """A NaN by hand fails the stage."""
    folder = again("verify_manual_conv")
    before = verified(folder)
    monkeypatch.setattr(layers, name, wrong(name, float("nan"), condition))
    with pytest.raises(StageError, match=r"max_abs_error_.* is nan at .*, expected at most 0.001"):
        run_stage(folder, "verify_manual_conv")
    assert verified(folder) == before


def test_error_above_tolerance(again, monkeypatch):
    """An error above the tolerance fails the stage."""
    folder = again("verify_manual_conv")
    monkeypatch.setattr(layers, "sigmoid", wrong("sigmoid", 0.25))
    with pytest.raises(StageError, match=r"toy_forward is 0.25 at toy, both images, Sigmoid-6, .* 0\.2$"):
        run_stage(folder, "verify_manual_conv", verify_manual_conv__tolerance=0.2)
    run_stage(folder, "verify_manual_conv", verify_manual_conv__tolerance=0.3)


TRAINED = {
    "metrics/train_cnn/original.csv",
    "metrics/train_cnn/original.json",
    "models/cnn_original.safetensors",
}
TOY = {f"metrics/train_toy_cnn.{kind}" for kind in ("csv", "json")}
TOY |= {"models/toy_cnn.safetensors", "models/toy_cnn_history.csv"}
COPIES = {
    "data/augmented/copy_01.npy", "data/augmented/copy_02.npy", "data/augmented/params.json",
}  # fmt: skip
TESTED = "metrics/evaluate_cnn/original"
FIGURES = {
    f"metrics/figures/{name}.png"
    for name in ("toy_loss", "training_curves", "robustness", "confusion", "mistakes", "augmentation")
}
# Each param: another value, the stage that reads it, and which of its outputs change.
EFFECTS = {
    "split.seed": (0, ("train_cnn", "original"), TRAINED),
    "split.val_size": (61, ("train_cnn", "original"), TRAINED),
    "split.train_size": (None, ("train_cnn", "original"), TRAINED),
    "augment_images.seed": (6, ("augment_images",), COPIES),
    "augment_images.copies": (
        3, ("augment_images",),
        {"data/augmented/copy_03.npy", "data/augmented/params.json"},
    ),
    "augment_images.max_shift": (4, ("augment_images",), COPIES),
    "augment_images.max_rotation": (16, ("augment_images",), COPIES),
    "train_toy_cnn.seed": (1, ("train_toy_cnn",), TOY),
    "train_toy_cnn.epochs": (41, ("train_toy_cnn",), TOY),
    "train_toy_cnn.learning_rate": (0.03, ("train_toy_cnn",), TOY),
    "verify_manual_conv.seed": (7, ("verify_manual_conv",), {"metrics/verify_manual_conv.json"}),
    "verify_manual_conv.images": (2, ("verify_manual_conv",), {"metrics/verify_manual_conv.json"}),
    "train_cnn.seed": (0, ("train_cnn", "original"), TRAINED),
    "train_cnn.epochs": (2, ("train_cnn", "original"), TRAINED),
    "train_cnn.batch_size": (17, ("train_cnn", "original"), TRAINED),
    "train_cnn.learning_rate": (0.0011, ("train_cnn", "original"), TRAINED),
    "train_cnn.model": ("residual", ("train_cnn", "original"), TRAINED),
    "train_cnn.optimizer": ("muon", ("train_cnn", "original"), TRAINED),
    "train_cnn.schedule": ("one-cycle", ("train_cnn", "original"), TRAINED),
    "train_cnn.weight_decay": (0.1, ("train_cnn", "original"), TRAINED),
    "train_cnn.label_smoothing": (0.1, ("train_cnn", "original"), TRAINED),
    "train_cnn.flips": (True, ("train_cnn", "original"), TRAINED),
    "train_cnn.shift": (1, ("train_cnn", "original"), TRAINED),
    "train_cnn.prune_easy": (0.5, ("train_cnn", "original"), TRAINED),
    # Epochs are validated with one view, so the curve is the same.
    "train_cnn.tta_views": (2, ("train_cnn", "original"), TRAINED - {"metrics/train_cnn/original.csv"}),
    "evaluate_cnn.robustness_images": (
        41, ("evaluate_cnn", "original"), {f"{TESTED}.json"},
    ),
    "evaluate_cnn.mistakes": (6, ("evaluate_cnn", "original"), {f"{TESTED}_mistakes.json"}),
    "plot_results.dpi": (51, ("plot_results",), FIGURES),
}  # fmt: skip
# Params that change no output or need the network; each has a test of its own.
OTHERS = ["fetch.sources", "verify_manual_conv.tolerance", "train_cnn.device", "evaluate_cnn.device"]


@pytest.mark.parametrize("param", EFFECTS)
def test_param_effects(again, param):
    """A param changes the outputs that it is for and no others."""
    value, stage, changed = EFFECTS[param]
    folder = again(*stage)
    before = small.contents(folder)
    run_stage(folder, *stage, **{param.replace(".", "__"): value})
    after = small.contents(folder)
    assert {path for path in before | after if before.get(path) != after.get(path)} == changed


@pytest.mark.parametrize("stage", small.PIPELINE)
def test_same_params_same_bytes(again, stage):
    """The same params give the same bytes."""
    folder = again(*stage)
    before = small.contents(folder)
    run_stage(folder, *stage)
    assert small.contents(folder) == before


def test_every_param_is_tested():
    """Every param has a test of its effect."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    leaves = {f"{section}.{leaf}" for section, values in params.items() for leaf in values}
    assert leaves == {*EFFECTS, *OTHERS}


@pytest.mark.parametrize("stage", ["train_cnn", "evaluate_cnn"])
def test_stage_device(again, monkeypatch, stage):
    """A stage uses the device that its own section sets."""
    folder = again(stage, "original")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StageError, match="device is cuda"):
        run_stage(folder, stage, "original", **{f"{stage}__device": "cuda"})
