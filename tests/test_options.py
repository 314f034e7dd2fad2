"""The training options that recipes combine, each against values computed in another way."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

import small_stages as small
from fashion_cnn.models.cnns import CNN_SHAPE, MODELS, build_cnn, fresh, load_cnn, save_weights, summarize
from fashion_cnn.models.residual import Residual
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import write_tensors
from fashion_cnn.training.batches import (
    COUNT,
    DOWN,
    FLIP,
    INDEX,
    RIGHT,
    VARIANT,
    cut,
    draw_epoch,
    halve_easy,
    length,
)
from fashion_cnn.training.loop import TrainStep
from fashion_cnn.training.optimizer import MOMENTUM, Muon, build_optimizer, orthogonal, scheduled, set_rate

CPU = torch.device("cpu")
TRAIN = np.arange(100, 1100)


def options(**changes) -> SimpleNamespace:
    return SimpleNamespace(**small.PARAMS["train_cnn"] | {"seed": 3, "learning_rate": 0.01} | changes)


# Moves of a batch


def test_draw_epoch():
    """An epoch draws every image once and by default moves none."""
    takes = draw_epoch(TRAIN, 3, options(), 1)
    assert sorted(takes[:, INDEX]) == TRAIN.tolist()
    assert set(takes[:, VARIANT]) == {0, 1, 2}
    assert not takes[:, [FLIP, DOWN, RIGHT]].any()
    assert (takes[:, COUNT] == 1).all()


def test_moves_keep_order():
    """Flips and shifts change neither the order of the images nor their variants."""
    plain, moved = draw_epoch(TRAIN, 3, options(), 2), draw_epoch(TRAIN, 3, options(flips=True, shift=4), 2)
    assert (plain[:, [INDEX, VARIANT]] == moved[:, [INDEX, VARIANT]]).all()


def test_alternating_flips():
    """With flips, each image is mirrored in every other epoch."""
    flips = []
    for epoch in range(1, 5):
        takes = draw_epoch(TRAIN, 1, options(flips=True), epoch)
        flips.append(takes[takes[:, INDEX].argsort(), FLIP])
    assert (flips[0] == flips[2]).all()
    assert (flips[1] == flips[3]).all()
    assert (flips[0] == 1 - flips[1]).all()
    assert 400 < flips[0].sum() < 600  # six standard deviations


def test_uniform_shifts():
    """Shifts are uniform on both axes and drawn anew in each epoch."""
    drawn = np.concatenate([draw_epoch(TRAIN, 1, options(shift=2), epoch) for epoch in range(1, 11)])
    for axis in (DOWN, RIGHT):
        values, counts = np.unique(drawn[:, axis], return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        assert (abs(counts - 2000) < 240).all()  # six standard deviations
    assert abs(np.corrcoef(drawn[:, DOWN], drawn[:, RIGHT])[0, 1]) < 0.06
    assert (drawn[:1000, DOWN] != drawn[1000:2000, DOWN]).any()


def test_halve_easy():
    """Half of the easy images are left out, and the other half count twice."""
    losses = np.random.default_rng(0).random(1100)
    whole = draw_epoch(TRAIN, 3, options(), 4)
    takes = halve_easy(whole.copy(), losses, options(prune_easy=0.6), 4)
    easy = {index for index in TRAIN if (losses[TRAIN] < losses[index]).sum() < 600}
    assert len(takes) == length(1000, options(prune_easy=0.6), 4) == 700
    assert set(TRAIN) - set(takes[:, INDEX]) < easy
    assert {index for index in takes[takes[:, COUNT] == 2, INDEX]} == easy & set(takes[:, INDEX])
    assert takes[:, COUNT].sum() == 1000
    rest = whole[np.isin(whole[:, INDEX], takes[:, INDEX])]
    assert (takes[:, :COUNT] == rest[:, :COUNT]).all()  # order, variants and moves stay the same


@pytest.mark.parametrize("n", [9, 10])  # with an odd number of easy images, one counts once
def test_halve_easy_by_epoch(n):
    """Each epoch leaves out different images, and the first leaves out none."""
    left = []
    for epoch in range(1, 40):
        takes = draw_epoch(TRAIN[:n], 1, options(), epoch)
        takes = halve_easy(takes, np.zeros(1100), options(prune_easy=1), epoch)
        assert takes[:, COUNT].sum() == n
        left.append(set(TRAIN[:n]) - set(takes[:, INDEX]))
    assert [len(indices) for indices in left] == [0] + 38 * [n // 2]
    assert set.union(*left) == set(TRAIN[:n])


def test_halve_easy_draws_separately():
    """The draw of the images to leave out is separate from the draw of their order.

    If all are easy in the order of their indices, the order's draw would drop the epoch's first half.
    """
    indices = np.arange(1000)
    takes = draw_epoch(indices, 1, options(), 2)
    kept = halve_easy(takes.copy(), indices, options(prune_easy=1), 2)
    assert 200 < np.isin(takes[:500, INDEX], kept[:, INDEX]).sum() < 300  # 250 ± 47 (six standard deviations)


def test_step_weighs_losses(images):
    """A step keeps the loss of each image and weighs it by the image's count."""
    model = fresh(build_cnn, 0)
    takes = F.pad(torch.arange(6)[:, None], (0, 5))
    takes[:, COUNT] = torch.tensor([1, 2, 1, 2, 2, 1])
    labels = torch.tensor([0, 3, 9, 9, 1, 5])
    params = options(prune_easy=0.5, label_smoothing=0.1)
    step = TrainStep(
        model, build_optimizer(model, params, CPU), torch.from_numpy(images[None]), labels, params
    )
    logits = model(torch.from_numpy(images[:6, None] / 255).float()).detach()
    each = F.cross_entropy(logits, labels[:6], label_smoothing=0.1, reduction="none")
    # The same with repeated images and a loss without counts.
    twice = fresh(build_cnn, 0)
    other = TrainStep(
        twice, build_optimizer(twice, options(), CPU), torch.from_numpy(images[None]), labels,
        options(label_smoothing=0.1),
    )  # fmt: skip
    step(takes)
    repeated = takes.repeat_interleave(takes[:, COUNT], dim=0)
    repeated[:, COUNT] = 1
    other(repeated)
    assert torch.allclose(step.losses[:6], each, atol=1e-6)
    assert step.means() == pytest.approx(other.means(), rel=1e-5)
    for parameter, expected in zip(model.parameters(), twice.parameters(), strict=True):
        assert torch.allclose(parameter.grad, expected.grad, atol=1e-6)


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize(("down", "right"), [(0, 0), (3, 0), (-2, 1), (0, -28), (14, 14)])
def test_cut(images, flip, down, right):
    """A take is its image, mirrored and then shifted."""
    pool = np.stack([images, 255 - images])
    takes = torch.tensor([[5, 1, flip, down, right, 1], [2, 0, 0, 0, 0, 1]])
    found = cut(torch.from_numpy(pool), takes, moved=True).numpy()
    source = pool[1, 5][:, ::-1] if flip else pool[1, 5]
    expected = np.zeros((28, 28), np.uint8)
    for row in range(28):
        for column in range(28):
            if 0 <= row - down < 28 and 0 <= column - right < 28:
                expected[row, column] = source[row - down, column - right]
    assert (found[0] == expected).all()
    assert (found[1] == pool[0, 2]).all()
    assert found.dtype == np.uint8


