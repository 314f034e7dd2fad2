"""One name per stage everywhere, and dvc.yaml says what the code does."""

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fashion_cnn.data.fashion_mnist import FILES, TRAIN_IMAGES
from fashion_cnn.project.catalog import TRAININGS
from fashion_cnn.schema import N_TRAIN, Params
from pipeline import dvc
from project import (
    PACKAGE,
    ROOT,
    SCRIPTS,
    STAGES,
    code_deps,
    git,
    imported_files,
    sections_read,
    stage_definitions,
)  # fmt: skip

# Not named after a stage: the first is short for fetch_fashion_mnist, the others are shared.
SECTION_STAGES = {"fetch": "fetch_fashion_mnist", "split": None}


PIPELINE = (ROOT / "docs/pipeline.md").read_text()


def test_stage_lists():
    """The scripts, dvc.yaml's stages and the table of stages are the same list."""
    table = re.findall(r"^\| `(\w+)` \|", PIPELINE, re.MULTILINE)
    assert table == list(stage_definitions())
    assert sorted(table) == SCRIPTS


def test_diagram():
    """The diagram shows the pipeline, except for arrows that others imply."""
    text = re.search(r"```mermaid\nflowchart TD\n(.+?)```", PIPELINE, re.DOTALL)[1]
    chains = [re.findall(r'(\w+)(?:\["?(.+?)"?\])?(?: -->|$)', line.strip()) for line in text.splitlines()]
    names = {short: name for chain in chains for short, name in chain if name}
    drawn = {(names[a], names[b]) for chain in chains for (a, _), (b, _) in itertools.pairwise(chain)}
    edges = set(re.findall(r'"(.+)" -> "(.+)"', dvc(ROOT, "dag", "--dot").stdout))
    paths = set(edges)
    while longer := {(a, c) for a, b in paths for start, c in edges if start == b} - paths:
        paths |= longer
    assert drawn == edges - {(a, c) for a, b in paths for start, c in paths if start == b}


def test_params_sections():
    """Every section of params.yaml belongs to a stage, unless several stages share it."""
    sections = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert list(sections) == list(Params.model_fields)
    assert {SECTION_STAGES.get(name, name) for name in sections} - {None} <= set(SCRIPTS)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_stage_command(stage):
    """A stage has a description and runs its script without a value from params.yaml."""
    definition = stage_definitions()[stage]
    assert definition["desc"]
    assert re.fullmatch(rf"exec python -m stages\.{stage}( \$\{{(key|item\.images)\}})?", definition["cmd"])


