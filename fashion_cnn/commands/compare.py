"""Compare trained models or settings: is B better than A, worse, or not significantly different?"""

import json
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from fashion_cnn.commands import judgement
from fashion_cnn.commands.dvc_state import Experiment, experiments, left_out_if_damaged
from fashion_cnn.commands.judgement import ALIKE, Judgement
from fashion_cnn.commands.sides import WORKSPACE, Result, read_side, results_of
from fashion_cnn.project.catalog import CNNS, TOY
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.params import PARAMS_PATH, params_in
from fashion_cnn.project.repository import file_at

MOVED = {
    "test_accuracy_shift_3px": "shifted by ±3 px",
    "test_accuracy_rotation_15deg": "rotated by ±15°",
}
NEXT = """
compare   fashion-cnn compare NAME
name one  dvc exp run --name NAME -S train_cnn.learning_rate=0.0005; dvc exp rename OLD NEW
keep one  dvc exp apply NAME, then commit; or dvc exp branch NAME BRANCH
drop one  dvc exp remove NAME
go back   fashion-cnn back"""


def main(a: str, b: str, as_json: bool) -> None:
    """Compare two sides."""
    compared = [compare(*pair) for pair in pairs(a, b)]
    words = "\n\n".join([f"A  {a}\nB  {b}", *map(in_words, compared)])
    print(json.dumps(compared, indent=2) if as_json else words)


def list_all(as_json: bool) -> None:
    """List the experiments."""
    rows = [row_of_workspace()]
    for experiment in experiments():
        with left_out_if_damaged(experiment):
            rows.append(row_of(experiment))
    print(json.dumps(rows, indent=2) if as_json else listed(rows))


def pairs(a: str, b: str) -> list[tuple[list[Result], list[Result]]]:
    """The results to compare: those of each common training, or of the only training of each side."""
    left, right = read_side(a), read_side(b)
    if len(left) == len(right) == 1:
        return [(*left.values(), *right.values())]  # type: ignore[list-item]
    if common := [training for training in left if training in right]:
        return [(left[training], right[training]) for training in common]
    raise StageError(
        f"{a} has results of {', '.join(left)}, and {b} of {', '.join(right)}; expected a training that both "
        f"have, or one on each side, such as {WORKSPACE}@original"
    )


def compare(a: list[Result], b: list[Result]) -> dict:
    """All that is reported about the results of one training on each side."""
    names = [name for name in a[0].metrics if all(name in result.metrics for result in a + b)]
    return {
        "training": [a[0].training, b[0].training],
        "sources": [[result.source for result in side] for side in (a, b)],
        "same_weights": {one.weights_sha256 for one in a} == {one.weights_sha256 for one in b},
        "metrics": {name: [mean_and_deviation(name, side) for side in (a, b)] for name in names},
        "judgements": [asdict(judged) for judged in judgements(a, b)],
    }


def mean_and_deviation(name: str, results: list[Result]) -> dict:
    """The mean and standard deviation of a metric; a single value has no deviation."""
    values = [result.metrics[name] for result in results]
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "deviation": deviation, "n": len(values)}


def judgements(a: list[Result], b: list[Result]) -> list[Judgement]:
    """Judge test accuracy: over seeds if both sides have several, otherwise over images."""
    if not all("test_accuracy" in result.metrics for result in a + b):
        return []  # the toy, or a training that is not evaluated
    if min(len(a), len(b)) > 1:
        names = {"test_accuracy": "unmodified"} | moved_in(a + b)
        return [judgement.seeds(words, by_seed(name, a), by_seed(name, b)) for name, words in names.items()]
    if len(a) != len(b):
        raise StageError(
            f"{a[0].training}: {len(a)} results against {len(b)}, expected one each, or several on both sides"
        )
    [left], [right] = a, b
    if not left.labels or left.labels != right.labels:
        raise StageError(
            f"{left.source} and {right.source}: no predictions of the same test images, expected the tables "
            "that evaluate_cnn writes; `fashion-cnn sync` completes a run of MLflow"
        )
    labels, n = np.array(left.labels), min(left.moved_images, right.moved_images)
    rights = [np.array(side.predictions) == labels for side in (left, right)]
    return [judgement.same_images("unmodified", *rights)] + [
        judgement.accuracies(words, left.metrics[name], right.metrics[name], n)
        for name, words in moved_in([left, right]).items()
    ]


def moved_in(results: list[Result]) -> dict[str, str]:
    """The entries of MOVED that all the results have; those of early versions have none."""
    has = [result.metrics for result in results if result.moved_images]
    return {name: words for name, words in MOVED.items() if sum(name in one for one in has) == len(results)}


def by_seed(name: str, results: list[Result]) -> dict[int, float]:
    """A metric by seed. Raises StageError if two results have the same seed, or one has none."""
    found = {result.seed: result.metrics[name] for result in results if result.seed is not None}
    if len(found) < len(results):
        told = ", ".join(f"{result.source} has {result.seed}" for result in results)
        raise StageError(f"{results[0].training}: {told}; expected a different seed in each")
    return found


