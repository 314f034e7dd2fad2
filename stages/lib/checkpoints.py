"""The state of a training after its last finished epoch, so that a killed one goes on from there."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from lib.files import replace_atomically
from lib.lineage import repository_root


class Checkpoint:
    """Weights, Adam's moments, the rows of metrics so far and the MLflow run, in one file.

    `key` is the digest of everything that determines the result, so that no training goes on from
    another's. The file stands outside DVC's outputs, which DVC takes away before it runs a stage.
    """

    def __init__(self, key: str, folder: Path):
        self.path = folder / f"{key}.safetensors"
        self.run_id, self.rows, self.tensors = None, [], {}
        try:
            with safe_open(self.path, framework="pt") as file:
                self.run_id, self.rows = json.loads(file.metadata()["state"])
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            pass
        # Written by a disk that lied; the training can do without.
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            print(f"checkpoint {self.path.name} is damaged ({error}); training starts over")

    def load(self, model: nn.Module, optimizer: torch.optim.Adam) -> list[dict]:
        """Restore `model` and `optimizer` in place; return the rows of the epochs that are done."""
        if self.rows:
            print(f"going on after epoch {len(self.rows)}")
            model.load_state_dict(_part(self.tensors, "model."))
            # Moments need the layout of their weights: the fused update walks through both as they lie.
            state = {
                number: {
                    name: torch.empty_like(parameter).copy_(tensor) if tensor.ndim else tensor
                    for name, tensor in _part(self.tensors, f"adam.{number}.").items()
                }
                for number, parameter in enumerate(model.parameters())
            }
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        return self.rows

    def save(self, model: nn.Module, optimizer: torch.optim.Adam, rows: list[dict]) -> None:
        """Replace the file by the present state, whole or not at all."""
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": tensor for name, tensor in state.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with replace_atomically(self.path) as partial:
            partial.write_bytes(save(tensors, {"state": json.dumps([self.run_id, rows])}))

    def delete(self) -> None:
        """Remove the file: the stage has written its outputs."""
        self.path.unlink(missing_ok=True)


@contextmanager
def exclusive_checkpoint(key: str) -> Iterator[Checkpoint]:
    """The checkpoint of a training, gone when the block succeeds.

    Two experiments can run the very same training at once: the second waits, so that neither goes
    on from the other's epochs, in the other's run.
    """
    folder = repository_root() / ".checkpoints"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / f"{key}.lock"):
        checkpoint = Checkpoint(key, folder)
        yield checkpoint
        checkpoint.delete()


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
