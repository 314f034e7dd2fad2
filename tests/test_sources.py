"""Fetching: the order of sources, faults of each kind, and the message when all fail."""

import contextlib
import errno
import gzip
import hashlib
import os
import socketserver
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from time import sleep  # the waits between attempts are skipped below

import pytest

from fashion_cnn.data.fashion_mnist import IdxFile
from fashion_cnn.project.errors import StageError
from fashion_cnn.sources import fetch as fetching
from fashion_cnn.sources import kinds

pytestmark = pytest.mark.slow


def idx(name: str, values: bytes) -> tuple[IdxFile, bytes]:
    content = IdxFile(name, (len(values),), "").header + values
    return IdxFile(name, (len(values),), hashlib.sha256(content).hexdigest()), content


CONTENTS = dict(idx(f"file-{number}", bytes([number]) * 1000) for number in range(4))
FIRST = next(iter(CONTENTS))


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    monkeypatch.setattr(fetching, "FILES", tuple(CONTENTS))
    monkeypatch.setattr(fetching.time, "sleep", lambda _: None)


@pytest.fixture
def good(tmp_path):
    """A folder with compressed files, as in Debian's package."""
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
    """Serve a folder over HTTP on this machine; returns its address."""
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


def test_compressed_folder(good, target):
    """Files are copied from a folder of compressed files."""
    fetching.fetch([str(good)], target)
    assert_complete(target)


def test_plain_folder(tmp_path, target):
    """Files are copied from a folder of plain files."""
    for file, content in CONTENTS.items():
        (tmp_path / file.name).write_bytes(content)
    fetching.fetch([str(tmp_path)], target)
    assert_complete(target)


def test_mirror(good, target, serve):
    """A mirror gives the same bytes."""
    fetching.fetch([serve(good)], target)
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
def test_damaged_file(good, tmp_path, target, capsys, damage, words):
    """Fetching names a damaged file and tries the next source."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / f"{FIRST.name}.gz").write_bytes(gzip.compress(damage(CONTENTS[FIRST])))
    fetching.fetch([str(bad), str(good)], target)
    assert_complete(target)
    printed = capsys.readouterr().out
    assert f"{bad}: {bad}/{FIRST.name}: {words}" in printed


def test_bad_gzip(good, tmp_path, target, capsys):
    """Fetching names a truncated archive and a file that is not an archive, and tries the next source."""
    for name, content in (("cut", gzip.compress(CONTENTS[FIRST])[:-12]), ("none", b"<html>")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{FIRST.name}.gz").write_bytes(content)
    fetching.fetch([str(tmp_path / "cut"), str(tmp_path / "none"), str(good)], target)
    assert_complete(target)
    printed = capsys.readouterr().out
    assert "Compressed file ended" in printed
    assert "Not a gzipped file" in printed


def test_existing_files(good, target):
    """Existing files are verified, and intact ones are kept."""
    target.mkdir()
    for file, content in list(CONTENTS.items())[:2]:
        (target / file.name).write_bytes(content)
    (target / FIRST.name).write_bytes(b"damaged")
    (good / f"{list(CONTENTS)[1].name}.gz").unlink()  # not needed
    fetching.fetch([str(good)], target)
    assert_complete(target)


def test_connection_retry(good, target, serve):
    """Fetching tries again after a broken connection."""

    class BreaksOnce(SimpleHTTPRequestHandler):
        broken = False

        def copyfile(self, source, outputfile):
            if not BreaksOnce.broken:
                BreaksOnce.broken = True
                outputfile.write(source.read(20))
                self.close_connection = True
                return
            super().copyfile(source, outputfile)

    fetching.fetch([serve(good, BreaksOnce)], target)
    assert_complete(target)
    assert BreaksOnce.broken


def test_all_sources_fail(tmp_path, target, serve):
    """If all sources fail, the error has a reason for each, and no file is left."""
    (tmp_path / "empty").mkdir()
    address = serve(tmp_path / "empty")
    with pytest.raises(StageError) as raised:
        fetching.fetch(
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


def test_unwritable_target(good, target):
    """A target folder that cannot be written is not blamed on the sources."""
    target.write_text("in the way")
    with pytest.raises(OSError, match="exists"):
        fetching.fetch([str(good)], target)


def test_full_disk(good, target, monkeypatch):
    """A full disk is not blamed on the sources."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetching, "_copy_verified", full)
    with pytest.raises(OSError, match="No space left"):
        fetching.fetch([str(good)], target)


def test_complete_data(good, target):
    """Complete data needs no source."""
    fetching.fetch([str(good)], target)
    fetching.fetch(["/absent"], target)
    assert_complete(target)


@pytest.fixture
def answer():
    """Answer every connection with a function that gets the socket; returns the address."""
    servers = []

    def start(send):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                with contextlib.suppress(OSError):
                    self.request.recv(65536)
                    send(self.request)

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


