"""The project's structure: its stages, the code each runs, and copies of its tree."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import yaml

from fashion_cnn.schema import Params

ROOT = Path(__file__).resolve().parents[2]
STAGES, PACKAGE = ROOT / "stages", ROOT / "fashion_cnn"
BY_FILE = (STAGES, PACKAGE / "lesson")  # dvc.yaml names their modules one by one
SCRIPTS = sorted(path.stem for path in STAGES.glob("[!_]*.py"))


def stage_definitions() -> dict[str, dict]:
    """dvc.yaml's stages, a foreach stage as the definition it repeats."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    return {name: stage.get("do", stage) for name, stage in stages.items()}


def code_deps(stage: str) -> set[str]:
    """The stage's script and everything that it imports from the package, as dvc.yaml must declare them.

    Imports are followed transitively. A folder stands for its modules, unless stages need few of them. The
    schema is left out, because it changes no result, and so are __init__.py, which hold docstrings.
    """
    files = imported_files(STAGES / f"{stage}.py") - {PACKAGE / "schema.py"}
    files = {path for path in files if path.name != "__init__.py"}
    declared = {path if path.parent in BY_FILE else path.parent for path in files}
    return {path.relative_to(ROOT).as_posix() for path in declared}


def imported_files(script: Path) -> set[Path]:
    """`script` and every local module it imports, transitively."""
    found: set[Path] = set()
    pending = [script]
    while pending:
        path = pending.pop()
        if path not in found:
            found.add(path)
            pending += _local_imports(path)
    return found


def _local_imports(path: Path) -> list[Path]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    # fashion_cnn.models.cnns runs the __init__.py of fashion_cnn and fashion_cnn.models first.
    names = [name.split(".") for name in modules]
    candidates = {ROOT.joinpath(*name[:length]) for name in names for length in range(1, len(name) + 1)}
    files = [path.with_suffix(".py") for path in candidates] + [path / "__init__.py" for path in candidates]
    return [path for path in files if path.is_file()]


def sections_read(stage: str) -> set[str]:
    """The sections of params.yaml that the script reads; if it reads only one key of a section, that key."""
    text = (STAGES / f"{stage}.py").read_text()
    keys: dict[str, set[str]] = {}  # keys read of each section; "" for all
    for section, key in re.findall(r"(?:load_params\(\)|\bparams)\.(\w+)(?:\.(\w+))?", text):
        if section in Params.model_fields:
            keys.setdefault(section, set()).add(key)
    return {
        section if len(own) > 1 or "" in own else f"{section}.{next(iter(own))}"
        for section, own in keys.items()
    }


def copy_of_project(folder: Path) -> Path:
    """Copy the working tree as git sees it, without a team's addresses, and commit it in a new repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        if (ROOT / name).is_file() and name != "team.env":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    commit_all(folder)
    return folder


def commit_all(folder: Path) -> None:
    """Make a folder a repository with one commit of everything in it."""
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "start")


def git(folder: Path, *arguments: str) -> str:
    """Run git in `folder` under a test identity; returns what it prints."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
