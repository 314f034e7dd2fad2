"""The page: its numbers are torch's, it moves images as evaluate_cnn does, and it is accessible."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from browser import needs_browser, open_page
from fashion_cnn.commands import page as command
from fashion_cnn.data.fashion_mnist import CLASSES
from fashion_cnn.data.split import split_indices
from fashion_cnn.lesson import evaluation, figures, toy
from fashion_cnn.models.cnns import (
    MODELS,
    build_cnn,
    build_toy_cnn,
    fresh,
    load_cnn,
    load_weights,
    save_weights,
    to_input,
)
from fashion_cnn.models.residual import Residual
from fashion_cnn.page import contents
from fashion_cnn.page.contents import POINTS
from fashion_cnn.project import catalog
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import write_csv, write_json, write_tensors
from fashion_cnn.project.params import load_params
from project import PACKAGE, ROOT
from small_stages import table
from stages import build_page

pytestmark = pytest.mark.slow

LIMIT = 6_000_000  # bytes
TOY_IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 1, 4, 4)).astype(np.float32)
TOY_LABELS = np.array([0, 1], np.float32)


def garments(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 28, 28) uint8 of ten kinds that a CNN can tell apart, and their labels."""
    kinds = torch.from_numpy(np.random.default_rng(0).random((10, 1, 7, 7), np.float32))
    shapes = F.interpolate(kinds, (28, 28), mode="bilinear").numpy()[:, 0]
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count).astype(np.uint8)
    noise = rng.normal(0, 0.12, (count, 28, 28))
    return (255 * np.clip(shapes[labels] + noise, 0, 1) ** 2).astype(np.uint8), labels


