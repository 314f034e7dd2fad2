"""A team's server: Compose accepts deploy/, and its commands, run here, keep and protect the runs."""

import json
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import requests
from mlflow import MlflowClient

from deployment import CADDY, COMPOSE, Deployment, needs_proxy, needs_servers, read_compose, read_settings
from fashion_cnn.tracking.models import ready_models
from pipeline import dvc, environment, set_params, tool, tracked_runs, try_tool, two_stages
from project import ROOT, git
from team_servers import SECONDS

pytestmark = [
    pytest.mark.team,
    pytest.mark.filterwarnings("ignore"),  # MLflow's own warnings
]

PAGE = (ROOT / "team/deploy/README.md").read_text()
PASSWORDS = {"ana": "ana's long password", "ben": "ben's long password"}
STAGE, METRICS = "train_toy_cnn", "metrics/train_toy_cnn.json"


def command(start: str) -> str:
    """The command of team/deploy/README.md that begins with `start`."""
    [found] = [line[2:] for line in PAGE.splitlines() if line.startswith(f"$ {start}")]
    return found


def make_settings(folder: Path) -> subprocess.CompletedProcess:
    """Run the page's command that writes .env."""

    return subprocess.run(
        ["bash", "-c", command("(umask")], cwd=folder, check=False, text=True, capture_output=True
    )


