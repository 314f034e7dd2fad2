"""One name a stage everywhere, and dvc.yaml says what the code does."""

import ast
import re

import pytest
import yaml
from conftest import ROOT, STAGES, code_deps, stage_definitions

from lib.idx import FILES
from lib.params import Params

SCRIPTS = sorted(path.stem for path in STAGES.glob("*.py"))
# Not named after a stage: the first is short for fetch_fashion_mnist, the others are shared.
SECTION_STAGES = {"fetch": "fetch_fashion_mnist", "split": None}


def test_scripts_stages_and_readme_table_are_the_same_list():
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert table == list(stage_definitions())
    assert sorted(table) == SCRIPTS


def test_every_params_section_belongs_to_a_stage():
    sections = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert list(sections) == list(Params.model_fields)
    assert {SECTION_STAGES.get(name, name) for name in sections} - {None} <= set(SCRIPTS)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_stage_has_a_description_and_runs_its_script_with_no_value_from_params(stage):
    definition = stage_definitions()[stage]
    assert definition["desc"]
    assert re.fullmatch(rf"exec python stages/{stage}\.py( \$\{{(key|item\.images)\}})?", definition["cmd"])


@pytest.mark.parametrize("stage", SCRIPTS)
def test_declared_code_is_what_the_script_imports(stage):
    declared = {dep for dep in stage_definitions()[stage]["deps"] if dep.startswith("stages/")}
    assert declared == code_deps(STAGES / f"{stage}.py")


@pytest.mark.parametrize("stage", SCRIPTS)
def test_declared_params_are_what_the_script_reads(stage):
    tree = ast.parse((STAGES / f"{stage}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "load_params"]
    sections = [argument.value for call in loads for argument in call.args]
    loaded = {
        f"{name}.{leaf}" for name in sections for leaf in Params.model_fields[name].annotation.model_fields
    }
    assert set(stage_definitions()[stage].get("params", [])) == loaded
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {leaf.split(".")[1] for leaf in loaded} <= read


def test_only_evaluate_cnn_reads_the_test_split():
    readers = {name for name, stage in stage_definitions().items() if "t10k" in str(stage)}
    assert readers == {"evaluate_cnn"}
    for path in STAGES.glob("*.py"):
        assert ("TEST_IMAGES" in path.read_text()) == (path.stem == "evaluate_cnn"), path


def test_no_script_loads_torch_before_the_project_has_set_its_environment():
    for path in STAGES.glob("*.py"):
        imported = {
            alias.name for node in ast.parse(path.read_text()).body for alias in getattr(node, "names", [])
        }
        assert "torch" not in imported, path


def test_lock_files_pin_every_direct_dependency_and_name_no_registry():
    lock = (ROOT / "requirements.lock").read_text() + (ROOT / "requirements-imgaug.lock").read_text()
    lines = [line for line in lock.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {line.split("==")[0].lower() for line in lines}
    project = (ROOT / "pyproject.toml").read_text()
    direct = set(re.findall(r'"([\w.-]+)>=', project))
    assert direct <= pinned


def test_the_data_card_has_the_files_that_are_fetched():
    card = (ROOT / "data/README.md").read_text()
    for file in FILES:
        shape = f"({', '.join(map(str, file.shape))}{',' * (len(file.shape) == 1)})"
        assert f"| `{file.name}` | {shape} uint8 | {file.size:,} | `{file.sha256}` |" in card


def test_sizes_stay_readable():
    for path in STAGES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 110, path
    for path in (STAGES / "lib").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 180, path