def trained(seed: int, move: bool, name: str) -> torch.nn.Sequential:
    """A CNN trained on the ten kinds, with `move` also on shifted images. A residual one has 6 views."""
    images, labels = garments(600, seed + 10)
    if move:
        images = np.concatenate([images, evaluation.move(images, "shift_x", 3)])
        labels = np.concatenate([labels, labels])
    model = fresh(lambda: build_cnn(name, 6 if name == "residual" else 1), seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    rng = np.random.default_rng(seed)
    epochs = 4 if name == "residual" else 1  # batch norm's statistics need more steps
    for part in [one for _ in range(epochs) for one in np.array_split(rng.permutation(len(labels)), 20)]:
        loss = F.cross_entropy(
            model(to_input(torch.from_numpy(images[part]))), torch.from_numpy(labels[part]).long()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def write_results(
    *, epochs: int = 3, toy_epochs: int = 40, mistakes: int = 4, diverged: bool = False, of: str = "lesson"
) -> None:
    """What the stages before build_page write into the current folder."""
    loss, confidence = (float("nan"),) * 2 if diverged else (0.5, 0.9)
    write_tensors(build_page.TENSORS, {"images": TOY_IMAGES, "labels": TOY_LABELS})
    model, losses, history = toy.train_toy(
        TOY_IMAGES, TOY_LABELS, epochs=toy_epochs, learning_rate=0.01, seed=0
    )
    save_weights(model, catalog.TOY.weights)
    write_csv(catalog.TOY_HISTORY, history)
    write_csv(catalog.TOY.curve, [{"epoch": n, "train_loss": one} for n, one in enumerate(losses, 1)])
    images, labels = garments(mistakes, 5)
    for number, (name, training) in enumerate(catalog.CNNS.items()):
        training.weights.parent.mkdir(exist_ok=True)
        model = trained(number, name == "augmented", of)
        if diverged:
            for parameter in model[3 if of == "lesson" else 2].state_dict().values():
                if parameter.is_floating_point():
                    parameter.fill_(float("nan"))
        digest = save_weights(model, training.weights)
        row = {"train_loss": loss, "train_accuracy": 0.7, "val_loss": 0.4, "val_accuracy": 0.8}
        write_csv(training.curve, [{"epoch": epoch, **row} for epoch in range(1, epochs + 1)])
        write_json(training.metrics, {"weights_sha256": [digest]})
        results = training.evaluation_results
        moved = {
            "shifts": [{"pixels": by, "shift_x": 0.8, "shift_y": 0.7, "n": 100} for by in evaluation.SHIFTS],
            "rotations": [{"degrees": by, "rotation": 0.6, "n": 100} for by in evaluation.ANGLES],
        }
        write_json(results.with_suffix(".json"), moved)
        surest = [
            {
                "label": CLASSES[label], "prediction": CLASSES[(label + 1) % 10], "confidence": confidence,
                "pixels": image.tobytes().hex(),
            }
            for image, label in zip(images, labels, strict=True)
        ]  # fmt: skip
        write_json(results.with_name(f"{name}_mistakes.json"), {"surest": surest[:2], "of_each_kind": surest})
        rows = [{"actual": CLASSES[n % 10], "predicted": CLASSES[n * 7 % 10]} for n in range(50)]
        rows += [{"actual": row["label"], "predicted": row["prediction"]} for row in surest]
        write_csv(results.with_name(f"{name}_confusion.csv"), rows)


def build(monkeypatch, images: np.ndarray, labels: np.ndarray) -> bytes:
    """The page that the stage writes into the current folder."""
    ignored = SimpleNamespace(report=lambda *arguments: None, close=lambda: None)
    monkeypatch.setattr(build_page, "StageRecords", lambda: ignored)
    monkeypatch.setattr(build_page, "read_idx", lambda file: labels if "labels" in file.name else images)
    build_page.main()
    return build_page.PAGE.read_bytes()


def build_in(folder, model: str):
    (folder / "params.yaml").write_bytes((ROOT / "tests/helpers/params.yaml").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_results(of=model)
        build(patch, *garments(2000, 1))
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a page, with the files it was made from."""
    folder = build_in(tmp_path_factory.mktemp("page"), "lesson")
    shutil.copy(ROOT / "dvc.yaml", folder)  # the command fashion-cnn looks for it
    return folder


@pytest.fixture(scope="module")
def built_residual(tmp_path_factory):
    """The same with residual CNNs."""
    return build_in(tmp_path_factory.mktemp("residual"), "residual")


@pytest.fixture
def page(built):
    """The page in a browser."""
    yield from watched(built)


@pytest.fixture
def residual_page(built_residual):
    """The page of residual CNNs in a browser."""
    yield from watched(built_residual)


def watched(built):
    """The page in a browser; each console message, error or request is a fault."""
    with open_page(1400, 900) as page:
        faults = []
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.append(request.url))
        page.goto((built / build_page.PAGE).as_uri())
        opened = faults.pop(0)
        assert opened.startswith("file:")
        yield page
        assert faults == []


def picture(page, number: int) -> tuple[str, np.ndarray]:
    """The label and the pixels (1, 28, 28) of one of the page's images."""
    shown = page.evaluate(f"contents.images[{number}]")
    return shown["label"], np.frombuffer(base64.b64decode(shown["pixels"]), np.uint8).reshape(
        1, 28, 28
    ).copy()


def to_number(text: str) -> float:
    return float(text.replace("−", "-"))


def models(folder) -> dict[str, torch.nn.Sequential]:
    return {name: load_cnn(folder / training.weights) for name, training in catalog.CNNS.items()}


def unpacked(values: np.ndarray) -> np.ndarray:
    """The weights as the page stores them."""
    packed = contents.int16(values)
    steps = np.frombuffer(base64.b64decode(packed["int16"]), np.int16)
    return (steps * packed["step"]).reshape(packed["shape"]).astype(np.float32)


def test_int16_weights():
    """Stored weights are close to the trained ones and mark values that are not numbers."""
    values = np.array([[0.5, -0.25, 0.1], [0, np.nan, -np.inf]], np.float32)
    packed = contents.int16(values)
    steps = np.frombuffer(base64.b64decode(packed["int16"]), np.int16)
    assert steps.tolist() == [32767, -16384, 6553, 0, -32768, -32768]  # -16383.5 rounds to even
    assert packed["step"] == pytest.approx(0.5 / 32767)
    assert contents.int16(np.zeros((2,), np.float32))["int16"] == "AAAAAA=="


@needs_browser
@pytest.mark.parametrize("which", ["", "_residual"])
def test_browser_logits(request, which):
    """The browser's logits and probabilities are torch's."""
    page = request.getfixturevalue(f"{which}_page".lstrip("_"))
    built = request.getfixturevalue(f"built{which}")
    images, _ = garments(40, 2)
    moves = [("shift_x", 3), ("shift_y", -4), ("rotation", 15), ("rotation", -28)]
    images = np.concatenate([images, *(evaluation.move(images[:10], *move) for move in moves)])
    for name, model in models(built).items():
        logits = page.evaluate(
            "([name, images]) => images.map((pixels) =>"
            " [...logits(networks[name], to_input(pixels), contents.cnns[name].views).values])",
            [name, images.reshape(len(images), -1).tolist()],
        )
        shares = page.evaluate(
            "(logits) => logits.map((values) =>"
            " [...softmax({shape: [10], values: Float64Array.from(values)}).values])",
            logits,
        )
        with torch.inference_mode():
            expected = model(to_input(torch.from_numpy(images))).softmax(1).numpy()
            stored = with_stored_weights(model)(to_input(torch.from_numpy(images))).numpy()
            model.views = 2  # neither page has this number
            stored_2 = model(to_input(torch.from_numpy(images[:20]))).numpy()
        logits_2 = page.evaluate(
            "([name, images]) => images.map((pixels) =>"
            " [...logits(networks[name], to_input(pixels), 2).values])",
            [name, images[:20].reshape(20, -1).tolist()],
        )
        assert np.abs(np.array(logits) - stored).max() < 1e-4
        assert np.abs(np.array(logits_2) - stored_2).max() < 1e-4
        assert np.abs(stored_2 - stored[:20]).max() > 0.01
        assert 0 < np.abs(np.array(shares) - expected).max() < 0.002
        assert (np.argmax(shares, 1) == expected.argmax(1)).all()
        assert len(set(np.argmax(shares, 1))) > 5  # and not always the same two or three


@needs_browser
def test_browser_moves(page):
    """The browser moves images as evaluate_cnn does."""
    images, _ = garments(4, 3)
    pixels, rotated = images.reshape(4, -1).tolist(), []
    for transform, code, amounts in (
        ("shift_x", "shift(pixels, amount, 0)", range(-6, 7)),
        ("shift_y", "shift(pixels, 0, amount)", range(-6, 7)),
        ("rotation", "rotate(pixels, amount)", range(-30, 31)),
    ):
        moved = page.evaluate(
            f"([images, amounts]) => amounts.map((amount) => images.map((pixels) => [...{code}]))",
            [pixels, list(amounts)],
        )
        for amount, found in zip(amounts, moved, strict=True):
            expected = evaluation.move(images, transform, amount).astype(int)
            off = np.abs(np.array(found).reshape(expected.shape) - expected)
            if transform == "rotation":
                rotated.append(off)
            else:
                assert off.max() == 0, (transform, amount)
    # torch's compiler decides where to round, so a sum that ends in .5 may go either way.
    assert np.max(rotated) <= 1
    assert np.mean(rotated) < 1e-5


@needs_browser
def test_toy_values(page, built):
    """Every value of the toy is torch's, also after a pixel or a parameter has been edited."""
    model = load_weights(build_toy_cnn(), built / catalog.TOY.weights)

    def steps(image: np.ndarray) -> list[np.ndarray]:
        values, found = torch.from_numpy(image)[None], []
        with torch.inference_mode():
            for layer in model:
                values = layer(values)
                found.append(values.numpy().ravel())
        return found

    for number, image in enumerate(TOY_IMAGES):
        found = page.evaluate(
            "(number) => forward(unpack_layers(contents.toy.layers), unpack(contents.toy.images[number]))"
            ".map((step) => [...step.values])",
            number,
        )
        for one, expected in zip(found, steps(image), strict=True):
            assert one == pytest.approx(expected.tolist(), abs=1e-5)

    def cells() -> list[float]:
        names = ["Convolution, row 1, column 2", "After the linear layer", "Probability of label 1"]
        return [to_number(page.get_by_role("button", name=name, exact=True).inner_text()) for name in names]

    def expected(image: np.ndarray) -> list[float]:
        found = steps(image)
        return [found[0][1], found[4][0], found[5][0]]

    page.locator("#toy-moment").press("End")
    page.get_by_role("radio", name="label 1").check()
    assert cells() == pytest.approx(expected(TOY_IMAGES[1]), abs=6e-4)
    image = TOY_IMAGES[1].copy()
    image[0, 1, 3] = -1.5
    page.get_by_label("Pixel, row 2, column 4").fill("−1.5")  # as the page writes it
    assert cells() == pytest.approx(expected(image), abs=6e-4)
    with torch.no_grad():
        model[0].weight[0, 0, 2, 1] = 2.25
        model[4].bias[0] = 0.5
    page.get_by_label("Kernel, row 3, column 2").fill("2.25")
    assert page.locator("#toy-epoch").inner_text() == "after epoch 40 of 40, edited"
    page.get_by_role("button", name="Convolution, row 2, column 2").hover()  # keeps what was typed
    assert page.get_by_label("Kernel, row 3, column 2").input_value() == "2.25"
    page.get_by_label("Bias of the linear layer").fill("0.5")
    assert cells() == pytest.approx(expected(image), abs=6e-4)
    page.get_by_role("button", name="Undo edits and steps").click()
    model = load_weights(build_toy_cnn(), built / catalog.TOY.weights)
    assert cells() == pytest.approx(expected(TOY_IMAGES[1]), abs=6e-4)


@needs_browser
def test_products_sum_to_cell(page):
    """The products that are written out sum to the value of the cell."""
    page.get_by_role("button", name="Convolution, row 2, column 1").hover()
    for place in ("#toy-working", "#conv-1-working", "#conv-2-working"):
        rows = page.locator(f"{place} table").first.locator("tr").all_inner_texts()[1:]
        *parts, total = [to_number(row.split("\t")[-1]) for row in rows]
        assert len(parts) >= 10
        assert sum(parts) == pytest.approx(total, abs=1e-3)


@needs_browser
def test_toy_slider(page, built):
    """The slider goes through the toy's training from its initial to its final parameters."""
    slider = page.locator("#toy-moment")
    slider.press("Home")
    assert page.locator("#toy-epoch").inner_text() == "after epoch 0 of 40"
    first = fresh(build_toy_cnn, 0)
    shown = to_number(page.get_by_label("Kernel, row 1, column 3").input_value())
    assert shown == pytest.approx(first[0].weight[0, 0, 0, 2].item(), abs=6e-4)
    slider.press("ArrowRight")
    assert page.locator("#toy-epoch").inner_text() == "after epoch 1 of 40"
    slider.press("End")
    last = load_weights(build_toy_cnn(), built / catalog.TOY.weights)
    shown = to_number(page.get_by_label("Bias of the kernel").input_value())
    assert shown == pytest.approx(last[0].bias.item(), abs=6e-4)


@needs_browser
def test_dead_relu_note(page):
    """The page calls a dead ReLU dead, but not a live one."""
    page.get_by_label("Bias of the kernel").fill("-100")
    assert "a dead ReLU" in page.locator("#toy-note").inner_text()
    page.get_by_label("Bias of the kernel").fill("100")
    assert "a dead ReLU" not in page.locator("#toy-note").inner_text()


def with_stored_weights(model: torch.nn.Sequential) -> torch.nn.Sequential:
    """The CNN of the page, whose weights have 16 bits each."""
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            for parameter in layer.parameters():
                parameter.data = torch.from_numpy(unpacked(parameter.detach().numpy()))
    return model


@needs_browser
@pytest.mark.parametrize("which", ["", "_residual"])
@pytest.mark.parametrize(("one", "other"), [(3, 7), (0, -1)])
def test_attribution(request, which, one, other):
    """What places and maps add to the logits is gradient times input."""
    page = request.getfixturevalue(f"{which}_page".lstrip("_"))
    image = garments(1, 2)[0]
    for name, model in models(request.getfixturevalue(f"built{which}")).items():
        layers = list(with_stored_weights(model))
        [flat] = [at for at, layer in enumerate(layers) if isinstance(layer, torch.nn.Flatten)]
        with torch.inference_mode():
            last = torch.nn.Sequential(*layers[:flat])(to_input(torch.from_numpy(image)))
        last = last.clone().requires_grad_()
        logits = torch.nn.Sequential(*layers[flat:])(last)[0]
        total = logits[one] - (0 if other < 0 else logits[other])
        total.backward()
        parts = (last.grad * last)[0].detach().numpy()
        found = page.evaluate(
            """([name, pixels, one, other]) => {
                const parts = attribute(networks[name], look_at(networks[name], to_input(pixels), 1).steps,
                                        signs_of(one, other));
                return [by_place(parts), by_map(parts), parts.bias];
            }""",
            [name, image.ravel().tolist(), one, other],
        )
        assert found[0] == pytest.approx(parts.sum(0).ravel().tolist(), abs=1e-4)
        assert found[1] == pytest.approx(parts.sum((1, 2)).tolist(), abs=1e-4)
        assert sum(found[0]) + found[2] == pytest.approx(total.item(), abs=1e-4)


@needs_browser
def test_choose_classes(page, built):
    """The classes that are compared can be chosen."""
    page.locator("#end-class").select_option(label="Dress")
    page.locator("#end-rival").select_option(label="Bag")
    assert page.locator("#end-working-title").inner_text() == "Dress − Bag, by map"
    _, image = picture(page, 0)
    model = with_stored_weights(models(built)["original"])
    with torch.inference_mode():
        logits = model(to_input(torch.from_numpy(image)))[0]
    total = page.locator("#end-working tr.total").inner_text().split("\t")[-1]
    assert to_number(total) == pytest.approx((logits[3] - logits[8]).item(), abs=2e-4)
    page.locator("#end-rival").select_option(label="nothing")
    assert page.locator("#end-working-title").inner_text() == "The logit of Dress, by map"


@needs_browser
def test_receptive_field(page):
    """A receptive field is all of the image that a cell is computed from.

    Sizes and corners by hand: a convolution adds 2 to the size, pooling doubles everything.
    """
    fields = page.evaluate(
        "[0, 1, 3, 4].map((place) => receptive_field(networks.original, place, [2, 1]))"
        ".map(({top, left, size}) => [top, left, size])"
    )
    assert fields == [[2, 1, 3], [4, 2, 4], [4, 2, 8], [8, 4, 10]]


@needs_browser
def test_move_sentence(page, built):
    """The sentence about a move gives torch's numbers."""
    label, image = picture(page, 9)
    page.locator("#picker button").nth(9).click()
    for _ in range(3):
        page.locator("#moved-x").press("ArrowLeft")
    images = np.concatenate([image, evaluation.move(image, "shift_x", -3)])
    own = CLASSES.index(label)
    for name, model in models(built).items():
        with torch.inference_mode():
            logits = with_stored_weights(model)(to_input(torch.from_numpy(images)))
        rivals = logits[1].clone()
        rivals[own] = -torch.inf
        rival = int(rivals.argmax())
        before, after = (logits[:, own] - logits[:, rival]).tolist()
        said = page.locator(f"#moved-{name}-places .note").last.inner_text()
        numbers = re.match(rf"{CLASSES[own]} − {CLASSES[rival]}: (\S+) unmoved, (\S+) moved", said).groups()
        assert [to_number(text) for text in numbers] == pytest.approx([before, after], abs=0.06)
        assert "the same weights now get another part of the image" in said


@needs_browser
def test_toy_gradients(page, built):
    """The gradients and the loss of the toy are torch's."""
    of_kernel = []
    for at, (image, label) in enumerate(zip(TOY_IMAGES, TOY_LABELS, strict=True)):
        model = load_weights(build_toy_cnn(), built / catalog.TOY.weights)
        loss = F.binary_cross_entropy(model(torch.from_numpy(image)[None])[0], torch.tensor([label]))
        loss.backward()
        expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).tolist()
        found = page.evaluate(
            "(at) => toy_gradients(unpack_layers(contents.toy.layers), unpack(contents.toy.images[at]),"
            " contents.toy.labels[at])",
            at,
        )
        assert found["gradients"] == pytest.approx(expected, abs=1e-5)
        assert found["loss"] == pytest.approx(loss.item(), abs=1e-5)
        of_kernel += expected[:9]
    assert any(of_kernel)


@needs_browser
def test_toy_steps(page):
    """Steps from a chosen epoch and after an edit are those of torch's Adam."""

    def parameters() -> list[float]:
        rows = page.locator("#step-table tr:has(td)").all_inner_texts()
        return [to_number(row.split("\t")[1]) for row in rows]

    model = fresh(build_toy_cnn, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=contents_rate(page))
    images = TOY_IMAGES.copy()
    page.locator("#toy-moment").press("Home")
    page.get_by_role("radio", name="label 1").check()
    for steps, button in ((1, "One step"), (10, "Ten steps")):
        for turn in range(steps):
            at = (turn + (steps == 10)) % 2
            optimizer.zero_grad()
            output = model(torch.from_numpy(images[at])[None])[0]
            F.binary_cross_entropy(output, torch.from_numpy(TOY_LABELS[at : at + 1])).backward()
            optimizer.step()
        page.get_by_role("button", name=button).click()
        expected = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()
        assert parameters() == pytest.approx(expected, abs=6e-5)
        images[1, 0, 0, 0] = 2
        page.get_by_label("Pixel, row 1, column 1").fill("2")
    assert page.locator("#toy-epoch").inner_text() == "after epoch 0 of 40 and 11 steps"
    page.locator("#toy-moment").press("ArrowRight")
    assert page.locator("#toy-epoch").inner_text() == "after epoch 1 of 40, edited"


@needs_browser
def test_step_losses(page):
    """The note on a step gives the losses of its image and of both, before and after it."""

    def losses(model) -> list[float]:
        outputs = model(torch.from_numpy(TOY_IMAGES)).flatten()
        return F.binary_cross_entropy(
            outputs, torch.from_numpy(TOY_LABELS).flatten(), reduction="none"
        ).tolist()

    model = fresh(build_toy_cnn, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=contents_rate(page))
    before = losses(model)
    F.binary_cross_entropy(
        model(torch.from_numpy(TOY_IMAGES[:1]))[0], torch.from_numpy(TOY_LABELS[:1])
    ).backward()
    optimizer.step()
    after = losses(model)
    page.locator("#toy-moment").press("Home")
    page.get_by_role("button", name="One step").click()
    note = page.locator("#step-note").inner_text()
    assert [to_number(found) for found in re.findall(r"\d\.\d{6}", note)] == pytest.approx(
        [before[0], after[0], np.mean(before), np.mean(after)], abs=2e-6
    )


@needs_browser
def test_browser_adam(page):
    """The browser's Adam arrives at the same weights as torch's."""
    gradients = np.random.default_rng(0).normal(0, [1e-4, 1, 100, *[0.1] * 9], (20, 12)).astype(np.float32)
    gradients[::3, 5] = 0
    weights = torch.zeros(12, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.01)
    for gradient in gradients:
        weights.grad = torch.from_numpy(gradient)
        optimizer.step()
    found = page.evaluate(
        """(gradients) => {
            let state = no_steps(), weights = Array(12).fill(0);
            for (const one of gradients) {
                const {steps, next} = adam(state, one, 0.01);
                weights = weights.map((weight, at) => weight + steps[at]);
                state = next;
            }
            return weights;
        }""",
        gradients.tolist(),
    )
    assert found == pytest.approx(weights.tolist(), abs=1e-6)


def contents_rate(page) -> float:
    rate = load_params(ROOT / "tests/helpers/params.yaml").train_toy_cnn.learning_rate
    assert page.evaluate("contents.toy.learning_rate") == rate
    return rate


@needs_browser
def test_dead_relu_stops_kernel(page):
    """With a dead ReLU, a step does not move the kernel."""
    page.get_by_label("Bias of the kernel").fill("-100")
    rows = [row.split("\t") for row in page.locator("#step-table tr:has(td)").all_inner_texts()]
    assert [to_number(row[2]) for row in rows[:11]] == [0] * 11
    assert to_number(rows[11][2]) != 0
    assert "so the kernel's gradient is 0" in page.locator("#step-working").inner_text()
    before = [row[1] for row in rows]
    page.get_by_role("button", name="One step").click()
    after = [row.split("\t")[1] for row in page.locator("#step-table tr:has(td)").all_inner_texts()]
    assert after[:11] == before[:11]
    assert after[11] != before[11]


@needs_browser
def test_pooling_winner(page, built):
    """The largest value of a pooling window is marked, and its place is given."""
    winner = page.locator("#toy-flow .winner")
    values = [
        to_number(text) for text in page.locator("#toy-flow figure").nth(2).locator(".cell").all_inner_texts()
    ]
    assert to_number(winner.inner_text()) == max(values)
    chosen = page.locator(".conv .chosen").first
    told = int(chosen.locator(".slider .value").inner_text().split()[0]) - 1
    _, image = picture(page, 0)
    with torch.inference_mode():
        maps = with_stored_weights(models(built)["original"])[0](to_input(torch.from_numpy(image)))
    window = maps[0, told, 12:14, 12:14]  # the page starts at row and column 14, counted from 1
    said = chosen.locator(".note").nth(1).inner_text()
    largest, row, column = re.search(r"pooling window is (\S+), in row (\d+), column (\d+)", said).groups()
    assert to_number(largest) == pytest.approx(window.max().item(), abs=1e-4)
    assert [int(row) - 13, int(column) - 13] == list(divmod(window.argmax().item(), 2))


@needs_browser
def test_products_of_chosen_map(page):
    """The products of any map of the layer before can be written out."""
    working = page.locator("#conv-2-working")
    source = working.locator("button.name").nth(3)
    name, share = (
        source.inner_text(),
        working.locator("tr:has(button.name)").nth(3).inner_text().split("\t")[1],
    )
    source.click()
    assert working.locator("button[aria-pressed=true]").inner_text() == name
    rows = [row.split("\t") for row in working.locator("table").nth(1).locator("tr").all_inner_texts()]
    assert rows[0][1] == name
    *products, total = [to_number(row[-1]) for row in rows[1:]]
    assert len(products) == 9
    assert total == pytest.approx(to_number(share), abs=1e-4)
    assert sum(products) == pytest.approx(total, abs=1e-3)


@needs_browser
def test_narrow_screen(built):
    """On a narrow screen, each part stays folded until its link is followed."""
    with open_page(390, 900) as page:
        page.goto((built / build_page.PAGE).as_uri())
        assert page.evaluate("document.documentElement.scrollHeight") < 4000
        assert not page.locator("#moved-image").is_visible()
        page.get_by_role("link", name="3 Shifted and rotated").click()
        assert page.locator("#moved-image").is_visible()


@needs_browser
def test_confusion_images(page):
    """Each kind of confusion has an image to show."""
    for name in ("original", "augmented"):
        page.get_by_label(f"{name} images", exact=True).check()
        kinds = page.evaluate(
            "(name) => contents.cnns[name].mistakes.map((row) => [row.label, row.prediction])", name
        )
        framed = page.locator("#cnn-confusion button").count()
        assert framed == len({tuple(kind) for kind in kinds})


@needs_browser
def test_choose_and_move_image(page, built):
    """The image that is chosen and moved by keyboard is the one that the CNNs read."""
    images, labels = garments(2000, 1)
    shown = page.evaluate("contents.images")
    assert len(shown) == 30
    split = load_params(ROOT / "tests/helpers/params.yaml").split
    _, val = split_indices(2000, split.val_size, split.train_size, split.seed)
    assert {one["index"] for one in shown} <= set(val.tolist())
    for one in shown:
        assert one["label"] == CLASSES[labels[one["index"]]]
    page.locator("#picker button").nth(17).press("Enter")
    image = images[shown[17]["index"]][None]
    for name, model in models(built).items():
        page.get_by_label(f"{name} images", exact=True).check()
        with torch.inference_mode():
            probabilities = model(to_input(torch.from_numpy(image))).softmax(1)[0]
        assert page.locator("#cnn-bars .share").all_inner_texts() == [
            f"{100 * one:.1f} %" for one in probabilities
        ]
    for name, keys in (("x", 3), ("y", 2), ("angle", 10)):
        for _ in range(keys):
            page.locator(f"#moved-{name}").press("ArrowRight")
    for transform, amount in (("rotation", 10), ("shift_x", 3), ("shift_y", 2)):
        image = evaluation.move(image, transform, amount)
    for name, model in models(built).items():
        with torch.inference_mode():
            probabilities = model(to_input(torch.from_numpy(image))).softmax(1)[0]
        found = page.locator(f"#moved-{name} .share").all_inner_texts()
        assert [float(text.split()[0]) for text in found] == pytest.approx(
            (100 * probabilities).tolist(), abs=0.25
        )


@needs_browser
def test_accuracy_curves(page, built):
    """The solid line shows val accuracy, and the dashed line shows train accuracy."""
    last = json.loads(page.locator("#contents").text_content())["cnns"]["original"]["curve"]
    height = "(kind) => document.querySelector(`#cnn-curves path.curve.original${kind}`).getBBox().y"
    line, dashes = (page.evaluate(height, kind) for kind in (":not(.train)", ".train"))
    assert last["val_accuracy"][-1] > last["train_accuracy"][-1]
    assert line < dashes  # y grows downwards


@needs_browser
def test_values_of_curves(page, built):
    """The curves show the values of the epoch below the pointer."""
    rows = table(built / "metrics/train_cnn/original.csv")
    page.locator("#cnn-curves svg").hover()
    shown = [text.splitlines() for text in page.locator("#cnn-curves .area title").all_text_contents()]
    assert [one[0] for one in shown] == [f"epoch {row['epoch']}" for row in rows]
    for one, row in zip(shown, rows, strict=True):
        for kind in ("val", "train"):
            accuracy = 100 * float(row[f"{kind}_accuracy"])
            [value] = [line.split(": ")[1] for line in one if line.startswith(f"original, {kind}: ")]
            assert float(value.removesuffix(" %")) == pytest.approx(accuracy, abs=0.06)


@needs_browser
def test_confusion_cell(page, built):
    """A click on a cell of the confusion matrix shows its images."""
    counts = json.loads((built / "metrics/evaluate_cnn/original_mistakes.json").read_text())["surest"]
    row = counts[0]
    same = [one for one in counts if one["label"] == row["label"]]
    page.get_by_role("button", name=re.compile(f"of {row['label']} are read as {row['prediction']}")).click()
    assert page.locator("#cnn-mistakes canvas").count() == len(same)


@needs_browser
def test_choose_map_by_keyboard(page):
    """A map and one of its cells can be chosen by keyboard."""
    slider = page.get_by_role("slider", name="Map").first
    slider.press("Home")
    slider.press("ArrowRight")
    title = page.locator("#conv-1-working h4")
    assert title.inner_text() == "Map 2, row 14, column 14"
    cell = page.locator(".conv canvas[tabindex]").first
    cell.press("ArrowUp")
    cell.press("ArrowLeft")
    assert title.inner_text() == "Map 2, row 13, column 13"


@needs_browser
def test_residual_steps(residual_page, built_residual):
    """Every step of a residual CNN has torch's values and a description.

    This compares the maps of image 3 in part 2, and reads the words above them.
    """
    page = residual_page
    page.locator("#picker button").nth(3).click()
    _, image = picture(page, 3)
    values = to_input(torch.from_numpy(image))
    model = models(built_residual)["original"]
    steps = page.evaluate(
        "forward(networks.original, to_input(unpack_bytes(contents.images[3].pixels)))"
        ".map(({values}) => [...values])"
    )
    kinds = page.evaluate("networks.original.map(({type}) => type)")
    place = -1
    with torch.inference_mode():
        for layer in model:
            values = layer(values)
            place += 4 if isinstance(layer, Residual) else 1  # convolution, batch norm, Add, ReLU
            assert np.abs(np.array(steps[place]) - values.flatten().numpy()).max() < 0.005, kinds[place]
    assert place == len(kinds) - 1
    words = page.locator("#cnn-convs .atlases").nth(0).locator("figcaption").all_inner_texts()
    assert words[1:4] == ["Max pooling, 2×2", "Batch norm", "ReLU"]
    words = page.locator("#cnn-convs .atlases").nth(1).locator("figcaption").all_inner_texts()
    assert words[1:4] == ["Batch norm", "Sum with the block's input (skip connection)", "ReLU"]
    assert "the mean logits of six views" in page.locator("#cnn-bars-title").inner_text()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert page.locator("#cnn-parameters").inner_text() == f"{count:,}"
    # A corner cell of a padded convolution: five of its patch's nine cells are outside, so they are zeros.
    page.get_by_role("slider", name="Map").nth(1).press("Home")
    cell = page.locator(".conv canvas[tabindex]").nth(1)
    for key in ["ArrowUp", "ArrowLeft"] * 14:
        cell.press(key)
    assert page.locator("#conv-2-working h4").inner_text() == "Map 1, row 1, column 1"
    inner = next(layer for layer in model if isinstance(layer, Residual))[0]
    before = np.array(steps[3]).reshape(32, 13, 13)[:, :2, :2]
    shares = (before * inner.weight[0, :, 1:, 1:].detach().numpy()).sum((1, 2))
    row = page.locator("#conv-2-working tr:has(td)").first.inner_text().split("\t")
    largest = np.abs(shares).argmax()
    assert row[0] == f"map {largest + 1}"
    assert to_number(row[1]) == pytest.approx(shares[largest], abs=0.002)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 800, 1400])