def test_compose_schema():
    """Compose accepts the file."""
    subprocess.run(["check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE], check=True,
                   env=environment())  # fmt: skip


def test_env_settings(tmp_path):
    """The page's command makes all settings, and Git ignores their file."""
    done = make_settings(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    file = tmp_path / ".env"
    settings = read_settings(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert set(settings) == set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    secrets = [value for name, value in settings.items() if name not in ("SERVER_NAME", "TLS")]
    assert len(set(secrets)) == 4
    assert all(re.fullmatch("[0-9a-f]{48}", one) for one in secrets)
    # A second run would lose the password of the existing database.
    assert make_settings(tmp_path).returncode != 0
    assert read_settings(file) == settings
    assert git(ROOT, "check-ignore", "team/deploy/.env") == "team/deploy/.env\n"


def test_ports_and_images(tmp_path):
    """Only the proxy can be reached, and every image is pinned."""
    make_settings(tmp_path)
    compose = read_compose(read_settings(tmp_path / ".env"))
    services = compose["services"]
    assert [name for name, one in services.items() if "ports" in one] == ["proxy"]
    assert compose["networks"]["inside"] == {"internal": True}
    assert {name for name, one in services.items() if one["networks"] == ["inside"]} == {
        "postgres",
        "storage",
    }
    images = [one["image"] for one in services.values() if "image" in one]
    images += re.findall("^FROM (.*)$", (ROOT / "team/deploy/Dockerfile").read_text(), re.MULTILINE)
    assert len(images) == 4
    assert all(re.fullmatch(r"[\w/-]+:\d+\.\d+[\w.-]*", image) for image in images)


def test_connection_pool(tmp_path):
    """Every thread of the server has a connection to the database.

    SQLAlchemy's default, 15 for each worker, made some of 64 clients wait for 30 s and fail.
    """
    make_settings(tmp_path)
    services = read_compose(read_settings(tmp_path / ".env"))["services"]
    workers = int(re.search(r"--workers (\d+)", services["mlflow"]["command"])[1])
    pool, overflow = (
        int(services["mlflow"]["environment"][f"MLFLOW_SQLALCHEMYSTORE_{name}"])
        for name in ("POOL_SIZE", "MAX_OVERFLOW")
    )
    assert pool >= anyio.run(threads)
    stores, superusers = 2, 3  # runs and users; PostgreSQL keeps 3 connections for superusers
    allowed = int(services["postgres"]["command"].rpartition("=")[2])
    assert stores * workers * (pool + overflow) <= allowed - superusers


async def threads() -> float:
    """How many requests a worker of an ASGI server answers at once."""
    return anyio.to_thread.current_default_thread_limiter().total_tokens


def test_dockerfile():
    """The image is made of files that exist and does not run as root."""
    text = (ROOT / "team/deploy/Dockerfile").read_text()
    copied = re.findall(r"^COPY (\S+) \S+$", text, re.MULTILINE)
    let_through = re.findall(
        "^!(.*)$", (ROOT / "team/deploy/Dockerfile.dockerignore").read_text(), re.MULTILINE
    )
    assert sorted(copied) == sorted(let_through)
    assert all((ROOT / path).is_file() for path in copied)
    assert re.findall("^USER (.*)$", text, re.MULTILINE) == ["mlflow"]


@pytest.fixture(scope="module")
def server() -> Iterator[Deployment]:
    """All servers, with the members ana and ben."""
    # Not in pytest's folders, because PostgreSQL's user may not enter them.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)
        make_settings(folder)
        deployment = Deployment(folder, read_settings(folder / ".env"))
        deployment.start()
        try:
            for member, password in PASSWORDS.items():
                add_member(deployment, member, password)
            yield deployment
        finally:
            deployment.stop()


def as_admin(server: Deployment, start: str, **body: str) -> None:
    """Run the page's command that begins with `start`, with another body."""
    changes = {
        "--user admin": f"--user admin:{server.settings['MLFLOW_AUTH_ADMIN_PASSWORD']}",
        "--cacert root.crt": f"--cacert {server.certificate}" if CADDY else "",
        "https://mlflow.example.com": server.address,
    }
    text = command(start)
    for there, here in changes.items():
        assert there in text
        text = text.replace(there, here)
    words = shlex.split(text)
    place = words.index("--json") + 1
    assert set(json.loads(words[place])) == set(body)
    words[place] = json.dumps(body)
    done = subprocess.run(words, check=False, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def add_member(server: Deployment, name: str, password: str) -> None:
    as_admin(
        server,
        "curl --fail-with-body --user admin --cacert root.crt --json",
        username=name,
        password=password,
    )


def as_member(server: Deployment, name: str) -> dict[str, str]:
    """The variables that the page tells members to set."""
    values = {
        "MLFLOW_TRACKING_URI": server.address,
        "MLFLOW_TRACKING_USERNAME": name,
        "MLFLOW_TRACKING_PASSWORD": PASSWORDS[name],
        "MLFLOW_TRACKING_SERVER_CERT_PATH": str(server.certificate),
    }
    assert set(values) == set(
        re.findall(r"(MLFLOW_\w+)=", "".join(re.findall(r"^\$ export .*$", PAGE, re.M)))
    )
    return values if CADDY else {name: value for name, value in values.items() if "CERT" not in name}


def runs_of(server: Deployment, name: str, monkeypatch) -> list:
    """The runs that a member sees."""
    for variable, value in as_member(server, name).items():
        monkeypatch.setenv(variable, value)
    return tracked_runs(Path(), store=server.address)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project with one training, whose run is in a store of its own."""
    return two_stages(tmp_path_factory.mktemp("a member") / "project")


def ask(server: Deployment, path: str, who: tuple[str, str] | None, **more) -> requests.Response:
    method = "POST" if "json" in more else "GET"
    verify = str(server.certificate) if CADDY else True
    return requests.request(method, server.address + path, auth=who, verify=verify, timeout=30, **more)


DELETE = "/api/2.0/mlflow/runs/delete"
SEARCH = "/api/2.0/mlflow/experiments/search"


@needs_servers
def test_no_password(server):
    """A client without a valid password gets nothing."""
    query = {"max_results": 10}
    assert ask(server, SEARCH, ("ana", PASSWORDS["ana"]), json=query).status_code == 200
    for who in (None, ("ana", PASSWORDS["ben"]), ("admin", "password"), ("admin", "password1234")):
        for path, more in (("/", {}), (SEARCH, {"json": query}), ("/api/2.0/mlflow-artifacts/artifacts", {})):
            assert ask(server, path, who, **more).status_code == 401, (who, path)
    new = {"username": "eve", "password": "eve's long password"}
    assert ask(server, "/api/2.0/mlflow/users/create", ("ana", PASSWORDS["ana"]), json=new).status_code == 403
    assert [name for (name,) in server.query("SELECT username FROM users ORDER BY 1")] == [
        "admin",
        "ana",
        "ben",
    ]
    assert not [row for row in server.query("SELECT password_hash FROM users") if "long password" in row[0]]


@needs_servers
def test_removed_member(server):
    """A member who was removed gets nothing."""
    add_member(server, "eve", "eve's long password")
    as_admin(server, "curl --fail-with-body --user admin --cacert root.crt --request", username="eve")
    assert ask(server, SEARCH, ("eve", "eve's long password"), json={"max_results": 1}).status_code == 401


@needs_servers
@needs_proxy
def test_upload_limit(server):
    """An upload above the limit is refused."""
    [limit] = re.findall(r"max_size (\d+)MB", (ROOT / "team/deploy/Caddyfile").read_text())
    place = f"{server.address}/api/2.0/mlflow-artifacts/artifacts/0/a-file"
    who = ("admin", server.settings["MLFLOW_AUTH_ADMIN_PASSWORD"])
    for size, statuses in ((1000, {200}), (int(limit) * 10**6 + 1, {413, 502})):  # 502: Caddy 2.6
        done = requests.put(place, b" " * size, auth=who, verify=str(server.certificate), timeout=60)
        assert done.status_code in statuses, size


@needs_servers
def test_other_hosts(server):
    """Requests from pages of other hosts are refused."""
    ana, query = ("ana", PASSWORDS["ana"]), {"max_results": 10}
    direct = f"http://127.0.0.1:{server.mlflow_port}{SEARCH}"
    for host, status in ((server.host, 200), ("attacker.example", 403), ("127.0.0.1", 403)):
        done = requests.post(direct, auth=ana, json=query, headers={"Host": host}, timeout=30)
        assert done.status_code == status, host
    for origin, status in ((f"https://{server.host}", 200), ("https://attacker.example", 403)):
        assert ask(server, SEARCH, ana, json=query, headers={"Origin": origin}).status_code == status, origin


@needs_servers
@needs_proxy
def test_tls_only(server):
    """The proxy accepts only TLS."""
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(server.address, timeout=30)  # this machine does not know its authority
    plain = requests.get(server.address.replace("https", "http"), timeout=30)
    assert (plain.status_code, plain.text) == (400, "Client sent an HTTP request to an HTTPS server.\n")


@needs_servers
def test_shared_runs(server, project, monkeypatch, tmp_path):
    """Members share runs, and a restart keeps them."""
    [own] = tracked_runs(project)
    assert runs_of(server, "ana", monkeypatch) == []
    ana, ben = as_member(server, "ana"), as_member(server, "ben")
    # Ana trains.
    printed = dvc(project, "repro", "--force", "--single-item", STAGE, **ana).stdout
    assert f"MLflow: sent to {server.address}" in printed or "within 30 s; the follower" in printed
    deadline = time.monotonic() + SECONDS
    while any((project / ".records").glob("[!.]*")):  # the follower's; they wait on a busy machine
        assert time.monotonic() < deadline
        time.sleep(0.5)
    [run] = runs_of(server, "ben", monkeypatch)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == own.data.metrics
    assert run.data.params == own.data.params
    assert run.data.tags["weights_sha256"] == own.data.tags["weights_sha256"]
    assert server.query("SELECT run_uuid, status FROM runs") == [(run.info.run_id, "FINISHED")]
    [model] = ready_models(MlflowClient(server.address), run)
    folder = model.artifact_location.removeprefix("mlflow-artifacts:/")
    assert {f"{folder}/MLmodel", f"{folder}/data/toy_cnn.safetensors"} <= set(server.objects())
    # Ben trains without the server, and then sends what dvc.lock has of it.
    set_params(project, {STAGE: {"seed": 5}})
    dvc(project, "repro", STAGE)
    [weights] = json.loads((project / METRICS).read_text())["weights_sha256"]
    assert weights != run.data.tags["weights_sha256"]
    assert "made" in tool(project, "sync", **ben)
    brought, first = runs_of(server, "ana", monkeypatch)
    assert first.info.run_id == run.info.run_id
    assert brought.data.tags["weights_sha256"] == weights
    assert brought.data.params[f"{STAGE}.seed"] == "5"
    assert brought.data.metrics == tracked_runs(project)[0].data.metrics
    # The second time, with the page's file instead of the variables, there is nothing to send.
    (tmp_path / ".mlflow").mkdir()
    [user, secret] = re.findall(r"`(mlflow_tracking_\w+ = )[\w…]+`", PAGE)
    (tmp_path / ".mlflow/credentials").write_text(f"[mlflow]\n{user}ben\n{secret}{PASSWORDS['ben']}\n")
    address = {name: value for name, value in ben.items() if not name.endswith(("USERNAME", "PASSWORD"))}
    assert tool(project, "sync", HOME=str(tmp_path), **address).count("up to date") == 1
    # He can add to Ana's experiment, but not delete from it.
    for who, status in (("ben", 403), ("ana", 200)):
        done = ask(server, DELETE, (who, PASSWORDS[who]), json={"run_id": brought.info.run_id})
        assert done.status_code == status
    assert [one.info.run_id for one in runs_of(server, "ben", monkeypatch)] == [run.info.run_id]
    # All of it is still there after a restart.
    before = server.objects()
    server.stop()
    server.start()
    [again] = runs_of(server, "ben", monkeypatch)
    assert again.to_dictionary() == run.to_dictionary()
    assert server.objects() == before


@needs_servers
def test_backup(server, project, monkeypatch, tmp_path):
    """A backup of the working server restores the runs on another machine."""
    before, objects = runs_of(server, "ana", monkeypatch), server.objects()
    assert before
    assert objects
    server.run(in_container("exec -T postgres", "pg_dump"), tmp_path)
    server.run(in_container("exec -T mlflow", "sh -c 'd=$(mktemp -d) && mlflow"), tmp_path)
    server.stop()
    try:
        found, restored = restore(server.settings, tmp_path, monkeypatch)
    finally:
        server.start()
    assert [run.to_dictionary() for run in found] == [run.to_dictionary() for run in before]
    assert restored == objects


def restore(settings: dict[str, str], backup: Path, monkeypatch) -> tuple[list, dict]:
    """Runs and objects on another machine that is restored from a backup."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)
        other = Deployment(folder, settings)
        try:
            other.start("postgres")
            other.run(in_container("exec -T postgres", "pg_restore"), backup)
            other.run(in_container("run --rm --no-deps mlflow", "mlflow db upgrade"), backup)
            other.stop()
            other.start()
            other.run(in_container("exec -T mlflow", "sh -c 'd=$(mktemp -d) && tar"), backup)
            return runs_of(other, "ana", monkeypatch), other.objects()
        finally:
            other.stop()


def in_container(prefix: str, start: str) -> str:
    """The command that the page runs in a container and that begins with `start`."""
    [found] = [line for line in PAGE.splitlines() if line.startswith(f"$ docker compose {prefix} {start}")]
    return found.removeprefix(f"$ docker compose {prefix} ")


@needs_servers
@pytest.mark.parametrize("user", ["ana", "nobody"])
def test_wrong_password(server, project, user):
    """The error for a wrong password is one line that does not show the password."""
    password = "some other password"
    wrong = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    done = try_tool(project, "sync", **as_member(server, "ana") | wrong)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: MLflow store {server.address}: ")
    assert "401" in done.stderr
    assert done.stderr.count("\n") == 1
    assert password not in done.stdout + done.stderr
    trained = dvc(project, "repro", "--force", "--single-item", STAGE, **as_member(server, "ana") | wrong)
    assert "`fashion-cnn sync` writes the rest" in trained.stdout
    assert password not in trained.stdout
