"""The schema of params.yaml: each section's values, their types and ranges.

This file is in no cache key: it only accepts or rejects values.
"""

import difflib
import re
import reprlib
from typing import Annotated, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    model_validator,
)

VIEWS = (1, 2, 6)
N_TRAIN = 60_000  # images in Fashion-MNIST's train files
LARGEST_BATCH = 2**15 - 1  # with more images, torch sums the losses over threads, in another order
SHOWN = reprlib.Repr()  # shows a value in one line, deeply nested lists and tables abbreviated
SHOWN.maxstring = SHOWN.maxother = 80  # characters

# Keep a number as written, 20 or 20.0, so that MLflow shows the same as DVC.
AsWritten = WrapValidator(lambda value, validate: (validate(value), value)[1])


def _source(value: str) -> str:
    if value.startswith("apt:") and not re.fullmatch("[a-z0-9][a-z0-9+.-]+", value[4:]):
        raise ValueError("not a package name by Debian's rule: apt-get could take it for an option")
    return value


def _views(value: int) -> int:
    if value not in VIEWS:
        raise ValueError
    return value


Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
LearningRate = Annotated[float, Field(gt=0, le=1), AsWritten]
Source = Annotated[str, Field(min_length=1), AfterValidator(_source)]
# Not a Literal: that would accept true as 1.
Views = Annotated[int, AfterValidator(_views), Field(json_schema_extra={"enum": list(VIEWS)})]
Device = Literal["auto", "cpu", "cuda"]


class Section(BaseModel):
    """A section of params.yaml: no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Fetch(Section):
    """Where Fashion-MNIST comes from."""

    sources: Annotated[list[Source], Field(min_length=1)]


class Split(Section):
    """The split of Fashion-MNIST's train images into train and val."""

    seed: Seed
    val_size: Annotated[int, Field(ge=1, le=N_TRAIN - 1)]
    train_size: Annotated[int, Field(ge=1, le=N_TRAIN - 1)] | None

    @model_validator(mode="after")
    def _leaves_enough(self) -> "Split":
        remaining = N_TRAIN - self.val_size
        if self.train_size is not None and self.train_size > remaining:
            raise ValueError(
                f"split.train_size is {self.train_size}, "
                f"expected at most {remaining} ({N_TRAIN:,} - split.val_size)"
            )
        return self


class AugmentImages(Section):
    """The copies that augment_images makes."""

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
    """The comparisons of verify_manual_conv, and their tolerance."""

    seed: Seed
    images: Annotated[int, Field(ge=1, le=16)]
    tolerance: Annotated[float, Field(gt=0, le=1), AsWritten]


class TrainCnn(Section):
    """How train_cnn trains."""

    seed: Seed
    epochs: Annotated[int, Field(ge=1, le=1000)]
    batch_size: Annotated[int, Field(ge=1, le=LARGEST_BATCH)]
    learning_rate: LearningRate
    model: Literal["lesson", "residual"]
    optimizer: Literal["adamw", "muon"]
    schedule: Literal["constant", "one-cycle"]
    weight_decay: Annotated[float, Field(ge=0, le=1), AsWritten]
    label_smoothing: Annotated[float, Field(ge=0, le=0.9), AsWritten]
    flips: bool
    shift: Annotated[int, Field(ge=0, le=14)]
    prune_easy: Annotated[float, Field(ge=0, le=1), AsWritten]
    tta_views: Views
    device: Device


class EvaluateCnn(Section):
    """The measurements of evaluate_cnn."""

    device: Device
    robustness_images: Annotated[int, Field(ge=1, le=10_000)]
    mistakes: Annotated[int, Field(ge=1, le=100)]


class PlotResults(Section):
    """How plot_results draws."""

    dpi: Annotated[int, Field(ge=50, le=600)]


class Params(Section):
    """All of params.yaml, one section per stage; `split` is shared."""

    fetch: Fetch
    split: Split
    augment_images: AugmentImages
    train_toy_cnn: TrainToyCnn
    verify_manual_conv: VerifyManualConv
    train_cnn: TrainCnn
    evaluate_cnn: EvaluateCnn
    plot_results: PlotResults


def explain(error: ValidationError) -> str:
    """Describe the first fault of `error`: the path, the value and what is allowed."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"] if part not in ("int", "none"))
    if fault["type"] == "value_error" and len(fault["loc"]) == 1:  # raised by a section's own validator
        return str(fault["ctx"]["error"])
    if fault["type"] in ("extra_forbidden", "invalid_key"):
        return f"{where} is not a known key{_suggest(fault['loc'])}"
    if fault["type"] == "missing":
        return f"{where} is missing, expected {_allowed(fault['loc'])}"
    shown = SHOWN.repr(fault["input"])
    return f"{where or 'the whole file'} is {shown}, expected {_allowed(fault['loc'])}"


def _suggest(location: tuple) -> str:
    siblings = _section(location[0]).model_fields if len(location) > 1 else Params.model_fields
    close = difflib.get_close_matches(str(location[-1]), siblings, n=1)
    return f"; did you mean {close[0]}?" if close else f", expected one of {', '.join(siblings)}"


def _allowed(location: tuple) -> str:
    """Say in words what the JSON schema allows at `location`."""
    if len(location) < 2:
        return "a section with " + ", ".join((_section(location[0]) if location else Params).model_fields)
    schema = _section(location[0]).model_json_schema()["properties"][location[1]]
    options = schema.get("anyOf", [schema])
    return " or ".join(_describe(option) for option in options)


def _section(name: str) -> type[BaseModel]:
    return cast(type[BaseModel], Params.model_fields[name].annotation)


def _describe(schema: dict) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(str(value) for value in schema["enum"])
    if schema["type"] == "array":
        kinds = "folders, http(s) addresses or apt:<package>, in lower-case letters, digits, +, - and ."
        return f"a list of one or more {kinds}"
    words = {
        "integer": "an integer", "number": "a number", "null": "null", "string": "text",
        "boolean": "true or false",
    }[schema["type"]]  # fmt: skip
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high = schema.get("maximum")
    if low is not None:
        words += f" from {low}"
    if above is not None:
        words += f" above {above}"
    if high is not None:
        words += f" to {high}" if low is not None else f" and at most {high}"
    return words
