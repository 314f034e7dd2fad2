"""A team's S3 server and Ray cluster on this machine."""

import ctypes
import fcntl
import json
import random
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil

from pipeline import dvc
from servers import process

ADMIN = {"AWS_ACCESS_KEY_ID": "admin", "AWS_SECRET_ACCESS_KEY": "admin-secret"}
READER = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "reader-secret"}
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "only-for-tests-of-this-machine"}
HEAD = "127.0.0.1:6379"
CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP = 0x40000000, 0x8914, 1  # from Linux's headers
SECONDS = 120  # the limit of each wait
T = TypeVar("T")


def free_ports(count: int) -> list[int]:
    """Free ports; those 10,000 above are free, too, because SeaweedFS also takes them.

    It also names Unix sockets after its ports, which tests with a network of their own share with the others.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(10_000, 22_000)  # also 10,000 above, below the ephemeral ports
        both = (port, port + 10_000)
        is_taken = any([*Path("/tmp").glob(f"seaweedfs-*-{one}.sock")] for one in both)
        if port not in found and not is_taken and all(is_free(one) for one in both):
            found.append(port)
    return found


def is_free(port: int) -> bool:
    """Whether nothing listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def wait_for(is_there: Callable[[], bool], server: subprocess.Popen, log: Path) -> None:
    """Wait until `is_there`; an error if `server`, which writes the log, ends, or it takes too long."""
    deadline = time.monotonic() + SECONDS
    while not is_there():
        gave_up = server.poll() is not None or time.monotonic() > deadline
        assert not gave_up, log.read_text()[-3000:]
        time.sleep(0.2)


@contextmanager
def s3_server(folder: Path, port: int) -> Iterator[subprocess.Popen]:
    """SeaweedFS with its S3 at `port` and its data in `folder`, for ADMIN and READER."""
    folder.mkdir(exist_ok=True)
    identities = [
        {
            "name": who["AWS_ACCESS_KEY_ID"],
            "credentials": [
                {"accessKey": who["AWS_ACCESS_KEY_ID"], "secretKey": who["AWS_SECRET_ACCESS_KEY"]}
            ],
            "actions": actions,
        }
        for who, actions in ((ADMIN, ["Admin"]), (READER, ["Read", "List"]))
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    names = ("master", "volume", "filer")
    others = [one for one in free_ports(4) if one != port][:3]
    ports = [f"-{name}.port={one}" for name, one in zip(names, others, strict=True)]
    command = [
        str(Path(sys.executable).parent / "weed"), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-dir={folder}", *ports, "-filer", "-s3", f"-s3.port={port}", f"-s3.config={folder / 's3.json'}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=100", "-master.telemetry=false",
    ]  # fmt: skip
    with process(folder / "log", *command) as server:
        wait_for(lambda: not is_free(port), server, folder / "log")
        yield server


def client(port: int):
    """A boto3 client of the server, as ADMIN."""
    import boto3
    from botocore.config import Config

    config = Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10)
    return boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1", config=config,
        aws_access_key_id=ADMIN["AWS_ACCESS_KEY_ID"], aws_secret_access_key=ADMIN["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip


def make_bucket(port: int, name: str) -> None:
    """Make a bucket as soon as the server can store something."""
    steadily(lambda: client(port).create_bucket(Bucket=name))
    steadily(lambda: client(port).put_object(Bucket=name, Key="first", Body=b"there"))


def steadily(call: Callable[[], T]) -> T:
    """Call until it succeeds: the server listens before it can store and find anything."""
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + 60
    while True:
        try:
            return call()
        except (BotoCoreError, ClientError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def stored(port: int, bucket: str) -> dict[str, bytes]:
    """The objects of DVC's cache in a bucket, by the MD5 that DVC names them by."""
    s3 = client(port)
    keys = [one["Key"] for one in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]
    return {
        "".join(key.split("/")[-2:]).removesuffix(".dir"): s3.get_object(Bucket=bucket, Key=key)[
            "Body"
        ].read()
        for key in keys
        if "/md5/" in key
    }


def share(project: Path, port: int, bucket: str) -> None:
    """Make the bucket the project's remote, and set its address, for this machine only."""
    dvc(project, "remote", "add", "--force", "--default", "team", f"s3://{bucket}/cache")
    dvc(project, "remote", "modify", "--local", "team", "endpointurl", f"http://127.0.0.1:{port}")


@contextmanager
def own_network() -> Iterator[None]:
    """A network of only this thread and its children, because Ray listens on every address of a machine.

    Raises PermissionError for users other than root.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as before:
        if libc.unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "no network of its own")
        try:
            with socket.socket() as any_socket:  # 127.0.0.1 is down at first
                fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
            yield
        finally:
            assert libc.setns(before.fileno(), CLONE_NEWNET) == 0


@contextmanager
def ray_node(folder: Path, *, is_head: bool = False, **more: str) -> Iterator[Callable[[], None]]:
    """A node with one CPU, of the cluster at HEAD; yields a function that kills it like a power cut."""
    folder.mkdir(exist_ok=True)
    place = ["--head", "--port=6379", "--include-dashboard=false"] if is_head else [f"--address={HEAD}"]
    # Short, because the path of a socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:
        command = [
            str(Path(sys.executable).parent / "ray"), "start", *place, "--num-cpus=1", "--block",
            f"--temp-dir={short}", "--object-store-memory=100000000", "--disable-usage-stats",
        ]  # fmt: skip
        with process(folder / "log", *command, **TOKEN, FASHION_CNN_TRIALS=str(folder), **more) as started:

            def kill() -> None:
                node = psutil.Process(started.pid)
                for one in [node, *node.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):  # already ended with another
                        one.kill()
                started.wait()

            try:
                log = folder / "log"
                wait_for(lambda: "Ray runtime started" in log.read_text(), started, log)
                yield kill
            finally:
                if started.poll() is None:
                    kill()