@pytest.mark.parametrize("which", ["built", "built_residual"])
def test_accessibility(request, which, width, scheme):
    """The page fits the screen and has no serious accessibility violation."""
    from axe_playwright_python.sync_playwright import Axe

    with open_page(width, 900, color_scheme=scheme) as page:
        page.goto((request.getfixturevalue(which) / build_page.PAGE).as_uri())
        page.evaluate("folds.forEach((fold) => (fold.open = true))")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        found = Axe().run(page).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert [(one["id"], one["nodes"][0]["html"][:100]) for one in serious] == []


def test_page_is_reproducible(built, monkeypatch):
    """The page is small and consists of the same bytes each time it is built."""
    monkeypatch.chdir(built)
    before = build_page.PAGE.read_bytes()
    assert len(before) < LIMIT
    assert build(monkeypatch, *garments(2000, 1)) == before


def test_page_is_self_contained(built):
    """The page requests nothing from elsewhere."""
    text = (built / build_page.PAGE).read_text()
    assert "default-src 'none'" in text
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", text)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)


@needs_browser
def test_large_params(workspace, monkeypatch):
    """With large params, the page is below the size limit and says what it left out."""
    write_results(epochs=1000, toy_epochs=2600, mistakes=100)
    images, labels = garments(2000, 1)
    assert len(build(monkeypatch, images, labels)) < LIMIT
    with open_page(1400, 900) as page:
        page.goto((workspace / build_page.PAGE).as_uri())
        assert "The curve shows one epoch in 6" in page.locator("#toy-note").inner_text()
        assert "One epoch in 2" in page.locator("#cnn-curves").inner_text()


