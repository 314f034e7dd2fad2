"""Read params.yaml, and validate all of it before any work."""

import json
from pathlib import Path

from pydantic import ValidationError
from ruamel.yaml import YAML, YAMLError

from fashion_cnn.project.errors import StageError
from fashion_cnn.schema import Params, explain

PARAMS_PATH = Path("params.yaml")


def load_params(path: Path = PARAMS_PATH) -> Params:
    """The sections of `path`, frozen. All of it is validated, whichever sections the caller reads.

    Raises StageError, one line with the path, the value and what is allowed.
    """
    try:
        return Params.model_validate(read_yaml(path))
    except ValidationError as error:
        raise StageError(f"{path}: {explain(error)}") from None


def leaves(params: Params, *sections: str) -> dict[str, object]:
    """Flatten the named sections to {"train_cnn.epochs": 5, …}, the keys that DVC and MLflow show."""
    return {
        f"{name}.{leaf}": value
        for name in sections
        for leaf, value in getattr(params, name).model_dump().items()
    }


def read_yaml(path: Path) -> object:
    """The content of a YAML file. Raises StageError, one line, if it cannot be read."""
    try:
        # DVC's own parser, configured as in DVC: another might read 010, 1:30 or 1e-3 as another value.
        return YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path}: not found in {Path.cwd()}; run from the repository root") from None
    except UnicodeDecodeError as error:
        raise StageError(f"{path}: byte {error.start} is not UTF-8, expected UTF-8 text") from None
    # In addition to its own errors, it raises those of int(), of dates and of deep nesting.
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StageError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None


def params_in(content: bytes) -> dict[str, object]:
    """The params in a params.yaml of any version, by their paths; none if it is damaged."""
    try:
        sections = YAML(typ="safe").load(content)
        return {f"{name}.{leaf}": value for name, part in sections.items() for leaf, value in part.items()}
    except (YAMLError, AttributeError):
        return {}


def as_yaml(value: object) -> str:
    """A value as written in params.yaml, which `dvc exp run -S` accepts."""
    return value if isinstance(value, str) else json.dumps(value)
