"""The kinds of source that Fashion-MNIST comes from: a folder, an HTTP mirror, a Debian package."""

import gzip
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import requests

from fashion_cnn.data.fashion_mnist import IdxFile
from fashion_cnn.project.errors import StageError

CONNECT_TIMEOUT, READ_TIMEOUT = 5, 30  # seconds; READ_TIMEOUT is for each chunk, not a whole file
REDIRECTS = 5
DEBIAN_FOLDER = Path("usr/share/datasets/fashion-mnist")  # inside the package


@contextmanager
def open_source(source: str) -> Iterator:
    """Yield a function that opens one IdxFile of `source` as an uncompressed stream."""
    if source.startswith("apt:"):
        with tempfile.TemporaryDirectory() as scratch:
            yield _folder(_unpack_package(source.removeprefix("apt:"), Path(scratch)))
    elif source.startswith(("http://", "https://")):
        with requests.Session() as session:
            session.max_redirects = REDIRECTS
            session.hooks["response"] = [_drop_redirecting_body]
            yield lambda file: _download(session, source.rstrip("/"), file)
    else:
        yield _folder(Path(source))


def _folder(folder: Path):
    def open_file(file: IdxFile) -> AbstractContextManager[BinaryIO]:
        plain, compressed = folder / file.name, folder / f"{file.name}.gz"
        return plain.open("rb") if plain.exists() else _unzipped(compressed.open("rb"), file)

    if not folder.is_dir():
        raise StageError("no such folder")
    return open_file


@contextmanager
def _download(session: requests.Session, address: str, file: IdxFile) -> Iterator[BinaryIO]:
    url = f"{address}/{file.name}.gz"
    with session.get(url, stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)) as response:
        response.raise_for_status()
        with _unzipped(response.raw, file) as stream:
            yield stream


def _drop_redirecting_body(response: requests.Response, **_) -> None:
    """Keep requests from reading the whole body of a redirect into memory, however long it is."""
    if response.is_redirect:
        response.close()


@contextmanager
def _unzipped(compressed: BinaryIO, file: IdxFile) -> Iterator[BinaryIO]:
    with compressed:
        yield cast(BinaryIO, gzip.GzipFile(fileobj=cast(BinaryIO, Limited(compressed, file))))


class Limited:
    """A compressed file; reading it raises StageError if it is longer than `file` can be.

    Otherwise gzip would read past empty members and zeros without end in search of content.
    """

    def __init__(self, compressed: BinaryIO, file: IdxFile):
        self.compressed, self.file = compressed, file
        self.left = self.most = file.size + 2**16  # incompressible data grows by less than that

    def read(self, size: int) -> bytes:
        """At most `size` bytes."""
        content = self.compressed.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise StageError(f"{self.file.name}.gz: expected at most {self.most} compressed bytes")
        return content


def _unpack_package(package: str, scratch: Path) -> Path:
    """Download and unpack a Debian package as an ordinary user, with apt's state in `scratch`."""
    if not shutil.which("apt-get"):
        raise StageError("apt-get is not installed here")
    for private in ("lists/partial", "cache/archives/partial"):
        (scratch / private).mkdir(parents=True)
    apt = [
        "apt-get",
        "-qq",
        f"-oDir::State::Lists={scratch}/lists",
        f"-oDir::Cache={scratch}/cache",
        "-oDebug::NoLocking=1",
    ]
    _run(*apt, "update", folder=scratch)
    _run(*apt, "download", "--", package, folder=scratch)  # nothing after -- is an option
    for archive in scratch.glob("*.deb"):
        _run("dpkg-deb", "-x", archive, scratch, folder=scratch)
    return scratch / DEBIAN_FOLDER


def _run(*command: str | Path, folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, errors="replace")
