"""Where Fashion-MNIST comes from: folders, HTTP mirrors, or the Debian package."""

import errno
import gzip
import hashlib
import shutil
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import requests
import urllib3
from tqdm import tqdm

from lib.errors import StageError
from lib.files import replace_atomically, sha256_of
from lib.idx import FILES, IdxFile, check_header

CONNECT_TIMEOUT, READ_TIMEOUT = 5, 30  # seconds
ATTEMPTS = 3
CHUNK = 1 << 20  # bytes
DEBIAN_FOLDER = Path("usr/share/datasets/fashion-mnist")  # inside the package

BROKEN_CONNECTION = (requests.RequestException, urllib3.exceptions.HTTPError, EOFError)
# What a source can do wrong, apart from holding the wrong bytes (StageError).
SOURCE_FAULTS = (*BROKEN_CONNECTION, OSError, zlib.error, subprocess.SubprocessError)


def fetch(sources: list[str], folder: Path) -> None:
    """Put the four verified files into `folder`, from the first of `sources` that has them.

    Raises StageError with one reason for each source when none of them could give all files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    faults = []
    missing = [file for file in FILES if not _is_verified(folder / file.name, file)]
    if not missing:
        print(f"fetch: four verified files were in {folder}")
        return
    for source in sources:
        try:
            with _open_source(source) as open_file:
                while missing:
                    _take(missing[0], open_file, folder, source)
                    missing.pop(0)
        except (StageError, *SOURCE_FAULTS) as error:
            if _is_of_output(error, folder):
                raise
            faults.append(f"{source}: {_reason(error)}")
            print(f"fetch: {faults[-1]}")
            continue
        print(f"fetch: four verified files in {folder}, from {source}")
        return
    raise StageError(
        f"no source gave Fashion-MNIST ({'; '.join(faults)}); connect to the network, "
        "or put the four files into a folder and name it in fetch.sources"
    )


def _is_of_output(error: Exception, folder: Path) -> bool:
    """Whether the fault is that of the disk or folder written to, which no other source would mend."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
    name = str(getattr(error, "filename", ""))
    return getattr(error, "errno", None) in full or name.startswith(str(folder))


def _is_verified(path: Path, file: IdxFile) -> bool:
    return path.is_file() and sha256_of(path) == file.sha256


def _take(file: IdxFile, open_file, folder: Path, source: str) -> None:
    """Stream one file into place; a broken connection is tried again, wrong bytes are not."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with open_file(file) as stream, replace_atomically(folder / file.name) as partial:
                _copy_verified(file, stream, partial, f"{source}/{file.name}")
            return
        except requests.HTTPError:
            raise  # the server has answered: asking again changes nothing
        except BROKEN_CONNECTION:
            if attempt == ATTEMPTS:
                raise
            time.sleep(attempt)


def _copy_verified(file: IdxFile, stream: BinaryIO, target: Path, source: str) -> None:
    digest, size = hashlib.sha256(), 0
    with (
        target.open("wb") as output,
        tqdm(total=file.size, unit="B", unit_scale=True, desc=file.name, disable=None) as bar,
    ):
        while chunk := stream.read(CHUNK):
            if size == 0:
                check_header(file, chunk[: len(file.header)], source)
            size += len(chunk)
            if size > file.size:
                raise StageError(f"{source}: longer than the expected {file.size} bytes")
            digest.update(chunk)
            output.write(chunk)
            bar.update(len(chunk))
    if size != file.size:
        raise StageError(f"{source}: {size} bytes, expected {file.size}")
    if digest.hexdigest() != file.sha256:
        raise StageError(f"{source}: SHA-256 {digest.hexdigest()}, expected {file.sha256}")


@contextmanager
def _open_source(source: str) -> Iterator:
    """Yield a function that opens one IdxFile of `source` as an uncompressed stream."""
    if source.startswith("apt:"):
        with tempfile.TemporaryDirectory() as scratch:
            yield _folder(_unpack_package(source.removeprefix("apt:"), Path(scratch)))
    elif source.startswith(("http://", "https://")):
        with requests.Session() as session:
            yield lambda file: _download(session, f"{source.rstrip('/')}/{file.name}.gz")
    else:
        yield _folder(Path(source))


def _folder(folder: Path):
    def open_file(file: IdxFile) -> BinaryIO:
        plain = folder / file.name
        return plain.open("rb") if plain.exists() else gzip.open(f"{plain}.gz")

    if not folder.is_dir():
        raise StageError("no such folder")
    return open_file


@contextmanager
def _download(session: requests.Session, url: str) -> Iterator[BinaryIO]:
    with session.get(url, stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)) as response:
        response.raise_for_status()
        yield gzip.GzipFile(fileobj=response.raw)


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
    for command in ([*apt, "update"], [*apt, "download", package]):
        subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True, timeout=300)
    for archive in scratch.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, scratch], check=True, capture_output=True, text=True)
    return scratch / DEBIAN_FOLDER


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return " ".join(error.stderr.split())[-300:] or f"{error.cmd[0]} exited with {error.returncode}"
    if isinstance(error, requests.ConnectionError):
        return "cannot be reached"
    return " ".join(str(error).split())[:300] or type(error).__name__
