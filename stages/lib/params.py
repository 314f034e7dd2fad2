"""params.yaml as typed models: validated as a whole before any work."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WrapValidator
from ruamel.yaml import YAML, YAMLError

from lib.errors import StageError
from lib.params_faults import explain

PARAMS_PATH = Path("params.yaml")
TRAIN_IMAGES = 60_000  # in Fashion-MNIST's train files

# A number stays as written, 20 or 20.0, so that MLflow shows what DVC does.
AsWritten = WrapValidator(lambda value, validate: (validate(value), value)[1])

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Threads = Annotated[int, Field(ge=1, le=256)]
LearningRate = Annotated[float, Field(gt=0, le=1), AsWritten]
Source = Annotated[str, Field(min_length=1), AfterValidator(lambda value: _source(value))]
Device = Literal["auto", "cpu", "cuda"]
Numerics = Literal["portable", "native"]


class Section(BaseModel):
    """A section of params.yaml: no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Fetch(Section):
    """Where Fashion-MNIST comes from."""

    sources: Annotated[list[Source], Field(min_length=1)]


class Split(Section):
    """Which train images train and which validate."""

    seed: Seed
    val_size: Annotated[int, Field(ge=1, le=TRAIN_IMAGES - 1)]
    train_size: Annotated[int, Field(ge=1, le=TRAIN_IMAGES - 1)] | None


class AugmentImages(Section):
    """What augment_images makes."""

    seed: Seed
    copies: Annotated[int, Field(ge=1, le=20)]
    max_shift: Annotated[int, Field(ge=0, le=14)]
    max_rotation: Annotated[float, Field(ge=0, le=180), AsWritten]


class TrainToyCnn(Section):
    """How train_toy_cnn trains."""

    seed: Seed
    epochs: Annotated[int, Field(ge=1, le=100_000)]
    learning_rate: LearningRate


class VerifyManualConv(Section):
    """What verify_manual_conv compares, and how closely."""

    seed: Seed
    images: Annotated[int, Field(ge=1, le=16)]
    tolerance: Annotated[float, Field(gt=0, le=1), AsWritten]


class TrainCnn(Section):
    """How train_cnn trains."""

    seed: Seed
    epochs: Annotated[int, Field(ge=1, le=1000)]
    batch_size: Annotated[int, Field(ge=1, le=TRAIN_IMAGES)]
    learning_rate: LearningRate
    device: Device
    threads: Threads
    numerics: Numerics


class EvaluateCnn(Section):
    """What evaluate_cnn measures."""

    device: Device
    threads: Threads
    numerics: Numerics
    robustness_images: Annotated[int, Field(ge=1, le=10_000)]
    mistakes: Annotated[int, Field(ge=1, le=100)]


class PlotResults(Section):
    """How plot_results draws."""

    dpi: Annotated[int, Field(ge=50, le=600)]


class Params(Section):
    """All of params.yaml, one section a stage; `split` is shared."""

    fetch: Fetch
    split: Split
    augment_images: AugmentImages
    train_toy_cnn: TrainToyCnn
    verify_manual_conv: VerifyManualConv
    train_cnn: TrainCnn
    evaluate_cnn: EvaluateCnn
    plot_results: PlotResults


def load_params(*sections: str, path: Path = PARAMS_PATH) -> SimpleNamespace:
    """Validate all of `path` and return the named sections as attributes.

    Raises StageError, one line with the path, the value and what is allowed.
    """
    params = parse_params(path)
    return SimpleNamespace(**{name: getattr(params, name) for name in sections})


def leaves(params: SimpleNamespace) -> dict[str, object]:
    """Flatten sections to {"train_cnn.epochs": 5, …}, the keys that DVC and MLflow show."""
    return {
        f"{name}.{leaf}": value
        for name, section in vars(params).items()
        for leaf, value in section.model_dump().items()
    }


def parse_params(path: Path = PARAMS_PATH) -> Params:
    """Read and validate `path`; see load_params for the errors."""
    try:
        # DVC's own reader, set up as DVC does: another might read 010, 1:30 or 1e-3 as another value.
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path}: not found in {Path.cwd()}; run from the repository root") from None
    except UnicodeDecodeError as error:
        raise StageError(f"{path}: byte {error.start} is not UTF-8, expected UTF-8 text") from None
    # Beside its own errors, it lets through those of int(), of dates and of deep nesting.
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StageError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        raise StageError(f"{path}: {explain(error, Params)}") from None
    _check_split(params.split, path)
    return params


def _source(value: str) -> str:
    if value.startswith("apt:") and not re.fullmatch("[a-z0-9][a-z0-9+.-]+", value[4:]):
        raise ValueError("not a package name by Debian's rule: apt-get could take it for an option")
    return value


def _check_split(split: Split, path: Path) -> None:
    remaining = TRAIN_IMAGES - split.val_size
    if split.train_size is not None and split.train_size > remaining:
        raise StageError(
            f"{path}: split.train_size is {split.train_size}, "
            f"expected at most {remaining} (60,000 - split.val_size)"
        )
