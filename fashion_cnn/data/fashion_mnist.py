"""Fashion-MNIST's four IDX files: what they must hold, and how to read them.

Format: http://yann.lecun.com/exdb/mnist, big-endian: two zero bytes, the type (8 = uint8),
the number of dimensions, each dimension as uint32, then the values.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fashion_cnn.project.errors import StageError

RAW_DIR = Path("data/FashionMNIST/raw")  # where torchvision.datasets.FashionMNIST("data") looks
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class IdxFile:
    """One uncompressed IDX file: its name, the shape of its values and its SHA-256."""

    name: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def header(self) -> bytes:
        """The bytes before the values: magic number and shape."""
        return bytes([0, 0, 8, len(self.shape)]) + np.array(self.shape, ">u4").tobytes()

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + math.prod(self.shape)


TRAIN_IMAGES = IdxFile(
    "train-images-idx3-ubyte",
    (60_000, 28, 28),
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
)
TRAIN_LABELS = IdxFile(
    "train-labels-idx1-ubyte",
    (60_000,),
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
)
TEST_IMAGES = IdxFile(
    "t10k-images-idx3-ubyte",
    (10_000, 28, 28),
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
)
TEST_LABELS = IdxFile(
    "t10k-labels-idx1-ubyte",
    (10_000,),
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
FILES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)


def read_idx(file: IdxFile, folder: Path = RAW_DIR) -> np.ndarray:
    """Read one file as a uint8 array of `file.shape`, after checking its header and length.

    Raises StageError naming the file, what it holds and what was expected.
    """
    path = folder / file.name
    if not path.is_file():
        raise StageError(f"{path}: not found; `dvc repro fetch_fashion_mnist` fetches it")
    content = np.fromfile(path, np.uint8)  # writable, as torch expects, without a copy
    check_header(file, content[: len(file.header)].tobytes(), path)
    if len(content) != file.size:
        raise StageError(f"{path}: {len(content)} bytes, expected {file.size}")
    return content[len(file.header) :].reshape(file.shape)


def check_header(file: IdxFile, header: bytes, source: object) -> None:
    """Raise StageError unless `header` has the magic number and shape of `file`."""
    if header[:4] != file.header[:4]:
        raise StageError(
            f"{source}: begins with {header[:4].hex() or 'nothing'}, "
            f"expected IDX magic {file.header[:4].hex()}"
        )
    if header != file.header:
        shape = tuple(int(n) for n in np.frombuffer(header[4 : len(header) // 4 * 4], ">u4"))
        raise StageError(f"{source}: shape {shape}, expected {file.shape}")
