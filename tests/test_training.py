"""Training on a few images: what an epoch sees, what it reports, and that it is reproducible."""

import contextlib
import hashlib
import io
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import safetensors.numpy
import torch
from filelock import FileLock, Timeout
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import small_stages as small
from fashion_cnn.models.cnns import build_cnn, fresh
from fashion_cnn.project import provenance
from fashion_cnn.project.provenance import digest, result_key
from fashion_cnn.training import checkpoints, loop
from fashion_cnn.training.batches import COUNT, draw_epoch
from fashion_cnn.training.checkpoints import Checkpoint, exclusive_checkpoint
from fashion_cnn.training.cuda_graph import GraphedStep
from fashion_cnn.training.loop import TrainStep, train_cnn
from fashion_cnn.training.optimizer import build_optimizer, set_rate
from fashion_cnn.training.train_data import TrainData

CPU = torch.device("cpu")
LESSON = small.PARAMS["train_cnn"] | {"epochs": 2, "batch_size": 5, "seed": 0}
LABELS = np.random.default_rng(3).permutation(16).astype(np.uint8) % 4  # in random order
TRAIN, VAL = np.arange(12), np.arange(12, 16)


def build_small() -> nn.Sequential:
    """The CNN's kinds of layers, a hundred times as fast."""
    return nn.Sequential(
        nn.Conv2d(1, 4, kernel_size=3),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(4, 6, kernel_size=3),  # several input channels, so that channels_last matters
        nn.Flatten(),
        nn.Linear(726, 10),
    )


@pytest.fixture
def train(tmp_path):
    """Train on the first twelve of sixteen images; every training has a checkpoint of its own."""

    def run(pool, model=None, checkpoint=None, on_epoch=lambda row, speed: None, **changes):
        settings = LESSON | changes
        model = model or fresh(build_small, 0)
        checkpoint = checkpoint or Checkpoint(f"{len(list(tmp_path.iterdir()))}", tmp_path, 9)
        data = TrainData(pool, LABELS, TRAIN, VAL, {})
        rows = train_cnn(model, data, SimpleNamespace(**settings), CPU, checkpoint, on_epoch)
        return model, rows

    return run


def test_overfits_twelve_images(train, images):
    """A training overfits twelve images."""
    _, rows = train(images[None], epochs=30, learning_rate=0.003)
    assert rows[-1]["train_accuracy"] == 1
    assert rows[-1]["train_loss"] < 0.5 < rows[0]["train_loss"]
    assert [row["epoch"] for row in rows] == list(range(1, 31))


def test_seed(train, images):
    """The same seed gives the same weights, and another seed gives others."""
    first, second, other = (train(images[None], seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first[5].weight, second[5].weight)
    assert not torch.equal(first[5].weight, other[5].weight)


def test_epoch_images(train, images):
    """An epoch takes every train image once and no other image."""
    seen = []
    model = fresh(build_small, 0)
    model.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone()) if module.training else None
    )
    train(images[None], model, epochs=1)
    assert [len(batch) for batch in seen] == [5, 5, 2]
    given = (torch.cat(seen)[:, 0] * 255).round().to(torch.uint8).numpy()
    assert sorted(image.tobytes() for image in given) == sorted(image.tobytes() for image in images[TRAIN])


def test_one_cycle(train, images, monkeypatch):
    """A cycle of the learning rate spans the steps of all epochs."""
    rates = []
    monkeypatch.setattr(loop, "set_rate", lambda optimizer, rate: rates.append(rate))
    train(images[None], schedule="one-cycle", learning_rate=0.1)
    done = [step / 7 for step in range(1, 7)]  # two epochs of three steps
    assert rates == pytest.approx([0.1 * min(part / 0.2, (1 - part) / 0.8) for part in done])


def test_variant_draws(train):
    """Variants are drawn uniformly for training and never for validation."""
    # Variant v of every image is filled with v, so a batch shows which variants it drew.
    pool = np.stack([np.full((16, 28, 28), variant, np.uint8) for variant in range(4)])
    drawn, validated = [], []

    def watch(module, args):
        values = (args[0][:, 0, 0, 0] * 255).round().int().tolist()
        (drawn if module.training else validated).extend(values)

    model = fresh(build_small, 0)
    model.register_forward_pre_hook(watch)
    train(pool, model, epochs=100, batch_size=12)
    assert set(validated) == {0}
    counts = np.bincount(drawn)
    # 1,200 draws: 300 of each expected; five standard deviations are 75.
    assert counts.sum() == 1200
    assert (abs(counts - 300) < 75).all()