@needs_browser
@pytest.mark.parametrize("of", MODELS)
def test_diverged_training(workspace, monkeypatch, of):
    """The page says that a training diverged."""
    write_results(epochs=1, toy_epochs=1, diverged=True, of=of)
    build(monkeypatch, *garments(2000, 1))
    with open_page(1400, 900) as page:
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto((workspace / build_page.PAGE).as_uri())
        for place in ("#cnn-label", "#moved-label"):
            assert "gives no number: its training diverged" in page.locator(place).inner_text()
        assert page.locator("#cnn-bars .share").all_inner_texts() == ["–"] * 10
        assert page.locator("#toy-loss circle").count() == 2  # a curve of one epoch, and the loss now
        assert faults == []


@pytest.mark.parametrize("rows", [1, 2, POINTS, POINTS + 1, 1001])
def test_thin_curve(rows):
    """A curve is thinned evenly and keeps its first and last epoch."""
    made = contents.curve([{"epoch": n, "loss": float("nan") if n == 1 else 0.5} for n in range(1, rows + 1)])
    assert made["epochs"] == rows
    assert len(made["epoch"]) <= POINTS + 1
    assert [made["epoch"][0], made["epoch"][-1]] == [1, rows]
    assert set(np.diff(made["epoch"][:-1])) <= {made["step"]}
    assert made["loss"][0] is None