HEAD = b"HTTP/1.0 200 OK\r\n\r\n"
COMPRESSED = gzip.compress(CONTENTS[FIRST])
REDIRECT = b"HTTP/1.0 302 Found\r\nLocation: %s\r\n\r\n"


def dripped(content):
    def send(connection):
        for byte in content:
            connection.sendall(bytes([byte]))
            sleep(0.1)

    return send


def endless(start, more):
    def send(connection):
        connection.sendall(start)
        while True:
            connection.sendall(more)

    return send


@pytest.mark.parametrize(
    ("send", "words"),
    [
        (dripped(HEAD + COMPRESSED + bytes(100)), "not done after 2 s"),
        (dripped(b"HTTP/1.0 200 OK\r\nName: " + b"x" * 1000), "not done after 2 s"),
        (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "not done after 2 s"),
        (endless(HEAD, gzip.compress(b"")), "expected at most 66544 compressed bytes"),
        (endless(HEAD + COMPRESSED, bytes(10000)), "expected at most 66544 compressed bytes"),
        (endless(b"HTTP/1.0 200 OK\r\n", b"Name: value\r\n"), "cannot be reached"),
        (lambda connection: sleep(60), "Read timed out"),
        (lambda connection: connection.sendall(REDIRECT % b"/"), "Exceeded 5 redirects"),
        (endless(REDIRECT % b"/", bytes(10000)), "Exceeded 5 redirects"),
        (lambda connection: connection.sendall(REDIRECT % b"http://["), "Invalid"),
    ],
)
def test_endless_source(good, target, answer, capsys, monkeypatch, send, words):
    """Fetching gives up a source that never ends and tries the next one."""
    monkeypatch.setattr(fetching, "SOURCE_SECONDS", 2)
    monkeypatch.setattr(kinds, "READ_TIMEOUT", 0.5)
    address = answer(send)
    began = time.monotonic()
    fetching.fetch([address, str(good)], target)
    assert time.monotonic() - began < 10
    assert_complete(target)
    [line, _] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"fetch: {address}: ")
    assert words in line


def test_slow_mirror(good, target, serve, monkeypatch):
    """A slow mirror may take longer than the time limit of one answer."""

    class Slow(SimpleHTTPRequestHandler):
        def copyfile(self, source, outputfile):
            for byte in source.read():
                sleep(0.03)
                outputfile.write(bytes([byte]))

    monkeypatch.setattr(kinds, "READ_TIMEOUT", 0.5)
    began = time.monotonic()
    fetching.fetch([serve(good, Slow)], target)
    assert time.monotonic() - began > 2
    assert_complete(target)


def test_redirect(good, target, serve, answer):
    """A redirect is followed, and its body is not read."""
    address = serve(good).encode()
    names = iter([file.name.encode() for file in CONTENTS])

    def send(connection):
        endless(REDIRECT % (address + b"/" + next(names) + b".gz"), bytes(10000))(connection)

    fetching.fetch([answer(send)], target)
    assert_complete(target)


def test_endless_folder(good, tmp_path, target, monkeypatch, capsys):
    """Fetching gives up a folder with files that never end."""
    monkeypatch.setattr(fetching, "SOURCE_SECONDS", 3)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / FIRST.name)  # nothing writes to it, so opening it blocks forever
    (tmp_path / "zeros").mkdir()
    with (tmp_path / "zeros" / f"{FIRST.name}.gz").open("wb") as file:
        file.write(COMPRESSED)
        file.truncate(1 << 34)  # sparse: takes no disk space
    fetching.fetch([str(tmp_path / "pipe"), str(tmp_path / "zeros"), str(good)], target)
    assert_complete(target)
    pipe, zeros, _ = capsys.readouterr().out.splitlines()
    assert "not done after 3 s" in pipe
    assert "expected at most 66544 compressed bytes" in zeros


def test_endless_apt(good, tmp_path, target, monkeypatch, capsys):
    """An apt that never ends is killed."""
    monkeypatch.setattr(fetching, "SOURCE_SECONDS", 1)
    program = tmp_path / "apt-get"
    program.write_text(f"#!/bin/sh\necho $$ >'{tmp_path}/pid'\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fetching.fetch(["apt:some-package", str(good)], target)
    assert_complete(target)
    assert "apt:some-package: not done after 1 s, expected all files by then" in capsys.readouterr().out
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_apt_option_injection(tmp_path, target):
    """A package name cannot become an option of apt."""
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch '{tmp_path}/ran'\n")
    program.chmod(0o755)
    with pytest.raises(StageError):
        fetching.fetch([f"apt:-oDir::Bin::dpkg={program}"], target)
    assert not (tmp_path / "ran").exists()