def test_epoch_metrics(train, images):
    """An epoch's metrics are means over its images.

    Computed from the logits of every batch; the last batch has two images, the others five.
    """
    label_of = {image.tobytes(): label for image, label in zip(images, LABELS, strict=True)}
    seen = {True: [], False: []}  # loss and hit of each image, by whether the model trains

    def watch(module, args, logits):
        for pixels, row in zip((args[0][:, 0] * 255).round().to(torch.uint8).numpy(), logits, strict=True):
            label = label_of[pixels.tobytes()]
            loss = torch.logsumexp(row, 0) - row[label]
            seen[module.training].append((loss.item(), int(row.argmax()) == label))

    model = fresh(build_small, 0)
    model.register_forward_hook(watch)
    _, [row] = train(images[None], model, epochs=1, learning_rate=0.01)
    expected = {"epoch": 1}
    for split, trains in (("train", True), ("val", False)):
        losses, hits = zip(*seen[trains], strict=True)
        expected |= {f"{split}_loss": np.mean(losses), f"{split}_accuracy": np.mean(hits)}
    assert list(row) == list(expected)
    assert row == pytest.approx(expected, rel=1e-5)
    assert (len(seen[True]), len(seen[False])) == (12, 4)


def test_prune_easy(train, images):
    """Later epochs leave out half of the images that had the least loss.

    Computed from the logits of every batch; an image's loss is the one of when it was last seen.
    """
    label_of = {image.tobytes(): label for image, label in zip(images, LABELS, strict=True)}
    seen = []

    def watch(module, args, logits):
        if module.training:
            pixels = (args[0][:, 0] * 255).round().to(torch.uint8).numpy()
            keys = [image.tobytes() for image in pixels]
            losses = F.cross_entropy(
                logits, torch.tensor([int(label_of[key]) for key in keys]), reduction="none"
            )
            seen.append(dict(zip(keys, losses.tolist(), strict=True)))

    model = fresh(build_small, 0)
    model.register_forward_hook(watch)
    train(images[None], model, epochs=6, batch_size=12, prune_easy=0.5)
    assert [len(epoch) for epoch in seen] == [12, 9, 9, 9, 9, 9]
    last = dict(seen[0])
    for epoch in seen[1:]:
        easy = sorted(last, key=last.__getitem__)[:6]
        assert set(last) - set(epoch) < set(easy)
        last |= epoch


@pytest.mark.parametrize("learning_rate", [0.001, 0.004])
def test_first_step_size(train, images, learning_rate):
    """The first step moves weights by the learning rate.

    Adam's first step equals the learning rate for any gradient other than zero.
    """
    model, _ = train(images[None], epochs=1, batch_size=12, learning_rate=learning_rate)
    moved = (model[5].bias - fresh(build_small, 0)[5].bias).abs()
    assert moved.max().item() == pytest.approx(learning_rate, rel=1e-3)