# The learning rate, the step


def test_one_cycle():
    """The one-cycle rate rises for a fifth of the steps and then falls to nearly 0."""
    params = options(schedule="one-cycle", learning_rate=0.5)
    rates = [scheduled(params, step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([2.5 / 101, 5 / 101, 7.5 / 101])
    assert 0.49 < max(rates) <= 0.5
    assert 19 <= np.argmax(rates) <= 20
    assert rates[60] == pytest.approx(0.625 * 40 / 101)
    assert rates[99] == pytest.approx(0.625 / 101)
    assert 0 < scheduled(params, 0, 1) <= 0.5  # a training of one step learns, too
    assert {scheduled(options(), step, 100) for step in range(100)} == {0.01}


@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)])
def test_set_rate(rate):
    """The next step uses the rate that has been set."""
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0)
    weight.grad = torch.ones(4, 4)
    set_rate(optimizer, 0.25)
    optimizer.step()
    assert weight.detach().numpy() == pytest.approx(np.full((4, 4), 0.75))  # Adam's first step is the rate


def test_weight_decay():
    """Weights decay, whereas biases and scales do not."""
    model = fresh(lambda: build_cnn("residual"), 0)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, options(learning_rate=0.1, weight_decay=0.5), CPU).step()
    for name, parameter in model.named_parameters():
        kept = 0.95 if name.endswith("weight") and parameter.ndim > 1 else 1
        assert torch.allclose(parameter, kept * before[name]), name


