"""Fetching: the order of sources, faults of each kind, and the message when all fail."""

import errno
import gzip
import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lib import sources
from lib.errors import StageError
from lib.idx import IdxFile


def idx(name: str, values: bytes) -> tuple[IdxFile, bytes]:
    content = IdxFile(name, (len(values),), "").header + values
    return IdxFile(name, (len(values),), hashlib.sha256(content).hexdigest()), content


CONTENTS = dict(idx(f"file-{number}", bytes([number]) * 1000) for number in range(4))
FIRST = next(iter(CONTENTS))


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    monkeypatch.setattr(sources, "FILES", tuple(CONTENTS))
    monkeypatch.setattr(sources.time, "sleep", lambda _: None)


@pytest.fixture
def good(tmp_path):
    """A folder as Debian's package has it: compressed."""
    folder = tmp_path / "good"
    folder.mkdir()
    for file, content in CONTENTS.items():
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(content))
    return folder


@pytest.fixture
def target(tmp_path):
    return tmp_path / "raw"


@pytest.fixture
def serve():
    """Serve a folder over HTTP on this machine; gives its address."""
    servers = []

    def start(folder, handler=SimpleHTTPRequestHandler):
        class Quiet(handler):
            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def assert_complete(target):
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        file.name: content for file, content in CONTENTS.items()
    }


def test_a_folder_of_compressed_files(good, target):
    sources.fetch([str(good)], target)
    assert_complete(target)


def test_a_folder_of_plain_files(tmp_path, target):
    for file, content in CONTENTS.items():
        (tmp_path / file.name).write_bytes(content)
    sources.fetch([str(tmp_path)], target)
    assert_complete(target)


def test_a_mirror_gives_the_same_bytes(good, target, serve):
    sources.fetch([serve(good)], target)
    assert_complete(target)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-1], "1007 bytes, expected 1008"),
        (lambda content: content + b"x", "longer than the expected 1008 bytes"),
        (lambda content: content[:-1] + b"\x01", "SHA-256"),
        (lambda content: b"\1" + content[1:], "begins with 01000801, expected IDX magic 00000801"),
        (lambda content: content[:7] + b"\1" + content[8:], "shape (769,), expected (1000,)"),
        (lambda content: b"", "0 bytes, expected 1008"),
    ],
)
def test_a_damaged_file_is_named_and_the_next_source_is_tried(good, tmp_path, target, capsys, damage, words):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / f"{FIRST.name}.gz").write_bytes(gzip.compress(damage(CONTENTS[FIRST])))
    sources.fetch([str(bad), str(good)], target)
    assert_complete(target)
    printed = capsys.readouterr().out
    assert f"{bad}: {bad}/{FIRST.name}: {words}" in printed


def test_a_truncated_archive_and_something_that_is_none(good, tmp_path, target, capsys):
    for name, content in (("cut", gzip.compress(CONTENTS[FIRST])[:-12]), ("none", b"<html>")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{FIRST.name}.gz").write_bytes(content)
    sources.fetch([str(tmp_path / "cut"), str(tmp_path / "none"), str(good)], target)
    assert_complete(target)
    printed = capsys.readouterr().out
    assert "Compressed file ended" in printed
    assert "Not a gzipped file" in printed


def test_files_that_are_there_are_verified_and_kept(good, target):
    target.mkdir()
    for file, content in list(CONTENTS.items())[:2]:
        (target / file.name).write_bytes(content)
    (target / FIRST.name).write_bytes(b"damaged")
    (good / f"{list(CONTENTS)[1].name}.gz").unlink()  # not needed
    sources.fetch([str(good)], target)
    assert_complete(target)


def test_a_broken_connection_is_tried_again(good, target, serve):
    class BreaksOnce(SimpleHTTPRequestHandler):
        broken = False

        def copyfile(self, source, outputfile):
            if not BreaksOnce.broken:
                BreaksOnce.broken = True
                outputfile.write(source.read(20))
                self.close_connection = True
                return
            super().copyfile(source, outputfile)

    sources.fetch([serve(good, BreaksOnce)], target)
    assert_complete(target)
    assert BreaksOnce.broken


def test_when_all_fail_each_source_has_its_reason_and_nothing_is_left(tmp_path, target, serve):
    (tmp_path / "empty").mkdir()
    address = serve(tmp_path / "empty")
    with pytest.raises(StageError) as raised:
        sources.fetch(
            [str(tmp_path / "none"), address, "http://127.0.0.1:9", "apt:no-such-package-x"], target
        )
    message = str(raised.value)
    assert "\n" not in message
    assert f"{tmp_path}/none: no such folder" in message
    assert f"{address}: 404" in message
    assert "http://127.0.0.1:9: cannot be reached" in message
    assert "apt:no-such-package-x: " in message
    assert "name it in fetch.sources" in message
    assert not target.exists() or not list(target.iterdir())


def test_a_folder_that_cannot_be_written_is_not_blamed_on_the_sources(good, target):
    target.write_text("in the way")
    with pytest.raises(OSError, match="exists"):
        sources.fetch([str(good)], target)


def test_a_full_disk_is_not_blamed_on_the_sources(good, target, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources, "_copy_verified", full)
    with pytest.raises(OSError, match="No space left"):
        sources.fetch([str(good)], target)


def test_complete_data_needs_no_source(good, target):
    sources.fetch([str(good)], target)
    sources.fetch(["/absent"], target)
    assert_complete(target)
