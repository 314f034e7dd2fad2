"""compare: its statistics against values computed in other ways, and its verdicts on whole sides."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from fashion_cnn.cli import cli
from fashion_cnn.commands import compare, judgement, sides
from fashion_cnn.commands.sides import Result, read_side
from fashion_cnn.project.errors import StageError
from project import git

CLASSES = ("Bag", "Coat")


def test_mcnemar_by_hand():
    """McNemar's exact test agrees with a computation by hand.

    Of 10 images that only one model gets right, A has 1: p = 2 · (C(10,0) + C(10,1)) / 2^10.
    """
    a = np.array([True] * 20 + [True] + [False] * 9)
    b = np.array([True] * 20 + [False] + [True] * 9)
    judged = judgement.same_images("all", a, b)
    assert judged.p == pytest.approx(2 * (1 + 10) / 1024)
    assert judged.difference == pytest.approx(8 / 30)
    assert (judged.verdict, judged.needed, judged.n) == ("better", None, 30)
    assert judgement.same_images("all", b, a).verdict == "worse"


def test_interval_matches_bootstrap():
    """The interval of the difference is about that of drawing the images again."""
    rng = np.random.default_rng(1)
    a, b = rng.random(2000) < 0.9, rng.random(2000) < 0.93
    judged = judgement.same_images("all", a, b)
    differences = b.astype(float) - a
    drawn = [rng.choice(differences, len(differences)).mean() for _ in range(4000)]
    assert (judged.low, judged.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.002)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 5), (0, 6), (1, 7), (2, 9), (10, 22), (10, 25), (30, 30)])
def test_interval_agrees_with_test(only_a, only_b):
    """The interval never contradicts the test: it excludes 0 if and only if p < 0.05."""
    a, b = np.zeros(100, bool), np.zeros(100, bool)
    a[:only_a], b[only_a : only_a + only_b] = True, True
    judged = judgement.same_images("all", a, b)
    assert (judged.p < 0.05) == (judged.low > 0 or judged.high < 0)
    assert (judged.verdict == "not significantly different") == (judged.p >= 0.05)


def test_models_that_agree():
    """Models that agree on all images do not differ significantly.

    No number of images would decide between them.
    """
    right = np.array([True, False] * 50)
    judged = judgement.same_images("all", right, right)
    assert (judged.p, judged.needed) == (1.0, None)
    # Clopper-Pearson: the models differ on at most a share of 1 − 0.025^(1/100) of all images.
    assert (judged.low, judged.high) == pytest.approx((0.025**0.01 - 1, 1 - 0.025**0.01))
    assert judged.verdict == "not significantly different"


def test_images_needed():
    """As many images as `images_needed` gives show the difference in four of five cases."""
    shares = np.array([0.04, 0.05, 0.91])  # only A right, only B right, neither or both
    needed = judgement.images_needed(0.01, 0.09 - 0.01**2)
    assert needed == math.ceil((1.959964 + 0.841621) ** 2 * (0.09 - 0.0001) / 0.0001)
    drawn = np.random.default_rng(0).multinomial(needed, shares, 2000)
    told = [stats.binomtest(int(b), int(a + b)).pvalue < 0.05 and b > a for a, b, _ in drawn]
    assert np.mean(told) == pytest.approx(0.8, abs=0.04)


def test_paired_seeds():
    """Seeds are paired if both sides have the same ones."""
    a, b = {0: 0.90, 1: 0.92, 2: 0.91}, {2: 0.92, 1: 0.925, 0: 0.91}
    judged = judgement.seeds("all", a, b)
    # Differences 0.01, 0.005, 0.01: mean 1/120, sd 1/346.41, t = 5; 4.3027 is the 97.5 % point of t with 2.
    assert judged.difference == pytest.approx(1 / 120)
    assert (judged.high - judged.low) / 2 == pytest.approx(4.302653 * (1 / 120) / 5, rel=1e-5)
    assert judged.p == pytest.approx(0.0377495, rel=1e-4)
    assert (judged.verdict, judged.n, judged.unit) == ("better", 3, "seeds")


def test_unpaired_seeds():
    """Seeds are not paired if the sides have different ones."""
    judged = judgement.seeds("all", {0: 0.90, 1: 0.92, 2: 0.91}, {3: 0.92, 4: 0.925, 5: 0.91})
    # Variances 1e-4 and 5.8333e-5 of three values each: t = 0.0083333 / sqrt(5.2778e-5).
    assert judged.difference / judged_deviation(judged) == pytest.approx(1.147079, rel=1e-5)
    assert judged.verdict == "not significantly different"
    rng = np.random.default_rng(0)
    told = [
        stats.ttest_ind(
            rng.normal(1 / 120, 0.0076376, judged.needed), rng.normal(0, 0.01, judged.needed)
        ).pvalue
        < 0.05
        for _ in range(2000)
    ]
    assert np.mean(told) == pytest.approx(0.8, abs=0.04)


def test_seeds_needed():
    """As many pairs of seeds as `seeds_needed` gives show the difference in four of five cases."""
    needed = judgement.seeds_needed(1.2, 1.0, sides=1)
    assert needed == 8  # the normal distribution gives six, which is too few
    drawn = np.random.default_rng(0).normal(1.2, 1, (4000, needed))
    assert np.mean(stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.04)
    assert judgement.seeds_needed(0, 1.0, sides=1) is None


def test_partly_shared_seeds():
    """Seeds that both sides have are paired, and the others are named."""
    judged = judgement.seeds("all", {0: 0.90, 1: 0.92, 2: 0.5}, {0: 0.91, 1: 0.935})
    assert judged.n == 2
    assert judged.difference == pytest.approx(0.0125)
    assert "without seed 2, which one side lacks" in judged.how


@pytest.mark.parametrize("n", [(100, 1000), (1000, 100)])
def test_moved_images_smaller_count(n):
    """The count of moved images is the smaller one of the two sides."""
    names = {"test_accuracy": 0.5, "test_accuracy_shift_3px": 0.7}
    a, b = (Result("x", "train_cnn@original", "", 0, names, ["Bag"] * 9, ["Coat"] * 9, count) for count in n)
    assert [judged.n for judged in compare.judgements([a], [b])] == [9, 100]


@pytest.mark.parametrize("more", [0, 0.001])
def test_same_difference_in_every_seed(more):
    """The same difference in every seed says nothing about chance."""
    judged = judgement.seeds("all", {0: 0.91, 1: 0.92}, {0: 0.91 + more, 1: 0.92 + more})
    assert judged.difference == pytest.approx(more)
    assert (judged.p, judged.needed, judged.verdict) == (None, None, "not significantly different")
    assert "say nothing about chance" in judged.how


def judged_deviation(judged) -> float:
    """The standard error behind an interval of Welch's t."""
    freedom = (5.27778e-5) ** 2 / ((1e-4 / 3) ** 2 / 2 + (5.833333e-5 / 3) ** 2 / 2)
    return (judged.high - judged.low) / 2 / stats.t.isf(0.025, freedom)


