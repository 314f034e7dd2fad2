"""The GPU path; skipped without a GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import small_stages as small
from fashion_cnn.models.cnns import build_cnn, fresh
from fashion_cnn.models.device import prepare_torch
from fashion_cnn.project.files import read_json
from fashion_cnn.training.batches import draw_epoch
from fashion_cnn.training.checkpoints import Checkpoint
from fashion_cnn.training.cuda_graph import GraphedStep
from fashion_cnn.training.loop import TrainStep, train_cnn
from fashion_cnn.training.optimizer import build_optimizer, set_rate
from fashion_cnn.training.train_data import TrainData

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # torch lists the pooling gradient as nondeterministic; that is true only for overlapping windows.
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
]

LESSON = small.PARAMS["train_cnn"] | {"epochs": 3}
RECIPE = LESSON | {
    "model": "residual", "optimizer": "muon", "schedule": "one-cycle", "weight_decay": 0.1,
    "label_smoothing": 0.1, "flips": True, "shift": 2, "prune_easy": 0.5, "tta_views": 6,
}  # fmt: skip
each = pytest.mark.parametrize("options", [LESSON, RECIPE], ids=["lesson", "recipe"])
RNG = np.random.default_rng(0)
POOL = RNG.integers(0, 256, (2, 120, 28, 28), np.uint8)  # of two variants
LABELS = RNG.integers(0, 10, 120).astype(np.uint8)
TRAIN, VAL = np.arange(100), np.arange(100, 120)  # six batches of 16 and one of 4


@pytest.fixture(autouse=True)
def device():
    yield prepare_torch("cuda")
    prepare_torch("cpu")


@each
def test_graph_matches_step(device, options):
    """The CUDA graph gives the same bytes as the step that it captures."""

    def run(wrap):
        params = SimpleNamespace(**options)
        model = fresh(lambda: build_cnn(params.model), 0).to(device)
        optimizer = build_optimizer(model, params, device)
        targets = torch.from_numpy(LABELS).to(device, torch.int64)
        step = TrainStep(model, optimizer, torch.from_numpy(POOL).to(device), targets, params)
        run_step = wrap(step)
        for epoch in range(1, 4):
            for takes in torch.from_numpy(draw_epoch(TRAIN, 2, params, epoch)).to(device).split(16):
                set_rate(optimizer, 0.001 * epoch)
                run_step(takes)
        return [*model.state_dict().values(), step.losses], step.means()

    plain, means = run(lambda step: step)
    graphed, graphed_means = run(lambda step: GraphedStep(step, 16, device))
    assert all(torch.equal(one, other) for one, other in zip(plain, graphed, strict=True))
    assert means == graphed_means


@each
def test_resume_after_kill(device, options, tmp_path):
    """A killed training resumes and ends with the same weights."""
    data = TrainData(POOL, LABELS, TRAIN, VAL, {})

    class Killed(Exception):
        pass

    def kill(row, _):
        if row["epoch"] == 2:
            raise Killed

    def train(seed, folder, on_epoch=lambda row, speed: None):
        model = fresh(lambda: build_cnn(options["model"]), seed)
        rows = train_cnn(
            model, data, SimpleNamespace(**options), device, Checkpoint("key", folder, 9), on_epoch
        )
        return model.state_dict(), rows

    whole, rows = train(0, tmp_path / "whole")
    with pytest.raises(Killed):
        train(0, tmp_path / "killed", kill)
    resumed, resumed_rows = train(1, tmp_path / "killed")
    assert resumed_rows == rows
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_stages_same_bytes(tmp_path):
    """The stages give the same bytes again, and nearly the same numbers as on the CPU."""
    found = []
    for number, name in enumerate(("cuda", "cuda", "cpu")):
        folder = tmp_path / str(number)
        small.make_data(folder)
        small.run_stage(folder, "train_cnn", "original", train_cnn__device=name)
        small.run_stage(folder, "evaluate_cnn", "original", evaluate_cnn__device=name)
        found.append(folder)
    once, again, on_cpu = found
    assert small.contents(once) == small.contents(again)
    curves = [small.table(folder / "metrics/train_cnn/original.csv") for folder in (once, on_cpu)]
    for row, same in zip(*curves, strict=True):  # convolutions on a GPU use TF32
        assert float(row["train_loss"]) == pytest.approx(float(same["train_loss"]), rel=0.01)
    test_images, test_labels = (small.read_data(once, f"TEST_{kind}") for kind in ("IMAGES", "LABELS"))
    loss, _ = small.evaluate(once / "models/cnn_original.safetensors", test_images, test_labels)
    assert read_json(once / "metrics/evaluate_cnn/original.json")["test_loss"] == pytest.approx(
        loss, rel=2e-3
    )
