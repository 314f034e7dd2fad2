"""The space of a search: what -S says, in Hydra's syntax, as Optuna's distributions."""

import itertools
import math
from typing import Any

from ruamel.yaml import YAML

from fashion_cnn.project.errors import StageError
from fashion_cnn.project.params import PARAMS_PATH

EXAMPLE = "train_cnn.epochs=2,4"


def read_space(settings: list[str]) -> tuple[dict, dict]:
    """Optuna's distributions of the params that vary, and the values of those that do not.

    Raises StageError if a setting is not in Hydra's syntax, or if nothing varies.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from optuna.distributions import CategoricalDistribution

    varied: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    for setting in settings:
        try:
            override = OverridesParser.create().parse_override(setting)
            name, value = override.key_or_group, override.value()
            if name in varied | fixed or setting.startswith(("+", "~")):
                raise ValueError("name each param once, without + or ~")
            if override.is_interval_sweep():
                varied[name] = interval(value)
            elif override.is_sweep_override():
                varied[name] = CategoricalDistribution([plain(one) for one in override.sweep_iterator()])
            else:
                fixed[name] = plain(value)
        except (HydraException, ValueError, OverflowError) as error:
            fault = str(error).splitlines()[0]
            raise StageError(f"-S {setting}: {fault}; expected PATH=VALUES, such as {EXAMPLE}") from None
    if not varied:
        expected = f"expected a param with several values, such as {EXAMPLE}"
        raise StageError(f"-S {' -S '.join(settings)}: nothing varies, {expected}")
    return varied, fixed


def interval(sweep):
    """Optuna's distribution of Hydra's interval, which may have the tags int and log."""
    from optuna.distributions import FloatDistribution, IntDistribution

    if wrong := sorted(sweep.tags - {"int", "log"}):
        raise ValueError(f"tag {wrong[0]}, which is not int or log")
    if "int" in sweep.tags:
        if sweep.start != int(sweep.start) or sweep.end != int(sweep.end):
            raise ValueError("the ends of an int interval must be integers")
        return IntDistribution(int(sweep.start), int(sweep.end), log="log" in sweep.tags)
    return FloatDistribution(sweep.start, sweep.end, log="log" in sweep.tags)


def plain(value: Any) -> str | int | float | None:
    """Convert a value of Hydra's to one for params.yaml. Raises ValueError for lists and the like."""
    value = getattr(value, "text", value)  # a quoted string has one
    if not isinstance(value, str | int | float | None) or "${" in str(value):
        raise ValueError(f"{value} is not a value for a param")
    if isinstance(value, str) and YAML(typ="safe").load(value) != value:
        raise ValueError(f"'{value}' is quoted, but without quotes, as in {PARAMS_PATH}, it is another value")
    return value


def values_between(interval) -> list[float]:
    """A non-integer inside an interval of floats; none for an interval of integers."""
    between = interval.low + (interval.high - interval.low) / math.e
    return [] if isinstance(interval.low, int) else [between]


def grid(varied: dict) -> list[dict]:
    """Every combination of values. Raises StageError if a param has an interval."""
    for name, values in varied.items():
        if not hasattr(values, "choices"):
            raise StageError(f"-S {name}: an interval, expected values such as 16,32,64 for a grid")
    choices = itertools.product(*(values.choices for values in varied.values()))
    return [dict(zip(varied, point, strict=True)) for point in choices]