def test_orthogonal():
    """Muon makes all directions of a step count about equally."""
    torch.manual_seed(0)
    matrix = torch.randn(24, 100) @ torch.diag(torch.linspace(0.1, 1, 100))
    left, _, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    nearest = left @ right  # the nearest matrix whose singular values are all 1
    found = orthogonal(matrix).numpy()
    values = np.linalg.svd(found, compute_uv=False)
    assert 0.6 < values.min() < values.max() < 1.3
    assert (found * nearest).sum() / np.linalg.norm(found) / np.linalg.norm(nearest) > 0.97
    assert np.allclose(orthogonal(1000 * matrix).numpy(), found, atol=1e-4)
    assert np.allclose(orthogonal(matrix.T).numpy(), found.T, atol=1e-4)
    assert (orthogonal(torch.zeros(3, 9)) == 0).all()


def test_muon_and_adamw():
    """Muon moves the convolutions by its own steps and everything else by AdamW's.

    The reference is torch.optim.Muon, which computes in bfloat16 and takes only matrices.
    """
    settings = {"learning_rate": 0.1, "weight_decay": 0.5}
    ours, other = (fresh(lambda: build_cnn("residual"), 0) for _ in range(2))
    optimizer = build_optimizer(ours, options(optimizer="muon", **settings), CPU)
    adamw = build_optimizer(other, options(**settings), CPU)
    start = {name: weight.detach().clone() for name, weight in other.named_parameters() if weight.ndim == 4}
    matrices = {name: torch.nn.Parameter(weight.flatten(1).clone()) for name, weight in start.items()}
    muon = torch.optim.Muon(
        matrices.values(), lr=0.1, weight_decay=0.5, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for (name, weight), parameter in zip(ours.named_parameters(), other.parameters(), strict=True):
            weight.grad = torch.randn_like(weight)
            parameter.grad = weight.grad.clone()
            if name in matrices:
                matrices[name].grad = weight.grad.flatten(1).clone()
        for one in (optimizer, adamw, muon):
            one.step()
    for (name, weight), parameter in zip(ours.named_parameters(), other.parameters(), strict=True):
        if name in matrices:
            # torch's momentum is a mean, and it rounds to bfloat16.
            moved, expected = (
                tensor.flatten(1) - start[name].flatten(1) for tensor in (weight, matrices[name])
            )
            assert (moved - expected).norm() < 0.02 * expected.norm(), name
        else:
            assert torch.equal(weight, parameter), name


def test_muon_tensor_rate():
    """Muon takes the same steps if its rate is a tensor, as it is where a graph reads it."""
    moved = []
    for rate in (0.5, torch.tensor(0.5)):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
        optimizer = Muon([weight], lr=rate, fused=False)
        for rate in (0.25, 0.125):
            weight.grad = torch.randn_like(weight)
            set_rate(optimizer, rate)
            optimizer.step()
        moved.append(weight.detach())
    assert torch.allclose(*moved, atol=1e-6)


def test_rate_of_any_value(monkeypatch):
    """A rate can be changed to any other number, also where a graph reads it.

    On a GPU, AdamW is made capturable, and its rate is a tensor.
    """
    asked = {}
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **settings: asked.update(settings))
    build_optimizer(build_cnn(), options(learning_rate=1), torch.device("cpu"))
    assert (asked["lr"], asked["capturable"]) == (1, False)
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda value, device: tensor(value))
    build_optimizer(build_cnn(), options(learning_rate=1), torch.device("cuda"))
    assert asked["capturable"]
    asked["lr"].fill_(0.25)
    assert asked["lr"].item() == 0.25


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_smoothing(images, smoothing):
    """The loss is cross-entropy with a share of each label spread over all classes."""
    model = fresh(build_cnn, 0)
    with torch.inference_mode():
        shares = model(torch.from_numpy(images[:6, None] / 255).float()).double().softmax(1).numpy()
    labels = np.array([0, 3, 9, 9, 1, 5])
    target = (1 - smoothing) * np.eye(10)[labels] + smoothing / 10
    params = options(label_smoothing=smoothing)
    step = TrainStep(
        model,
        build_optimizer(model, params, CPU),
        torch.from_numpy(images[None]),
        torch.from_numpy(labels),
        params,
    )
    takes = F.pad(torch.arange(6)[:, None], (0, 5))
    takes[:, COUNT] = 1
    step(takes)
    assert step.loss_sum.item() == pytest.approx(-(target * np.log(shares)).sum(), rel=1e-5)
    assert step.correct.item() == (shares.argmax(1) == labels).sum()