def test_epoch_report(train, images, monkeypatch, capsys):
    """An epoch is reported with its images per second."""
    clock = iter([10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    heard = []
    _, rows = train(images[None], on_epoch=lambda row, speed: heard.append((row, speed)))
    assert heard == [(rows[0], 6.0), (rows[1], 3.0)]
    lines = [
        f"epoch {row['epoch']}/2: train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2%}; "
        f"val loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.2%}; {speed} images/s"
        for row, speed in zip(rows, (6, 3), strict=True)
    ]
    printed = capsys.readouterr()
    assert printed.out.splitlines() == lines
    assert printed.err == ""  # a bar only on a terminal


class Bar(tqdm):
    """The progress bar as on a terminal; it records what it shows after each change."""

    shown: ClassVar[list] = []

    def __init__(self, **settings):
        super().__init__(
            **settings | {"disable": False, "file": io.StringIO(), "mininterval": 0, "miniters": 1}
        )

    def refresh(self, **settings):
        assert self.unit == " images"
        self.shown.append((self.desc, self.n, self.total, self.postfix))
        return super().refresh(**settings)


@pytest.mark.parametrize(("easy", "second"), [(0.0, 12), (0.5, 9)])
def test_progress_bar(train, images, monkeypatch, tmp_path, easy, second):
    """The progress bar counts images and shows the means so far."""
    monkeypatch.setattr(loop, "tqdm", Bar)
    monkeypatch.setattr(loop, "REFRESH", 3)  # the last of each epoch's three batches
    monkeypatch.setattr(Bar, "shown", [])
    checkpoint = Checkpoint("k", tmp_path, 9)
    _, [first] = train(images[None], epochs=1, checkpoint=checkpoint, prune_easy=easy)
    assert Bar.shown[-1][:3] == ("epoch 1/1: ", 12, 12)
    means = f"accuracy={first['train_accuracy']:.2%}, loss={first['train_loss']:.4f}"
    assert Bar.shown[-1][3] == means
    Bar.shown.clear()
    train(images[None], epochs=2, checkpoint=Checkpoint("k", tmp_path, 9), prune_easy=easy)
    assert Bar.shown[0][1:3] == (12, 12 + second)  # starts where the first epoch ended
    assert Bar.shown[-1][:3] == ("epoch 2/2: ", 12 + second, 12 + second)


class Killed(Exception):
    """Stand-in for a kill between two epochs."""


OPTIONS = {
    "optimizer": "muon", "schedule": "one-cycle", "weight_decay": 0.1, "label_smoothing": 0.1,
    "flips": True, "shift": 2, "prune_easy": 0.5, "batch_size": 11,  # leaves a batch of one image
}  # fmt: skip


def build_residual() -> nn.Sequential:
    return build_cnn("residual", views=2)


@pytest.mark.parametrize(("build", "options"), [(build_small, {}), (build_residual, OPTIONS)])
def test_resume_killed_training(train, images, tmp_path, build, options):
    """A killed training resumes and ends with the same weights and rows."""
    pool = np.stack([images, 255 - images])
    train = partial(train, pool, epochs=4, **options)
    whole, whole_rows = train(model=fresh(build, 0))

    def kill(row, speed):
        if row["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train(model=fresh(build, 0), checkpoint=Checkpoint("k", tmp_path, 9), on_epoch=kill)
    heard = []
    resumed, rows = train(
        model=fresh(build, 1),  # other initial weights: all must come from the checkpoint
        checkpoint=Checkpoint("k", tmp_path, 9),
        on_epoch=lambda row, speed: heard.append(row["epoch"]),
    )
    assert heard == [3, 4]
    assert rows == whole_rows
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def flipped(content: bytes, at: int) -> bytes:
    """The content with the lowest bit of one byte flipped."""
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def renamed(content: bytes) -> bytes:
    """The same tensors and metadata, intact, but one tensor has another name."""
    size = int.from_bytes(content[:8], "little")
    return content[:8] + content[8 : 8 + size].replace(b'"losses"', b'"lossez"') + content[8 + size :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:100],
        lambda content: b"",
        lambda content: safetensors.numpy.save({}),
        lambda content: safetensors.numpy.save({"losses": np.zeros(16)}, {"rows": "[7]"}),
        renamed,
        *(partial(flipped, at=place) for place in (-1, -5000, -30_000)),
        lambda content: content.replace(b"train_loss", b"train_lass", 1),
    ],
)
def test_damaged_checkpoint(train, images, tmp_path, capsys, damage):
    """A training with a damaged checkpoint starts over."""
    _, rows = train(images[None], checkpoint=Checkpoint("k", tmp_path, 9))
    path = tmp_path / "k.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert train(images[None], checkpoint=Checkpoint("k", tmp_path, 9))[1] == rows
    assert "checkpoint k.safetensors is damaged (" in capsys.readouterr().out


def test_checkpoint_of_another_key(train, images, tmp_path):
    """A training does not resume the checkpoint of another key."""
    train(images[None], checkpoint=Checkpoint("k", tmp_path, 9))
    (tmp_path / "k.safetensors").rename(tmp_path / "other.safetensors")
    assert Checkpoint("other", tmp_path, 9).rows == []


@pytest.fixture
def key(tmp_path, monkeypatch):
    """result_key on a package of two modules; by default with the same stage, params, data and machine."""
    package = tmp_path / "fashion_cnn"
    modules = {name: SimpleNamespace() for name in ("schema", "layers")} | {"project/provenance": provenance}
    (package / "project").mkdir(parents=True)
    for name, module in modules.items():
        (package / f"{name}.py").write_text("1")
        monkeypatch.setattr(module, "__file__", str(package / f"{name}.py"), raising=False)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(provenance, "machine_tags", lambda: {"torch": "1"})
    return lambda stage="s", params=1, data="d": result_key(stage, {"params": params}, data)


def test_same_key(key, tmp_path):
    """The same training has the same key."""
    before = key()
    (tmp_path / "fashion_cnn/schema.py").write_text("2")  # it changes no result
    assert key() == before


@pytest.mark.parametrize("change", [{"stage": "t"}, {"params": 2}, {"data": "e"}])
def test_key_of_other_inputs(key, change):
    """Another stage, other params and other data each have another key."""
    assert key(**change) != key()


def test_key_of_other_code(key, tmp_path):
    """Other code has another key."""
    before = key()
    (tmp_path / "fashion_cnn/layers.py").write_text("2")
    assert key() != before


def test_key_of_another_machine(key, monkeypatch):
    """Another machine has another key."""
    before = key()
    monkeypatch.setattr(provenance, "machine_tags", lambda: {"torch": "2"})
    assert key() != before


@pytest.mark.parametrize("changed", [0, 1])
def test_data_digest(images, changed):
    """The digest of data depends on all of its arrays."""
    arrays = [images, LABELS]
    others = [array + (number == changed) for number, array in enumerate(arrays)]
    assert digest(*others) != digest(*arrays)


def test_killed_in_first_epoch(train, images, tmp_path):
    """A training that was killed in its first epoch starts over."""

    def kill(module, args):
        raise Killed

    model, checkpoint = fresh(build_small, 0), Checkpoint("k", tmp_path, 9)
    model.register_forward_pre_hook(kill)
    with pytest.raises(Killed):
        train(images[None], model, checkpoint=checkpoint)
    again = Checkpoint("k", tmp_path, 9)
    assert again.rows == []


def test_resume_message(train, images, tmp_path, capsys):
    """A resumed training says after which epoch it resumes, and a new one says nothing."""
    train(images[None], epochs=1, checkpoint=Checkpoint("k", tmp_path, 9))
    assert "after epoch" not in capsys.readouterr().out
    train(images[None], epochs=2, checkpoint=Checkpoint("k", tmp_path, 9))
    assert "after epoch 1\n" in capsys.readouterr().out


WEIGHTS = Path("weights.safetensors")
LOSSES = torch.zeros(3)


def test_checkpoint_lock(workspace):
    """Two trainings with the same key wait for each other."""
    folder = workspace / ".checkpoints"
    with exclusive_checkpoint("k", WEIGHTS, 2) as checkpoint:
        assert checkpoint.path == folder / "k.safetensors"
        with pytest.raises(Timeout):
            FileLock(folder / "k.lock").acquire(timeout=0)
        with FileLock(folder / "other.lock").acquire(timeout=0):
            pass
    with exclusive_checkpoint("k", WEIGHTS, 2):  # into an existing folder
        pass


def test_checkpoint_after_end(workspace):
    """A checkpoint is deleted after a success and stays after a failure."""
    model = fresh(build_small, 0)
    for fault in (Killed, None):
        with contextlib.suppress(Killed), exclusive_checkpoint("k", WEIGHTS, 2) as checkpoint:
            checkpoint.save(model, torch.optim.Adam(model.parameters()), LOSSES, [])
            if fault:
                raise fault
        assert (workspace / ".checkpoints/k.safetensors").exists() == bool(fault)


def train_in_dvc(key: str, content: str) -> int:
    """Pretend to train for two epochs; returns how many the checkpoint had before."""
    model = fresh(build_small, 0)
    optimizer = torch.optim.Adam(model.parameters())
    with exclusive_checkpoint(key, WEIGHTS, 2) as checkpoint:
        before = len(checkpoint.load(model, optimizer, LOSSES))
        checkpoint.save(model, optimizer, LOSSES, [{"epoch": 1}, {"epoch": 2}])
        WEIGHTS.write_text(content)
    return before


def test_finished_checkpoint_that_vanishes(workspace, monkeypatch):
    """Other finished checkpoints are deleted although another training deletes one at the same moment."""
    monkeypatch.setenv("DVC_STAGE", "train_cnn@original")
    Path("dvc.lock").touch()
    train_in_dvc("other", "other")
    (workspace / ".checkpoints/k.done").symlink_to("gone")  # listed, but cannot be read
    train_in_dvc("k", "some")
    assert [path.name for path in (workspace / ".checkpoints").glob("other.*")] == ["other.lock"]


def test_kept_until_dvc_lock(workspace, monkeypatch):
    """A finished training is kept until dvc.lock has its weights."""
    monkeypatch.setenv("DVC_STAGE", "train_cnn@original")
    folder = workspace / ".checkpoints"
    Path("dvc.lock").write_text(f"md5: {'0' * 32}\n")
    assert train_in_dvc("k", "some") == 0
    assert train_in_dvc("k", "some") == 2  # DVC was killed before it wrote dvc.lock
    Path("dvc.lock").write_text(f"md5: {hashlib.md5(b'some').hexdigest()}\n")
    os.utime("dvc.lock", (0, 0))  # as if committed before the training
    assert train_in_dvc("k", "some") == 2
    assert train_in_dvc("other", "other") == 0
    assert not (folder / "k.safetensors").exists()  # only one is kept: each is as large as 3 models
    assert train_in_dvc("k", "some") == 0
    os.utime("dvc.lock")
    assert train_in_dvc("k", "some") == 0  # `dvc repro --force` trains again


def test_resume_kept_checkpoint(workspace, monkeypatch):
    """A longer training resumes a kept one, and a shorter one does not."""
    monkeypatch.setenv("FASHION_CNN_KEEP_CHECKPOINT", "1")
    assert train_in_dvc("k", "some") == 0
    assert train_in_dvc("other", "other") == 0
    with exclusive_checkpoint("k", WEIGHTS, epochs=1) as checkpoint:
        assert checkpoint.rows == []
    monkeypatch.delenv("FASHION_CNN_KEEP_CHECKPOINT")
    with exclusive_checkpoint("k", WEIGHTS, epochs=3) as checkpoint:
        assert len(checkpoint.rows) == 2
    assert [path.name for path in sorted((workspace / ".checkpoints").glob("*.safetensors"))] == [
        "other.safetensors"
    ]


def test_newest_kept_checkpoints(workspace, monkeypatch):
    """Of the kept checkpoints, only the newest stay."""
    monkeypatch.setenv("FASHION_CNN_KEEP_CHECKPOINT", "1")
    monkeypatch.setattr(checkpoints, "KEPT", 2)
    for key in "abcd":
        train_in_dvc(key, "some")
        os.utime(workspace / f".checkpoints/{key}.kept", (ord(key), ord(key)))
    train_in_dvc("d", "some")
    assert sorted(path.stem for path in (workspace / ".checkpoints").glob("*.safetensors")) == ["c", "d"]


def test_delete_checkpoint(tmp_path):
    """Deleting a checkpoint removes its file."""
    checkpoint = Checkpoint("k", tmp_path, 9)
    model = fresh(build_small, 0)
    checkpoint.save(model, torch.optim.Adam(model.parameters()), LOSSES, [])
    assert [path.name for path in tmp_path.iterdir()] == ["k.safetensors"]
    checkpoint.delete()
    assert not list(tmp_path.iterdir())


class StandInGraph:
    """CapturedGraph without a GPU: a replay calls what was captured."""

    def __init__(self):
        self.warm_ups = self.captures = self.replays = 0

    def warm_up(self, call):
        self.warm_ups += 1
        call()

    def capture(self, call):
        self.captures += 1
        self.call = call

    def replay(self):
        self.replays += 1
        self.call()


def test_graphed_step(images):
    """The graphed step trains as the plain one does."""

    def run(wrap):
        model = fresh(build_small, 0)
        pool = torch.from_numpy(np.stack([images, 255 - images, images // 2]))
        params = SimpleNamespace(**LESSON | OPTIONS)
        optimizer = build_optimizer(model, params, CPU)
        step = TrainStep(model, optimizer, pool, torch.from_numpy(LABELS).long(), params)
        run_step = wrap(step)
        for epoch in range(3):
            for takes in torch.from_numpy(draw_epoch(TRAIN, 3, params, epoch)).split(5):  # 5, 5 and 2 images
                takes[::2, COUNT] = 2
                set_rate(optimizer, 0.001 * epoch)
                run_step(takes)
        return model[5].weight, step.losses, step.means()

    graph = StandInGraph()
    graphed = run(lambda step: GraphedStep(step, 5, CPU, graph=graph))
    plain = run(lambda step: step)
    assert torch.equal(graphed[0], plain[0])
    assert torch.equal(graphed[1], plain[1])
    assert plain[1][TRAIN].all()  # OPTIONS need the losses
    assert graphed[2] == plain[2]
    assert (graph.warm_ups, graph.captures, graph.replays) == (3, 1, 3)
