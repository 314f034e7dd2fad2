"""Fetch Fashion-MNIST from the first source that has it, and verify it."""

import errno
import hashlib
import subprocess
import time
import zlib
from pathlib import Path
from typing import BinaryIO

import requests
import urllib3
from tqdm import tqdm

from fashion_cnn.data.fashion_mnist import FILES, IdxFile, check_header
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import replace_atomically, sha256_of
from fashion_cnn.project.time_limit import at_most
from fashion_cnn.sources.kinds import open_source

# The four files are 31 MB compressed, 310 s at 100 kB/s. This limit leaves time for apt's lists and another
# attempt, and gives up on a source slower than 35 kB/s.
SOURCE_SECONDS = 900
ATTEMPTS = 3
CHUNK = 1 << 20  # bytes

BROKEN_CONNECTION = (requests.RequestException, urllib3.exceptions.HTTPError, EOFError)
# What can go wrong with a source, apart from wrong bytes (StageError). ValueError: a redirect to something
# that is not an address.
SOURCE_FAULTS = (*BROKEN_CONNECTION, OSError, ValueError, zlib.error, subprocess.SubprocessError)


def fetch(sources: list[str], folder: Path) -> None:
    """Put the four verified files into `folder`, from the first of `sources` that has them.

    Raises StageError with one reason for each source when none of them could give all files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    faults = []
    missing = [file for file in FILES if not _is_verified(folder / file.name, file)]
    if not missing:
        print(f"fetch: four verified files are already in {folder}")
        return
    for source in sources:
        too_slow = StageError(f"not done after {SOURCE_SECONDS} s, expected all files by then")
        try:
            with at_most(SOURCE_SECONDS, too_slow), open_source(source) as open_file:
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
    """Whether the fault is in the disk or folder written to, so another source would not help."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
    name = str(getattr(error, "filename", ""))
    return getattr(error, "errno", None) in full or name.startswith(str(folder))


def _is_verified(path: Path, file: IdxFile) -> bool:
    return path.is_file() and sha256_of(path) == file.sha256


def _take(file: IdxFile, open_file, folder: Path, source: str) -> None:
    """Stream one file into place; a broken connection is retried, wrong bytes are not."""
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


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return " ".join(error.stderr.split())[-300:] or f"{error.cmd[0]} exited with {error.returncode}"
    if isinstance(error, requests.ConnectionError):
        return "cannot be reached"
    return " ".join(str(error).split())[:300] or type(error).__name__