@pytest.mark.parametrize("stage", SCRIPTS)
def test_declared_code(stage):
    """A stage declares the code that its script imports."""
    code = ("stages/", "fashion_cnn/")
    declared = {dep for dep in stage_definitions()[stage]["deps"] if dep.startswith(code)}
    assert declared == code_deps(stage)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_declared_params(stage):
    """A stage declares the params that it reads."""
    sections = sections_read(stage)
    assert set(stage_definitions()[stage].get("params", [])) == sections
    nodes = [node for path in imported_files(STAGES / f"{stage}.py") for node in ast.walk(parsed(path))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    leaves = set()
    for name in sections:
        section, _, leaf = name.partition(".")
        leaves |= {leaf} if leaf else set(Params.model_fields[section].annotation.model_fields)
    assert leaves <= read


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def test_schema():
    """The schema agrees with params.yaml and the data.

    The order is that of params.yaml, in which MLflow and data/augmented show the params.
    """
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name, section in content.items():
        assert list(section) == list(Params.model_fields[name].annotation.model_fields)
    assert TRAIN_IMAGES.shape[0] == N_TRAIN


def test_trainings():
    """The catalog's trainings are those of dvc.yaml's map, with their files."""
    stages = stage_definitions()
    assert list(TRAININGS) == ["train_toy_cnn", *(f"train_cnn@{key}" for key in ("original", "augmented"))]
    for training in TRAININGS.values():
        name, _, images = training.stage.partition("@")
        stage = str(stages[name]).replace("${key}", images)
        for path in (training.weights, training.curve, training.metrics):
            assert f"'{path}" in stage
        checked = str(stages[training.evaluation.partition("@")[0]]).replace("${item.images}", images)
        assert f"'{training.evaluation_results}.json" in checked
        assert str(training.weights) in checked
    # Listed by git, because a training that runs in this clone may have removed the files.
    drawn = {Path(path).stem for path in git(ROOT, "ls-files", "metrics/figures").split()}
    assert drawn == {name for training in TRAININGS.values() for name in training.figures}


# Scripts import these first, because they take less than a second.
QUICK = {f"fashion_cnn.project.{name}" for name in ("catalog", "params", "process")}


def test_test_split_readers():
    """Only evaluate_cnn reads the test split."""
    readers = {name for name, stage in stage_definitions().items() if "t10k" in str(stage)}
    assert readers == {"evaluate_cnn"}
    for path in STAGES.glob("[!_]*.py"):
        assert ("TEST_IMAGES" in path.read_text()) == (path.stem == "evaluate_cnn"), path


def test_torch_loads_late():
    """No script loads torch before it has checked its arguments and the environment."""
    for path in STAGES.glob("[!_]*.py"):
        code = [node for node in parsed(path).body if not is_docstring(node)]
        [at] = [number for number, node in enumerate(code[:-1]) if isinstance(node, ast.If)]
        [call] = code[at].body
        reads = [name for name in ("named_cnn", "load_params") if f"{name}()" in path.read_text()]
        assert ast.unparse(call) == f"start({', '.join(reads)})", path
        assert {node.module for node in code[:at]} <= QUICK, path
    heavy = "{'torch', 'numpy', 'matplotlib', 'cv2'}"
    code = f"import sys, {', '.join(sorted(QUICK))}; assert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_init_modules():
    """An __init__.py holds no code, because dvc.yaml does not name each one."""
    for path in (STAGES / "__init__.py", *PACKAGE.rglob("__init__.py")):
        assert all(is_docstring(node) for node in parsed(path).body), path


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


RUN_BY_PATH = [ROOT / "tests/helpers/soak.py", ROOT / "tests/helpers/screenshots.py"]
RUN_BY_PATH += (ROOT / "benchmarks").glob("*.py")
LOCAL = {path.stem for folder in ("benchmarks", "tests/helpers") for path in (ROOT / folder).glob("*.py")}


@pytest.mark.parametrize("path", sorted(RUN_BY_PATH), ids=lambda path: path.name)
def test_script_imports(path):
    """A script finds what it imports.

    Python searches the script's folder first.
    """
    for node in ast.walk(parsed(path)):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            at_top = name.partition(".")[0]
            if at_top in LOCAL:
                assert path.with_name(f"{at_top}.py").exists(), name
            assert at_top == "fashion_cnn" or not (ROOT / at_top).is_dir(), name


def test_no_sys_path_edits():
    """No module edits the path of imports."""
    done = subprocess.run(["git", "grep", "-n", "sys[.]path", "--", "*.py"], cwd=ROOT, stdout=subprocess.PIPE)
    assert done.stdout.decode() == ""


def test_lock_files():
    """Lock files pin every direct dependency and do not name a registry."""
    files = [*ROOT.glob("*.lock"), *(ROOT / "team").glob("*.lock")]
    lock = "".join(path.read_text() for path in files if path.name.startswith("requirements"))
    lines = [line for line in lock.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {line.split("==")[0].lower() for line in lines}
    project = (ROOT / "pyproject.toml").read_text()
    direct = set(re.findall(r'"([\w.-]+)>=', project))
    assert direct <= pinned


def test_data_card():
    """The data card lists the files that are fetched."""
    card = (ROOT / "data/README.md").read_text()
    for file in FILES:
        shape = f"({', '.join(map(str, file.shape))}{',' * (len(file.shape) == 1)})"
        assert f"| `{file.name}` | {shape} uint8 | {file.size:,} | `{file.sha256}` |" in card


PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md", ".ci/run", "Makefile")]
PAGES += sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "team").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_references(page):
    """The commands, files and headings that a page names exist."""
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`(?:[A-Z_]+=\S+ )?make ([a-z-]+)", text)) <= targets
    assert set(re.findall(r"^\$ make ([a-z-]+)", text, re.MULTILINE)) <= targets
    for script in re.findall(r"python ([a-z]+/\w+\.py)", text):
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"python -m ((?:fashion_cnn|stages)[\w.]+\w)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for link in re.findall(r"\]\((?!http|\.\./\.\./actions/)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:stages|fashion_cnn|tests|benchmarks|docs)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    for anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", text):
        named = page.parent / anchor[0] if anchor[0] else page
        headings = re.findall(r"^#+ (.+)$", named.read_text(), re.MULTILINE)
        assert anchor[1] in [
            re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
        ]


def test_module_sizes():
    """Scripts and modules stay short enough to read."""
    for path in STAGES.glob("[!_]*.py"):
        assert len(path.read_text().splitlines()) <= 110, path
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name not in ("fashion_cnn", "commands", "tracking"):
            assert len(path.read_text().splitlines()) <= 180, path


def test_gitignore_links(tmp_path):
    """Git ignores links to a user's folders as it ignores the folders."""
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    for name in (".venv", "mlruns", "models", "page", ".checkpoints"):
        (tmp_path / name).symlink_to("elsewhere")
    git(tmp_path, "init", "--quiet")
    assert git(tmp_path, "status", "--porcelain").split() == ["??", ".gitignore"]
