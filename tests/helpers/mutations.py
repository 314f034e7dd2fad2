"""Seeded mutations of inputs: each must end in success or in one StageError that names the file."""

import random
import string
from pathlib import Path

import numpy as np
import yaml

from fashion_cnn.data.fashion_mnist import IdxFile, read_idx
from fashion_cnn.models.cnns import build_toy_cnn, load_weights
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import read_tensors, write_tensors
from fashion_cnn.project.params import load_params
from project import ROOT

VALUES = [
    None, True, "x", "", -1, 0, 1e308, float("nan"), float("inf"), -float("inf"), 10**40, [], {}, [[1]],
    {"a": {"b": 1}}, "\u0000", "🧵" * 50, "1e-3", "!!python/name:os.system",
]  # fmt: skip
SNIPPETS = [
    b"\xff\xfe", b"\t", b"!!python/object/apply:os.system ['true']\n", b"&a [*a]\n", b"split: {}\n", b"---\n",
    b"? [a]\n: 1\n", b"<<: 1\n", b"\x00", b"'", b"{", b"2026-99-99\n",
    b"!!binary x\n", b"1e999\n", b"[" * 3000,
]  # fmt: skip
SMALL = IdxFile("small-idx3-ubyte", (5, 4, 4), "unused")


def params(rng: random.Random, path: Path) -> None:
    """Write a mutated params.yaml to `path` and read it."""
    good = (ROOT / "tests/helpers/params.yaml").read_bytes()
    if rng.random() < 0.5:
        content = yaml.safe_load(good)
        section = rng.choice(list(content))
        leaf = rng.choice(list(content[section]))
        kind = rng.randrange(4)
        if kind == 0:
            content[section][leaf] = rng.choice(VALUES)
        elif kind == 1:
            del content[section][leaf]
        elif kind == 2:
            content[section]["".join(rng.choices(string.ascii_letters, k=5))] = 1
        else:
            content[section] = rng.choice(VALUES)
        mutated = yaml.safe_dump(content, allow_unicode=True).encode()
    else:
        at = rng.randrange(len(good))
        cut = rng.choice([0, 1, 20])
        mutated = good[:at] + rng.choice([b"", *SNIPPETS]) + good[at + cut :]
    path.write_bytes(mutated)
    load_params(path)


def idx(rng: random.Random, path: Path) -> None:
    """Write a mutated IDX file next to `path` and read it."""
    content = SMALL.header + bytes(range(80))
    (path.parent / SMALL.name).write_bytes(_mutate(rng, content))
    read_idx(SMALL, path.parent)


def weights(rng: random.Random, path: Path) -> None:
    """Write mutated weights to `path` and load them, as tensors and into the model."""
    tensors = {name: tensor.numpy() for name, tensor in build_toy_cnn().state_dict().items()}
    write_tensors(path, tensors)
    path.write_bytes(_mutate(rng, path.read_bytes()))
    read_tensors(path)
    load_weights(build_toy_cnn(), path)


def _mutate(rng: random.Random, content: bytes) -> bytes:
    kind = rng.randrange(4)
    at = rng.randrange(len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at:]
    if kind == 2:
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    return rng.randbytes(rng.randrange(200))


def survives(mutate, seed: int, folder: Path) -> bool:
    """Whether one mutated input is read, or refused in one line that names the file."""
    np.seterr(all="raise")
    try:
        mutate(random.Random(seed), folder / f"{mutate.__name__}.yaml")
    except StageError as error:
        return "\n" not in str(error) and any(path.name in str(error) for path in folder.iterdir())
    return True
