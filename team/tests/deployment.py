"""The servers of deploy/compose.yaml on this machine, each started by its own command, without containers."""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path

import yaml

from fixtures import needs
from pipeline import environment
from project import ROOT
from servers import process
from team_servers import SECONDS, free_ports, is_free, wait_for

COMPOSE = ROOT / "team/deploy/compose.yaml"
POSTGRES = max(
    Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: float(path.parent.name)
)
CADDY = shutil.which("caddy")
needs_servers = needs(
    (POSTGRES, "PostgreSQL: apt-get install postgresql"),
    (importlib.util.find_spec("psycopg2"), "make .venv/servers"),
)
needs_proxy = needs((CADDY, "Caddy: apt-get install caddy"))


def read_settings(file: Path) -> dict[str, str]:
    """The variables in an .env file."""
    return dict(line.split("=", 1) for line in file.read_text().splitlines())


def read_compose(settings: dict[str, str]) -> dict:
    """compose.yaml with `settings` filled in, as Compose does it."""
    text = re.sub(r"\$\{(\w+)(:\?[^}]*)?\}", lambda found: settings[found[1]], COMPOSE.read_text())
    return yaml.safe_load(text)


class Deployment:
    """All services, on 127.0.0.1. A second start() continues with the data of the first."""

    def __init__(self, folder: Path, settings: dict[str, str]):
        self.folder = folder
        self.postgres_port, self.s3_port, self.mlflow_port, self.proxy_port, *self.other_ports = free_ports(7)
        self.host = f"localhost:{self.proxy_port if CADDY else self.mlflow_port}"
        self.address = f"{'https' if CADDY else 'http'}://{self.host}"
        self.settings = settings | {"SERVER_NAME": self.host}
        self.services = read_compose(self.settings)["services"]
        self.certificate = folder / "caddy/pki/authorities/local/root.crt"
        self.places = {  # in the containers, and here
            "0.0.0.0": "127.0.0.1",
            "-ip=storage": "-ip=127.0.0.1",
            "-dir=/data": f"-dir={folder / 'storage'}",
            "-s3.port=8333": f"-s3.port={self.s3_port}",
            "storage:8333": f"127.0.0.1:{self.s3_port}",
            "127.0.0.1:8333": f"127.0.0.1:{self.s3_port}",
            "--port 5000": f"--port {self.mlflow_port}",
            "mlflow:5000": f"127.0.0.1:{self.mlflow_port}",
            "127.0.0.1:5000": f"127.0.0.1:{self.mlflow_port}",
            "/etc/mlflow/": f"{ROOT / 'team/deploy'}/",
            "/etc/caddy/": f"{folder}/",
        }
        (folder / "storage").mkdir()
        self._running, self.is_stopped = ExitStack(), True

    def start(self, *names: str) -> None:
        """Start some services, or all, in their order, each once the one before it is healthy."""
        ways = {"postgres": self._postgres, "storage": self._storage, "mlflow": self._mlflow}
        ways |= {"proxy": self._proxy} if CADDY else {}
        assert self.is_stopped
        with ExitStack() as starting:
            for name in names or ways:
                self._wait(name, starting.enter_context(ways[name]()))
            self._running, self.is_stopped = starting.pop_all(), False

    def stop(self) -> None:
        """Stop all services, the last one first."""
        self._running.close()
        self.is_stopped = True

    def query(self, sql: str) -> list[tuple]:
        """The rows that the runs' database returns."""
        import psycopg2

        settings = {"host": "127.0.0.1", "port": self.postgres_port, "user": "mlflow", "dbname": "mlflow"}
        password = self.settings["POSTGRES_PASSWORD"]
        with closing(psycopg2.connect(password=password, **settings)) as connection:
            cursor = connection.cursor()
            cursor.execute(sql)
            return cursor.fetchall()

    def objects(self) -> dict[str, int]:
        """The keys and sizes of the objects in the bucket."""
        import boto3

        variables = self.variables("mlflow")
        s3 = boto3.client(
            "s3", endpoint_url=variables["MLFLOW_S3_ENDPOINT_URL"],
            region_name=variables["AWS_DEFAULT_REGION"],
            aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
        )  # fmt: skip
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket="mlflow")
        return {one["Key"]: one["Size"] for page in pages for one in page.get("Contents", [])}

    def run(self, words: str, folder: Path) -> None:
        """Run a shell command that the page runs in a container, with the variables of service mlflow."""
        assert POSTGRES
        variables = environment(**self.variables("mlflow"))
        variables["PATH"] = f"{POSTGRES}:{variables['PATH']}"
        done = subprocess.run(
            ["bash", "-c", self.here(words)], cwd=folder, env=variables, check=False, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout

    def here(self, text: str) -> str:
        """A text of compose.yaml, with its places replaced by those on this machine."""
        for there, here in self.places.items():
            text = text.replace(there, here)
        return text

    def variables(self, service: str) -> dict[str, str]:
        """The environment of a service."""
        found = {name: self.here(value) for name, value in self.services[service]["environment"].items()}
        if "PGHOST" in found:
            found |= {"PGHOST": "127.0.0.1"}
        return found | {"PGPORT": str(self.postgres_port), "XDG_DATA_HOME": str(self.folder)}

    def _process(self, service: str, *options: str) -> AbstractContextManager[subprocess.Popen]:
        definition = self.services[service]
        command = [*definition.get("entrypoint", []), *shlex.split(self.here(definition["command"]))]
        log = self.folder / f"{service}.log"
        return process(log, *command, *options, **self.variables(service))

    def _mlflow(self) -> AbstractContextManager[subprocess.Popen]:
        return self._process("mlflow")

    def _storage(self) -> AbstractContextManager[subprocess.Popen]:
        names = ("master", "volume", "filer")
        ports = [f"-{name}.port={port}" for name, port in zip(names, self.other_ports, strict=True)]
        return self._process("storage", *ports)

    def _proxy(self) -> AbstractContextManager[subprocess.Popen]:
        """The Caddyfile gets a head that keeps Caddy on 127.0.0.1 and out of this machine's trust store."""
        text = self.here((ROOT / "team/deploy/Caddyfile").read_text())
        head = ("admin off", "default_bind 127.0.0.1", "skip_install_trust", "auto_https disable_redirects")
        (self.folder / "Caddyfile").write_text("\n".join(["{", *head, "}", text]))
        return self._process("proxy")

    @contextmanager
    def _postgres(self) -> Iterator[subprocess.Popen]:
        """What the image does: make user and database at the first start, then serve."""
        assert POSTGRES
        made = self.services["postgres"]["environment"]
        data, password = self.folder / "postgres", self.folder / "password"
        user, is_root = "postgres", os.geteuid() == 0  # PostgreSQL refuses to run as root
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if is_root else []
        is_new = not data.exists()
        if is_new:
            data.mkdir(mode=0o700)
            password.write_text(made["POSTGRES_PASSWORD"])
            if is_root:
                shutil.chown(data, user)
                shutil.chown(password, user)
            subprocess.run(
                [*become, POSTGRES / "initdb", "--pgdata", data, "--username", made["POSTGRES_USER"],
                 "--pwfile", password, "--auth", "scram-sha-256"],
                check=True, stdout=subprocess.DEVNULL, cwd="/", timeout=SECONDS,
            )  # fmt: skip
        command = [*become, str(POSTGRES / "postgres"), "-D", str(data), "-p", str(self.postgres_port)]
        options = shlex.split(self.services["postgres"]["command"])
        options += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        with process(self.folder / "postgres.log", *command, *options) as server:
            self._wait("postgres", server)
            if is_new:
                variables = environment(**self.variables("mlflow"))
                subprocess.run(
                    [POSTGRES / "createdb", "--maintenance-db=postgres", made["POSTGRES_DB"]],
                    check=True, env=variables, timeout=SECONDS,
                )  # fmt: skip
            yield server
            server.send_signal(signal.SIGINT)  # as `docker stop` does with this image
            server.wait(timeout=30)

    def _wait(self, service: str, server: subprocess.Popen) -> None:
        """Wait until the health check in compose.yaml succeeds; without one, until the proxy answers."""
        check = self.services[service].get("healthcheck", {}).get("test", [])
        command = [self.here(word) for word in check[1:]]

        def is_healthy() -> bool:
            if not command:
                return self.certificate.exists() and not is_free(self.proxy_port)
            return not subprocess.run(
                command, env=environment(**self.variables(service)), check=False, timeout=30,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            ).returncode  # fmt: skip

        wait_for(is_healthy, server, self.folder / f"{service}.log")