def test_accuracies_without_predictions():
    """Accuracies without predictions are treated as those of different images."""
    judged = judgement.accuracies("moved", 0.5, 0.6, 100)
    assert (judged.high - judged.low) / 2 == pytest.approx(1.959964 * math.sqrt((0.25 + 0.24) / 100))
    assert judged.verdict == "not significantly different"
    assert judgement.accuracies("moved", 0.5, 0.6, 1000).verdict == "better"


def write_results(folder: Path, images: str, seed: int, wrong: int, epochs: int = 5) -> None:
    """Write results of a CNN that misclassifies the first `wrong` of 200 test images."""
    metrics = folder / "metrics"
    (metrics / "train_cnn").mkdir(parents=True, exist_ok=True)
    (metrics / "evaluate_cnn").mkdir(exist_ok=True)
    accuracy = 1 - wrong / 200
    train = {"val_accuracy": accuracy, "weights_sha256": [f"{images}-{seed}-{wrong}"]}
    test = {
        "test_accuracy": accuracy, "test_accuracy_shift_3px": accuracy, "test_accuracy_rotation_15deg": 0.5,
        "shifts": [{"n": 100}],
    }  # fmt: skip
    (metrics / f"train_cnn/{images}.json").write_text(json.dumps(train))
    (metrics / f"evaluate_cnn/{images}.json").write_text(json.dumps(test))
    rows = [(CLASSES[n % 2], CLASSES[(n + (n < wrong)) % 2]) for n in range(200)]
    (metrics / f"evaluate_cnn/{images}_confusion.csv").write_text(
        "actual,predicted\n" + "".join(f"{actual},{predicted}\n" for actual, predicted in rows)
    )
    params = {"train_cnn": {"seed": seed, "epochs": epochs}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    entry = {"cmd": "true", "params": {"params.yaml": params}}
    stages = {f"train_cnn@{name}": entry for name in ("original", "augmented")}
    (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


@pytest.fixture
def results(workspace) -> Path:
    """A repository whose HEAD misclassifies 20 of 200 images, with experiments as DVC keeps them."""
    git(workspace, "init", "--quiet")
    write_results(workspace, "original", 0, 20)
    commit(workspace)
    for name, seed, wrong in (("slow-0", 0, 40), ("slow-1", 1, 44), ("wide-0", 0, 20), ("wide-1", 1, 23)):
        experiment(workspace, name, seed, wrong)
    return workspace


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "results")


def experiment(folder: Path, name: str, seed: int, wrong: int) -> None:
    head = git(folder, "rev-parse", "HEAD").strip()
    write_results(folder, "original", seed, wrong, epochs=9)
    commit(folder)
    git(folder, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", "HEAD")
    git(folder, "reset", "--quiet", "--hard", head)


def run(capsys, *arguments: str) -> str:
    cli(["compare", *arguments], standalone_mode=False)
    return " ".join(capsys.readouterr().out.split())


def test_compare_worse_experiment(results, capsys):
    """`compare` reports a worse experiment with the numbers."""
    told = run(capsys, "HEAD", "slow-0")
    assert "test_accuracy 0.9 0.8 −0.1" in told
    assert "Test images unmodified: B is worse than A. Difference −10.00 points" in told
    assert "only A is right on 20 images, only B on 0; McNemar's exact test: p = 1.9e-06" in told
    same = "rotated by ±15°: A and B are not significantly different over 100 images. Difference +0.00"
    assert same in told
    assert "To compare their settings, train each with several seeds" in told


def test_compare_same_weights(results, capsys):
    """`compare` reports the same weights as identical."""
    told = run(capsys, "HEAD", "workspace")
    same = "the same weights on both sides, so A and B are identical"
    assert told == f"A HEAD B workspace train_cnn@original: {same}"


def test_compare_takes_no_option_of_git(results, monkeypatch):
    """A name that looks like an option is a revision to git, which has none of this name."""
    (results / ".git/refs/heads/--all").write_text(git(results, "rev-parse", "HEAD"))
    assert sides.commit_of("--all") == git(results, "rev-parse", "HEAD").strip()


def test_compare_several_seeds(results, capsys):
    """`compare` pairs the results of several seeds by seed."""
    [compared] = json.loads(run(capsys, "wide-*", "slow-0,slow-1", "--json"))
    assert compared["sources"] == [["wide-0", "wide-1"], ["slow-0", "slow-1"]]
    assert compared["metrics"]["test_accuracy"][1]["mean"] == pytest.approx(0.79)
    judged = compared["judgements"][0]
    assert (judged["unit"], judged["n"]) == ("seeds", 2)
    assert judged["difference"] == pytest.approx(-0.1025)
    assert "paired by seed" in judged["how"]


def test_pairs_of_trainings(results):
    """`pairs` gives each training that both sides have, or the two that are named."""
    write_results(results, "augmented", 0, 30)
    assert [a[0].training for a, _ in compare.pairs("workspace", "workspace")] == [
        "train_cnn@original", "train_cnn@augmented",
    ]  # fmt: skip
    [(a, b)] = compare.pairs("workspace@original", "workspace@augmented")
    assert compare.judgements(a, b)[0].difference == pytest.approx(-0.05)
    (results / "metrics/train_cnn/original.json").unlink()
    assert len(compare.pairs("HEAD", "workspace")) == 1  # one training on each side, so these two
    write_results(results, "original", 0, 30)
    commit(results)
    (results / "metrics/train_cnn/original.json").unlink()
    (results / "metrics/train_cnn/augmented.json").rename(results / "metrics/train_toy_cnn.json")
    with pytest.raises(StageError, match="HEAD has results of train_cnn@original, train_cnn@augmented, and"):
        compare.pairs("HEAD", "workspace")


@pytest.mark.parametrize(
    ("side", "words"),
    [
        (
            "no-such-thing",
            "no-such-thing: expected workspace, an experiment, a git revision or a run of MLflow",
        ),
        ("x*", r"x\*: matches no experiment"),
        ("workspace@augmented", "workspace@augmented: no results there"),
        ("--all", "--all: expected workspace"),
    ],
)
def test_unknown_side(results, side, words):
    """The error names a side that matches nothing."""
    with pytest.raises(StageError, match=words):
        read_side(side)


def test_whole_name_before_parts(results):
    """A side's name as a whole comes before its parts.

    `workspace` and HEAD keep their meaning even if experiments have these names.
    """
    head = git(results, "rev-parse", "HEAD").strip()
    wide = git(results, "for-each-ref", "--format=%(objectname)", "refs/exps/??/*/wide-0").strip()
    for name in ("slow-0,slow-1", "wide@original", "HEAD", "workspace"):
        git(results, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", wide)

    def wrong(side: str) -> list[float]:
        return [
            round(200 * (1 - one.metrics["test_accuracy"])) for one in read_side(side)["train_cnn@original"]
        ]

    assert wrong("slow-0,slow-1") == wrong("wide@original") == wrong("wide@original@original") == [20]
    write_results(results, "original", 0, 77)
    assert wrong("workspace") == [77]
    commit(results)
    assert wrong("HEAD") == [77]


def test_list_with_damaged_experiment(results, capsys):
    """`compare` names an experiment that is damaged and lists the others."""
    head = git(results, "rev-parse", "HEAD").strip()
    (results / "metrics/train_cnn/original.json").write_text("{")
    git(results, "commit", "--quiet", "--all", "--message", "damage")
    git(results, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/broken", "HEAD")
    git(results, "reset", "--quiet", "--hard", head)
    compare.list_all(as_json=True)
    told = capsys.readouterr()
    assert told.err.startswith("left out experiment broken: metrics/train_cnn/original.json of refs/exps/")
    assert {row["name"] for row in json.loads(told.out)} >= {"workspace", "slow-0", "wide-1"}


def test_evaluation_of_other_weights(results, capsys):
    """An evaluation of other weights does not count."""
    lock = yaml.safe_load((results / "dvc.lock").read_text())
    weights = {"path": "models/cnn_original.safetensors"}
    lock["stages"]["train_cnn@original"]["outs"] = [{**weights, "md5": "new"}]
    lock["stages"]["evaluate_cnn@original"] = {"cmd": "true", "deps": [{**weights, "md5": "old"}]}
    (results / "dvc.lock").write_text(yaml.safe_dump(lock))
    metrics = results / "metrics/train_cnn/original.json"
    metrics.write_text(json.dumps({"val_accuracy": 0.5, "weights_sha256": ["new"]}))
    [workspace] = read_side("workspace")["train_cnn@original"]
    assert workspace.metrics == {"val_accuracy": 0.5}
    assert "not evaluated on both sides" in run(capsys, "workspace")


def test_evaluation_before_training(results):
    """An evaluation that came before a training by hand does not count."""
    lock = yaml.safe_load((results / "dvc.lock").read_text())
    lock["stages"]["train_cnn@original"]["outs"] = [{"path": "metrics/train_cnn/original.json", "md5": "old"}]
    (results / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert "test_accuracy" not in read_side("workspace")["train_cnn@original"][0].metrics


def test_results_of_early_version(results, capsys):
    """Results of an early version are compared by the metrics that they have."""
    path = results / "metrics/evaluate_cnn/original.json"
    path.write_text(json.dumps({"test_accuracy": 0.5}))
    metrics = results / "metrics/train_cnn/original.json"
    metrics.write_text(json.dumps({"weights_sha256": ["other"]}))
    told = run(capsys, "HEAD", "workspace")
    assert told.count("Test images") == 1


CUT = "schema: '2.0'\nstages:\n  train_cnn@original:\n"


@pytest.mark.parametrize(
    "content", ["", "stages:\n", "stages: [", "- a\n", CUT, f"{CUT}    outs:\n    - path: x\n"]
)
def test_truncated_dvc_lock(results, content):
    """The error names a dvc.lock that was cut short."""
    (results / "dvc.lock").write_text(content)
    with pytest.raises(StageError, match=r"dvc\.lock of workspace: "):
        read_side("workspace")


def test_damaged_results(results):
    """The error names results that are damaged."""
    path = results / "metrics/evaluate_cnn/original_confusion.csv"
    for content in ("Bag\n", "actual,predicted\nBag\n", ""):
        path.write_text(content)
        with pytest.raises(StageError, match=r"original_confusion\.csv of workspace: .*as a stage writes it"):
            read_side("workspace")
    path.unlink()
    [[a], [b]] = compare.pairs("HEAD", "workspace")[0]
    assert b.predictions == []
    with pytest.raises(StageError, match="no predictions of the same test images"):
        compare.judgements([a], [b])


def test_list_width_and_changes(results, capsys):
    """The list fits 100 columns and says what each experiment changed."""
    experiment(results, "a-name-that-is-longer-than-its-column", 5, 10)
    cli(["compare"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    [row] = [line.split() for line in lines if line.startswith("slow-1")]
    assert row[1:5] == ["train_cnn.epochs=9,", "train_cnn…", "78.00", "78.00"]
    for word in ("dvc exp apply", "dvc exp branch", "dvc exp remove", "--name", "fashion-cnn back"):
        assert word in "\n".join(lines)
    shutil.rmtree(results / ".git/refs/exps")
    assert "workspace 90.00 90.00" in run(capsys)
