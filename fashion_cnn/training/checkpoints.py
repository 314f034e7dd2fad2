"""The state of a training after its last finished epoch, from which a killed one resumes."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from fashion_cnn.project.files import md5_of, replace_atomically, write_text
from fashion_cnn.project.process import KEEP_CHECKPOINT
from fashion_cnn.project.provenance import digest
from fashion_cnn.project.repository import LOCK, repository_root

KEPT = 32  # checkpoints that longer trainings may resume; each is as large as three models


class Checkpoint:
    """Weights, the optimizer's moments, the losses of images and the rows of metrics so far, in one file.

    `key` is the digest of everything that determines an epoch's result, so that no training resumes from
    another's. The file is outside DVC's outputs, because DVC deletes those before it runs a stage. It holds a
    digest of its content, because one flipped bit would lead to different weights.
    """

    def __init__(self, key: str, folder: Path, epochs: int):
        self.path = folder / f"{key}.safetensors"
        self.rows, self.tensors = [], {}
        try:
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about.get("digest") != self._digest(tensors, about.get("rows", "")):
                raise ValueError("its content does not match its digest")
            if len(rows := json.loads(about["rows"])) <= epochs:  # otherwise, it is a longer training's
                self.rows, self.tensors = rows, tensors
        except FileNotFoundError:
            pass
        except (SafetensorError, OSError, ValueError) as error:  # the training does not need the file
            print(f"checkpoint {self.path.name} is damaged ({error}); training starts from epoch 1")

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, losses: torch.Tensor) -> list[dict]:
        """Restore `model`, `optimizer` and `losses` in place; return the rows of the epochs that are done."""
        if self.rows:
            print(f"resuming after epoch {len(self.rows)}")
            model.load_state_dict(_part(self.tensors, "model."))
            # Moments need the layout of their weights: the fused update reads both in memory order.
            state = {
                number: {
                    name: torch.empty_like(parameter).copy_(tensor) if tensor.ndim else tensor
                    for name, tensor in _part(self.tensors, f"adam.{number}.").items()
                }
                for number, parameter in enumerate(_parameters(optimizer))
            }
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
            losses.copy_(self.tensors["losses"])
        return self.rows

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, losses: torch.Tensor, rows: list[dict]
    ) -> None:
        """Replace the file with the current state, atomically."""
        tensors = {"losses": losses} | {
            f"model.{name}": tensor for name, tensor in model.state_dict().items()
        }
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": tensor for name, tensor in state.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        about = {"rows": json.dumps(rows)}
        about["digest"] = self._digest(tensors, about["rows"])
        with replace_atomically(self.path) as partial:
            partial.write_bytes(save(tensors, about))

    def _digest(self, tensors: dict[str, torch.Tensor], rows: str) -> str:
        arrays = {name: tensor.numpy() for name, tensor in sorted(tensors.items())}
        kinds = [(name, str(array.dtype), array.shape) for name, array in arrays.items()]
        about = json.dumps([self.path.stem, rows, kinds]).encode()
        return digest(np.frombuffer(about, np.uint8), *arrays.values())

    def delete(self) -> None:
        """Remove the file: the stage has written its outputs."""
        self.path.unlink(missing_ok=True)


@contextmanager
def exclusive_checkpoint(key: str, weights: Path, epochs: int) -> Iterator[Checkpoint]:
    """The checkpoint of a training that writes `weights` after `epochs` epochs.

    If the block succeeds, the checkpoint is deleted. If DVC runs the stage, it is kept until DVC has written
    dvc.lock, because a kill between the end of the stage and that write would lose the training. If the
    variable KEEP_CHECKPOINT is set, it stays for a longer training. If two experiments run the same training
    at once, the second waits, so that neither resumes from the other's epochs.
    """
    folder = repository_root() / ".checkpoints"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / f"{key}.lock"):
        _delete_finished(folder, key)
        checkpoint = Checkpoint(key, folder, epochs)
        yield checkpoint
        (folder / f"{key}.kept").unlink(missing_ok=True)
        if KEEP_CHECKPOINT in os.environ:
            (folder / f"{key}.kept").touch()
        elif "DVC_STAGE" in os.environ:
            write_text(folder / f"{key}.done", md5_of(weights.read_bytes()))
        else:
            checkpoint.delete()


def _delete_finished(folder: Path, key: str) -> None:
    """Delete the checkpoints of finished trainings, except that of `key` if dvc.lock lacks its weights.

    Of those that longer trainings may resume, the newest stay.
    """
    kept: list[Path] = []
    with suppress(FileNotFoundError):  # another training may delete one first
        kept = sorted(folder.glob("*.kept"), key=lambda path: path.stat().st_mtime_ns)[:-KEPT]
    for path in [*folder.glob("*.done"), *kept]:
        with suppress(FileNotFoundError):
            if path.stem != key or (path.suffix == ".done" and _is_recorded(path)):
                path.with_suffix(".safetensors").unlink(missing_ok=True)
                path.unlink()


def _is_recorded(done: Path) -> bool:
    """Whether DVC has written dvc.lock since the training ended, with the weights whose digest `done` holds.

    An older dvc.lock may name the same weights, as in a fresh clone.
    """
    # In one of DVC's temporary copies, LOCK is that copy's own dvc.lock.
    if not LOCK.exists() or LOCK.stat().st_mtime_ns < done.stat().st_mtime_ns:
        return False
    return done.read_text() in LOCK.read_text(encoding="utf-8")


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters, in the order in which the optimizer numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
