"""Whether one model or setting is significantly better than another: tests, intervals, sample sizes."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05  # significance level of every test; every interval has the confidence level 1 − LEVEL
POWER = 0.8  # of a comparison with the number of images or seeds that "would decide"


@dataclass(frozen=True)
class Judgement:
    """One question and its answer: is an accuracy of B significantly better than that of A?"""

    what: str  # which test images
    difference: float  # B − A
    low: float  # lower bound of the interval of the difference
    high: float
    p: float | None  # p-value of the test; None without a test
    n: int
    unit: str  # what n counts: images or seeds
    needed: int | None  # how many would detect this difference, if these n do not
    how: str
    verdict: str  # better, worse or ALIKE


ALIKE = "not significantly different"


def verdict(told: bool, difference: float) -> str:
    """The verdict, given whether the difference is significant."""
    return ("better" if difference > 0 else "worse") if told else ALIKE


def same_images(what: str, a: np.ndarray, b: np.ndarray, names: tuple[str, str] = ("A", "B")) -> Judgement:
    """Two models on the same images: McNemar's exact test, and the matching interval.

    a, b (N,) bool: which images each model classifies correctly. The interval is Clopper and Pearson's of the
    share of B among the images that only one model classifies correctly.
    """
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    one_alone, difference = only_a + only_b, (only_b - only_a) / n
    if one_alone:
        test = stats.binomtest(only_b, one_alone)
        p, share = float(test.pvalue), test.proportion_ci(1 - LEVEL)
        low, high = ((2 * bound - 1) * one_alone / n for bound in share)
    else:
        p, high = 1.0, stats.binomtest(0, n).proportion_ci(1 - LEVEL).high
        low = -high
    how = (
        f"only {names[0]} is right on {only_a:,} images, only {names[1]} on {only_b:,}; "
        f"McNemar's exact test: p = {p:.2g}"
    )
    needed = None if p < LEVEL else images_needed(difference, one_alone / n - difference**2)
    return Judgement(
        what, difference, float(low), float(high), p, n, "images", needed, how,
        verdict(p < LEVEL, difference),
    )  # fmt: skip


def accuracies(what: str, a: float, b: float, n: int) -> Judgement:
    """Two accuracies on n images without results for each image: an interval that ignores the pairing."""
    difference, variance = b - a, a * (1 - a) + b * (1 - b)
    reach = float(stats.norm.isf(LEVEL / 2)) * (variance / n) ** 0.5
    how = "from the accuracies alone, as if on different images, so the interval is, if anything, too wide"
    told = abs(difference) > reach
    needed = None if told else images_needed(difference, variance)
    return Judgement(
        what, difference, difference - reach, difference + reach, None, n, "images", needed, how,
        verdict(told, difference),
    )  # fmt: skip


def seeds(what: str, a: dict[int, float], b: dict[int, float]) -> Judgement:
    """Two settings, one accuracy per seed: Student's t over common seeds, or Welch's t without them.

    Needs two or more seeds on each side.
    """
    common = sorted(a.keys() & b.keys())
    if len(common) > 1:
        values = np.array([b[seed] - a[seed] for seed in common])
        difference, variance, n, per_seed = values.mean(), values.var(ddof=1), len(values), 1
        test = None if np.ptp(values) < 1e-9 else stats.ttest_1samp(values, 0)
        how = "paired by seed, Student's t"
        if left_out := sorted(a.keys() ^ b.keys()):
            how += f", without seed {', '.join(map(str, left_out))}, which one side lacks"
    else:
        left, right = np.array(list(a.values())), np.array(list(b.values()))
        difference, variance = right.mean() - left.mean(), left.var(ddof=1) + right.var(ddof=1)
        n, per_seed = min(len(a), len(b)), 2
        test = (
            None if max(np.ptp(left), np.ptp(right)) < 1e-9 else stats.ttest_ind(right, left, equal_var=False)
        )
        how = "fewer than two common seeds, Welch's t"
    difference = float(difference)
    if test is None:
        how = "there is no variation between seeds, so they say nothing about chance"
        return Judgement(what, difference, difference, difference, None, n, "seeds", None, how, ALIKE)
    p, (low, high) = float(test.pvalue), test.confidence_interval(1 - LEVEL)
    needed = None if p < LEVEL else seeds_needed(difference, float(variance), per_seed)
    return Judgement(
        what, difference, float(low), float(high), p, n, "seeds", needed, f"{how}: p = {p:.2g}",
        verdict(p < LEVEL, difference),
    )  # fmt: skip


def images_needed(difference: float, variance: float) -> int | None:
    """How many images would detect `difference` with probability POWER; None if it is 0.

    `variance` is that of the difference on one image.
    """
    if difference == 0:
        return None
    reach = stats.norm.isf(LEVEL / 2) + stats.norm.isf(1 - POWER)
    return int(np.ceil(reach**2 * variance / difference**2))


def seeds_needed(difference: float, variance: float, sides: int) -> int | None:
    """The same for seeds, with Student's t, which is stricter for few; `sides` is 1 if paired by seed."""
    n = images_needed(difference, variance)
    while n is not None:
        n = max(n, 2)
        freedom, shift = sides * (n - 1), abs(difference) * (n / variance) ** 0.5
        if stats.nct.sf(stats.t.isf(LEVEL / 2, freedom), freedom, shift) >= POWER:
            break
        n += 1
    return n