def in_words(compared: dict) -> str:
    """The table of metrics, and a sentence for each kind of test images."""
    names, several = compared["training"], len(compared["sources"][0]) > 1
    title = names[0] if names[0] == names[1] else f"A: {names[0]}, B: {names[1]}"
    if compared["same_weights"]:
        return f"{title}: the same weights on both sides, so A and B are identical"
    rows = [("", "A", "B", "B − A")]
    for name, (a, b) in compared["metrics"].items():
        rows.append((name, spread(a), spread(b), signed(b["mean"] - a["mean"])))
    sentences = [sentence(one) for one in compared["judgements"]]
    if not sentences and names[0] != TOY.stage:
        sentences.append("The weights are not evaluated on both sides, so test accuracy is not compared.")
    elif sentences and not several:
        sentences.append(
            "This compares two trained models. To compare their settings, train each with several seeds: see "
            "docs/experiments.md."
        )
    wrapped = [textwrap.fill(words, 100, subsequent_indent="  ") for words in sentences]
    return "\n".join([title, *table(rows), *wrapped])


def spread(side: dict) -> str:
    """The mean, and the standard deviation if there is one."""
    deviation = "" if side["deviation"] is None else f" ± {side['deviation']:.2g}"
    return f"{side['mean']:.5g}{deviation}"


def signed(value: float) -> str:
    """A difference to three digits."""
    return f"{value:+.3g}".replace("-", "−", 1)


def round_off(count: int) -> int:
    """Round to two digits: the estimate rests on an uncertain difference."""
    return int(float(f"{count:.2g}"))


def sentence(one: dict) -> str:
    """One sentence: better, worse or neither, by how much, and the sample size that would decide."""
    difference, low, high = (
        f"{100 * one[name]:+.2f}".replace("-", "−") for name in ("difference", "low", "high")
    )
    n, told = f"{one['n']:,} {one['unit']}", one["verdict"] != ALIKE
    start = f"B is {one['verdict']} than A" if told else f"A and B are {ALIKE} over {n}"
    more = f"; about {round_off(one['needed']):,} {one['unit']} would decide" if one["needed"] else ""
    return (
        f"Test images {one['what']}: {start}{more}. Difference {difference} points, 95 % interval {low} to "
        f"{high} ({n}, {one['how']})."
    )


def row_of_workspace() -> dict:
    """The working tree's row in the list; `changed` has the params that differ from HEAD."""
    return {"name": WORKSPACE, "changed": changed_params("HEAD"), "when": "", **accuracies(WORKSPACE)}


def row_of(experiment: Experiment) -> dict:
    """An experiment's row in the list; `changed` has the params that differ from the commit it began from."""
    changed = changed_params(experiment.baseline, experiment.reference)
    when = time.strftime("%m-%d %H:%M", time.localtime(experiment.time))
    return {"name": experiment.name, "changed": changed, "when": when, **accuracies(experiment.reference)}


def changed_params(baseline: str, reference: str | None = None) -> dict[str, object]:
    """The params of an experiment, or of the working tree, that differ from those of `baseline`."""
    content = file_at(reference, PARAMS_PATH) if reference else PARAMS_PATH.read_bytes()
    before = params_in(file_at(baseline, PARAMS_PATH) or b"")
    return {name: value for name, value in params_in(content or b"").items() if before.get(name) != value}


def accuracies(source: str) -> dict:
    """Val and test accuracy of each CNN, None if there is none."""
    metrics = {result.training: result.metrics for result in results_of(source)}
    return {
        f"{name}_{images}": metrics.get(training.stage, {}).get(f"{name}_accuracy")
        for images, training in CNNS.items()
        for name in ("val", "test")
    }


def listed(rows: list[dict]) -> str:
    """The experiments in at most 100 columns, and what can be done with them."""
    cells = [("", "", "original", "", "augmented", "", ""), ("name", "changed", *["val", "test"] * 2, "when")]
    room = 50 - min(20, max(len(row["name"]) for row in rows))  # for the changed params
    for row in rows:
        percent = [
            "" if row[name] is None else f"{100 * row[name]:.2f}"
            for name in row if name.startswith(("val_", "test_"))
        ]  # fmt: skip
        changed = ", ".join(f"{name}={value}" for name, value in row["changed"].items())
        cells.append((cut(row["name"], 20), cut(changed, room), *percent, row["when"]))
    return "\n".join([*table(cells), NEXT])


def cut(text: str, width: int) -> str:
    """`text`, or as much of it as fits."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of minimal width: words are left-aligned, numbers right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = [
        any(cell[:1].isdigit() for cell in column) and column[0] != "when"
        for column in zip(*rows, strict=True)
    ]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in rows
    ]