def test_few_val_images():
    """If there are only a few val images, all of them are shown."""
    images, labels = garments(50, 1)
    val = np.array([3, 7, 20])
    shown = contents.examples(images, labels, val)
    assert sorted(one["index"] for one in shown) == [3, 7, 20]


@pytest.mark.parametrize("path", ["models/toy_cnn_history.csv", "models/cnn_original.safetensors"])
@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_text("epoch,kernel_00\n0,0.5\n")])
def test_damaged_file(built, tmp_path, monkeypatch, path, spoil):
    """A missing or damaged file is named in the error."""
    folder = shutil.copytree(built, tmp_path / "copy")
    monkeypatch.chdir(folder)
    spoil(folder / path)
    with pytest.raises((StageError, FileNotFoundError), match=re.escape(path)):
        build(monkeypatch, *garments(2000, 1))


def test_page_command(built, workspace):
    """The command page says where the page is, or which command makes it."""

    def make_page(folder):
        command = [sys.executable, "-m", "fashion_cnn", "page"]
        settings = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "BROWSER")}
        return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)

    assert make_page(built).stdout == "page/fashion-cnn.html: open it in a browser\n"
    missing = make_page(workspace)
    fault = "error: page/fashion-cnn.html: not found, expected the page that `make repro` writes\n"
    assert (missing.returncode, missing.stderr) == (1, fault)


def test_linked_page(workspace, monkeypatch):
    """A page that is a link is opened under its own name."""
    opened = []
    monkeypatch.setattr(command.webbrowser, "open", opened.append)
    monkeypatch.setattr(command, "can_show", lambda: True)
    (workspace / "cached").touch()
    (workspace / "page").mkdir()
    (workspace / build_page.PAGE).symlink_to(workspace / "cached")
    command.main()
    assert opened == [(workspace / build_page.PAGE).as_uri()]


def test_page_colours():
    """The page's colours are those of the figures."""
    style = (PACKAGE / "page/style.css").read_text()
    for name, color in figures.COLORS.items():
        assert f"--{name}: {color};" in style
