"""Whether one model or setting is better than another beyond noise: tests, intervals, and what would tell."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05  # of every test; that of every interval is 1 − LEVEL
POWER = 0.8  # of a comparison of as many images or seeds as "would tell"


@dataclass(frozen=True)
class Judgement:
    """One question and its answer: is B better than A in an accuracy, beyond noise?"""

    what: str  # which test images
    difference: float  # B − A
    low: float  # of the interval of the difference
    high: float
    p: float | None  # of the test, if there is one beside the interval
    n: int
    unit: str  # what n counts: images or seeds
    needed: int | None  # how many would tell this difference, if these n do not
    how: str
    verdict: str  # better, worse or not to be told apart


def judge(
    what: str, difference: float, interval: tuple[float, float], p: float | None, n: int, unit: str,
    variance: float, how: str,
) -> Judgement:  # fmt: skip
    """The verdict; `variance` is that of the difference in one image or seed."""
    low, high = map(float, interval)
    told = p < LEVEL if p is not None else low > 0 or high < 0
    verdict = ("better" if difference > 0 else "worse") if told else "not to be told apart"
    needed = None if told else images_or_seeds_needed(difference, variance)
    return Judgement(what, float(difference), low, high, p, n, unit, needed, how, verdict)


def same_images(what: str, a: np.ndarray, b: np.ndarray, names: tuple[str, str] = ("A", "B")) -> Judgement:
    """Two models on the same images: McNemar's exact test, and a bootstrap interval of the difference.

    a, b (N,) bool: which images each model reads right.
    """
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    p = float(stats.binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0
    # To draw images again is to draw how many of these three kinds there are.
    shares = [only_a / n, only_b / n, 1 - (only_a + only_b) / n]
    drawn = np.random.default_rng(0).multinomial(n, shares, 10_000)
    interval = np.quantile((drawn[:, 1] - drawn[:, 0]) / n, [LEVEL / 2, 1 - LEVEL / 2])
    difference = (only_b - only_a) / n
    how = (
        f"only {names[0]} is right on {only_a:,} images, only {names[1]} on {only_b:,}; "
        f"McNemar's exact test: p = {p:.2g}"
    )
    variance = (only_a + only_b) / n - difference**2
    return judge(what, difference, tuple(interval), p, n, "images", variance, how)


def accuracies(what: str, a: float, b: float, n: int) -> Judgement:
    """Two accuracies on n images, of which nothing is known by image: an interval that ignores the pairs."""
    variance = a * (1 - a) + b * (1 - b)
    reach = float(stats.norm.isf(LEVEL / 2)) * (variance / n) ** 0.5
    how = "from the accuracies alone, as if on different images, so the interval is rather too wide"
    return judge(what, b - a, (b - a - reach, b - a + reach), None, n, "images", variance, how)


def seeds(what: str, a: dict[int | None, float], b: dict[int | None, float]) -> Judgement:
    """Two settings, an accuracy for each seed: Student's t over pairs of a seed, else Welch's t.

    Needs two or more seeds on each side.
    """
    if a.keys() == b.keys():
        differences = np.array([b[seed] - a[seed] for seed in a])
        n, variance = len(differences), float(np.var(differences, ddof=1))
        test, how = stats.ttest_1samp(differences, 0), "paired by seed, Student's t"
    else:
        left, right = list(a.values()), list(b.values())
        n, variance = min(len(a), len(b)), float(np.var(left, ddof=1) + np.var(right, ddof=1))
        test, how = stats.ttest_ind(right, left, equal_var=False), "other seeds on each side, Welch's t"
    difference = float(np.mean(list(b.values())) - np.mean(list(a.values())))
    p, interval = float(test.pvalue), tuple(test.confidence_interval(1 - LEVEL))
    if np.isnan(p):  # no difference in any seed
        p, interval = 1.0, (0.0, 0.0)
    return judge(what, difference, interval, p, n, "seeds", variance, f"{how}: p = {p:.2g}")


def images_or_seeds_needed(difference: float, variance: float) -> int | None:
    """How many would tell `difference` in POWER of all cases, by the normal distribution; None if it is 0."""
    if difference == 0:
        return None
    reach = stats.norm.isf(LEVEL / 2) + stats.norm.isf(1 - POWER)
    return int(np.ceil(reach**2 * variance / difference**2))