# The models


def test_residual_block():
    """A residual block adds its layers' outputs to its inputs before the ReLU."""
    block = Residual(torch.nn.Conv2d(1, 1, 1))
    block[0].weight.data.fill_(-3)
    block[0].bias.data.fill_(1)
    values = torch.tensor([[[[-2.0, 0.25, 2.0]]]])
    assert block(values).flatten().tolist() == [5, 0.5, 0]  # v - 3v + 1, and 0 for -3


def test_fresh_residual_block():
    """A fresh residual block returns unchanged what comes out of the ReLU before it."""
    model = fresh(lambda: build_cnn("residual"), 1).eval()
    [first, *_] = [layer for layer in model if isinstance(layer, Residual)]
    values = torch.rand(2, 32, 13, 13)
    assert torch.equal(first(values), values)


@pytest.mark.parametrize("name", MODELS)
def test_model_sizes(name):
    """Every model reads images and has at most as many parameters as the lesson's."""
    model = build_cnn(name)
    assert model(torch.rand(3, 1, 28, 28)).shape == (3, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 896_522


@pytest.mark.parametrize("name", MODELS)
def test_summary_of_views(name):
    """The table of a model with several views lists each layer once."""
    plain, several = (build_cnn(name, views).eval() for views in (1, 2))
    assert summarize(several, CNN_SHAPE) == summarize(plain, CNN_SHAPE)
    count = sum(parameter.numel() for parameter in plain.parameters())
    assert f"Total params: {count:,}\n" in summarize(several, CNN_SHAPE)
    assert not several.training  # the summary uses a copy


@pytest.mark.parametrize("views", [2, 6])
@pytest.mark.parametrize("name", MODELS)
def test_views(name, views):
    """A model with several views returns the weighted mean of their logits and trains on one view."""
    plain, several = (fresh(lambda views=views: build_cnn(name, views), 2).eval() for views in (1, views))
    images = torch.rand(3, 1, 28, 28)
    moved = [images.numpy()]
    if views == 6:
        moved += [np.zeros_like(moved[0]), np.zeros_like(moved[0])]
        moved[1][..., 1:, 1:] = moved[0][..., :-1, :-1]
        moved[2][..., :-1, :-1] = moved[0][..., 1:, 1:]
    moved += [view[..., ::-1].copy() for view in moved]
    counts = [2, 1, 1] if views == 6 else [1]  # shifted views count half
    read = np.stack([plain(torch.from_numpy(view)).detach().numpy() for view in moved])
    expected = torch.from_numpy(np.average(read, axis=0, weights=counts + counts)).float()
    assert len(moved) == views
    assert torch.allclose(several(images), expected, atol=1e-6)
    assert not torch.allclose(several(images), plain(images), atol=1e-3)
    assert torch.equal(several.train()(images), plain.train()(images))


# The file of weights


@pytest.mark.parametrize("views", [1, 2, 6])
@pytest.mark.parametrize("name", MODELS)
def test_weights_name_their_model(tmp_path, name, views):
    """A file of weights says which model they belong to, and it is loaded as that model."""
    model = fresh(lambda: build_cnn(name, views), 5)
    model(torch.rand(8, 1, 28, 28))  # updates batch norm's statistics
    for file in ("a", "b"):
        save_weights(model, tmp_path / file)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = load_cnn(tmp_path / "a")
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(again(images), model.eval()(images))
    with safe_open(tmp_path / "a", framework="numpy") as file:
        expected = {"lesson": None, "residual": {"model": "residual"}}[name]
        assert file.metadata() == ({"model": f"{name}, {views} views"} if views > 1 else expected)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"model": "vgg"}, "weights of a model vgg, expected lesson or residual, with 2 or 6 views or none"),
        ({"model": "lesson upside down"}, "weights of a model lesson upside down, expected lesson"),
        ({"model": "residual, 3 views"}, "weights of a model residual, 3 views, expected lesson"),
        ({"model": "residual"}, "weights do not fit the model"),
        ({"model": ""}, "expected lesson or residual"),
    ],
)
def test_other_weights_are_refused(tmp_path, about, words):
    """Weights of another model are refused in one line that names the file."""
    tensors = {name: tensor.numpy() for name, tensor in build_cnn().state_dict().items()}
    write_tensors(tmp_path / "w.safetensors", tensors, about)
    with pytest.raises(StageError) as raised:
        load_cnn(tmp_path / "w.safetensors")
    assert str(tmp_path / "w.safetensors") in str(raised.value)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
