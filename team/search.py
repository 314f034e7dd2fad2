"""Search for better params: Optuna proposes, trials run in parallel, DVC keeps each as an experiment.

Usage, after `make setup-team`:

    python -m team.search --trials 12 \\
        -S 'train_cnn.learning_rate=tag(log,interval(1e-4,1e-2))' -S train_cnn.batch_size=16,32,64

-S takes what `dvc exp run -S` takes (values, range(1,5), or a single value for all trials), and
interval(a,b), tag(int,interval(a,b)), tag(log,interval(a,b)). Each trial is a DVC experiment of HEAD, named
by a digest of its params. Existing experiments count and are not rerun, so the same command resumes a
stopped search.

A trial first trains one epoch, then two, four, …: one experiment each, which resumes the one before. After
each, the pruner may end a trial that is worse than others were at that point.
"""

import argparse
import hashlib
import itertools
import json
import math
import random
import statistics
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from fashion_cnn.commands.compare import table
from fashion_cnn.commands.dvc_state import experiments, files_at
from fashion_cnn.project.catalog import CNNS
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.params import PARAMS_PATH, Params, as_yaml, explain, params_in
from fashion_cnn.project.process import run_stage, usable_threads
from fashion_cnn.project.repository import file_at, git
from fashion_cnn.tracking.store import address
from team.space import grid, read_space, values_between
from team.trial import reference_of
from team.workers import Workers, here, on_ray

if TYPE_CHECKING:
    import optuna

PICTURE, JOURNAL = Path("search.png"), Path("search.journal")
LOOK = 5  # seconds between checks of how many trials there is room for
TELL = 60  # seconds between lines on progress, unless a trial ends
SAME = 200  # give up after this many consecutive proposals of known trials
ETA = 2  # of two trials that trained equally long, the better one goes on to twice as many epochs
STAGES = {training.stage: training for training in CNNS.values()}
ENDED = ("done", "pruned", "failed")
EPOCHS, SCHEDULE = "train_cnn.epochs", "train_cnn.schedule"


def main() -> None:
    """Run the trials that are missing, then print the table and draw the picture."""
    arguments = parse()
    if not PARAMS_PATH.exists():
        raise StageError(f"{PARAMS_PATH}: not found; run from the repository root")
    for package in ("optuna", "ray"):
        if find_spec(package) is None:
            raise StageError(f"{package}: not installed, expected what `make setup-team` installs")
    search = Search(arguments)
    if changed := git("status", "--porcelain", "--untracked-files=no").decode().splitlines():
        print(f"trials run the last commit; uncommitted changes are ignored: {', '.join(changed)}")
    try:
        with search.workers() as workers:
            search.run(workers)
    finally:  # also after a stop
        if search.began:
            search.report()
    if not search.ranked():
        raise StageError(f"no trial succeeded ({search.count('failed')} failed); the lines above say why")


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-S", "--set", action="append", required=True, metavar="PATH=VALUES")
    parser.add_argument(
        "--trials", type=positive, help="including those that exist; default: 20, or the whole grid"
    )
    parser.add_argument("--sampler", choices=("tpe", "random", "grid"), default="tpe", help="default: tpe")
    parser.add_argument(
        "--pruner", choices=("asha", "median", "none"), default="asha",
        help="which trials end early: the worse half of those that trained equally long (asha, the default), "
        "those worse than the median, or none",
    )  # fmt: skip
    parser.add_argument("--stage", choices=STAGES, default="train_cnn@original", help="stage to train")
    parser.add_argument("--metric", default="val_accuracy", help="a metric of training; a loss is minimized")
    parser.add_argument("--jobs", type=positive, help="trials at once; default: what all cores can take")
    parser.add_argument("--threads", type=positive, default=1, help="threads of each trial; default: 1")
    parser.add_argument(
        "--workers", choices=("local", "ray"), help="default: ray, if RAY_ADDRESS names a cluster"
    )
    parser.add_argument("--gpus", type=share, default=0, help="GPUs that Ray gives each trial; default: 0")
    return parser.parse_args()


def positive(text: str) -> int:
    """Parse a number of 1 or more."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}, expected 1 or more")
    return number


def share(text: str) -> float:
    """Parse a number of GPUs: 0, a part of one, or whole ones."""
    number = float(text)
    if not (0 <= number <= 1 or (number > 0 and number.is_integer())):
        raise argparse.ArgumentTypeError(f"{text}, expected 0 to 1, or a whole number")
    return number


@dataclass
class Trial:
    """Params that were proposed, and what is known of their trainings, one per rung."""

    asked: "optuna.Trial"
    names: list[str]  # of the experiments, by rung
    values: list[float] = field(default_factory=list)  # the metric, by rung
    state: str = "waiting"  # then running, and done, pruned or failed
    is_ours: bool = False  # this search, not another one, runs it
    seconds: float = 0  # that it has taken here

    @property
    def next(self) -> str:
        """The experiment that is missing."""
        return self.names[len(self.values)]

    @property
    def last(self) -> str:
        """The newest experiment."""
        return self.names[max(0, len(self.values) - 1)]


class Search:
    """The trials of a space, by the names of their last experiments."""

    def __init__(self, arguments: argparse.Namespace):
        self.training, self.metric = STAGES[arguments.stage], arguments.metric
        self.sign = 1 if minimizes(self.metric) else -1
        self.varied, self.fixed = read_space(arguments.set)
        self.commit = git("rev-parse", "HEAD").decode().strip()
        self.base = params_in(file_at(self.commit, PARAMS_PATH) or b"")
        for name in (*self.varied, *self.fixed):
            if name not in self.base:
                raise StageError(f"-S {name}: no param of this name, expected one of {PARAMS_PATH}")
        self.base |= self.fixed
        check(self.base)
        for name, values in self.varied.items():
            if hasattr(values, "low"):  # also a non-integer in between, which an integer param rejects
                for value in (values.low, values.high, *values_between(values)):
                    check(self.base | {name: value})
        # Reject a wrong --metric before hours of training.
        self.value_in(file_at(self.commit, self.training.metrics))
        self.jobs, self.threads, self.gpus = arguments.jobs, arguments.threads, arguments.gpus
        self.cluster = None if arguments.workers == "local" else address("RAY_ADDRESS")
        if arguments.workers == "ray" and not self.cluster:
            raise StageError("RAY_ADDRESS: not set, expected a cluster's address, such as 10.0.0.1:6379")
        if self.gpus and not self.cluster:
            raise StageError(f"--gpus {self.gpus:g}: there is no cluster, expected one in RAY_ADDRESS")
        self.rungs = self.rungs_of(arguments.pruner)
        self.results: dict[str, float] = {}  # metrics by experiment; NaN if it is not a number
        self.others: set[str] = set()  # experiments of HEAD outside the space
        self.trials: dict[str, Trial] = {}
        # With the experiment that it trains, and the monotonic time in seconds when that began.
        self.running: dict[Future, tuple[Trial, str, float]] = {}
        self.began = False
        self.study, self.journal = studies(arguments.sampler, arguments.pruner, self.metric)
        points = grid(self.varied) if arguments.sampler == "grid" else []
        random.shuffle(points)  # two searches at once begin at different ends
        self.target = arguments.trials or len(points) or 20
        self.points: Iterator[dict | None] = itertools.repeat(None)
        if points:
            self.points = (point for point in points if self.names_of(point)[-1] not in self.trials)

    def rungs_of(self, pruner: str) -> list[dict[str, int]]:
        """The params of each rung: numbers of epochs after which a trial may end, and the full number.

        With few epochs, the trainings of the rungs would cost more than they save.
        """
        if pruner == "none":
            return [{}]
        last = int(str(self.base[EPOCHS]))
        if EPOCHS in self.varied:
            why = f"{EPOCHS} varies"
        elif SCHEDULE in self.varied or self.base[SCHEDULE] != "constant":
            why = "the schedule depends on the number of epochs"
        elif last < ETA * ETA:
            why = f"a training has fewer than {ETA * ETA} epochs"
        else:
            early = [ETA**rung for rung in range(last.bit_length()) if ETA ** (rung + 1) <= last]
            return [{EPOCHS: epochs} for epochs in (*early, last)]
        print(f"pruning is off: {why}")
        return [{}]

    def workers(self) -> AbstractContextManager[Workers]:
        """What runs the trials."""
        if self.cluster:
            return on_ray(self.commit, self.training.stage, self.cluster, self.threads, self.gpus)
        jobs = self.jobs or max(1, usable_threads() // self.threads)
        return here(self.commit, self.training.stage, jobs, self.threads)

    def value_in(self, content: bytes | None) -> float:
        """The metric in a file of metrics; NaN if it is absent or not finite.

        Raises StageError for a wrong name.
        """
        if content is None:
            return math.nan
        metrics = json.loads(content)
        allowed = [name for name in metrics if name.startswith("val_")]
        if self.metric not in allowed:
            raise StageError(f"--metric {self.metric}: expected one of {', '.join(allowed)}")
        return metrics[self.metric] if math.isfinite(metrics[self.metric]) else math.nan

    def names_of(self, varied: dict) -> list[str]:
        """The names of a trial's experiments, by rung: digests of its stage and of all params."""
        facts = (
            json.dumps([self.training.stage, self.base | varied | rung], sort_keys=True)
            for rung in self.rungs
        )
        return [f"trial-{hashlib.sha256(fact.encode()).hexdigest()[:10]}" for fact in facts]

    def note_results(self) -> None:
        """Read HEAD's new experiments that lie in the space, including those of another search."""
        seen = self.results.keys() | self.others
        new = [one for one in experiments() if one.baseline == self.commit and one.name not in seen]
        if not new:  # usually: the search looks every few seconds
            return
        references = [one.reference for one in new]
        params, metrics = (files_at(references, path) for path in (PARAMS_PATH, self.training.metrics))
        found: dict[str, dict] = {}  # varied params, by a trial's last experiment
        for one, content, results in zip(new, params, metrics, strict=True):
            has = params_in(content or b"")
            varied = {name: has.get(name) for name in self.varied}
            names = self.names_of(varied)
            if one.name in names and self.contains(varied):
                self.results[one.name] = self.value_in(results)
                found[names[-1]] = varied
            else:
                self.others.add(one.name)
        for name, varied in found.items():
            if name not in self.trials or self.trials[name].state == "failed":  # here, not in another search
                self.study.enqueue_trial(varied)
                self.add(self.study.ask(self.varied))
        # In this order, the pruner again ends the trials that it ended in an earlier search.
        for trial in sorted((self.trials[name] for name in found), key=self.known_rank):
            self.report_results(trial)

    def contains(self, varied: dict) -> bool:
        """Whether params lie in the space; otherwise they are those of a wider search."""
        import optuna

        try:
            optuna.trial.create_trial(params=varied, distributions=self.varied, value=0.0)
        except ValueError:
            return False
        return True

    def add(self, asked: "optuna.Trial") -> Trial:
        """Add a trial with the params that Optuna proposes."""
        names = self.names_of(asked.params)
        trial = self.trials[names[-1]] = Trial(asked, names)
        return trial

    def report_results(self, trial: Trial) -> None:
        """Tell Optuna what a trial has reached, and note whether that ends it."""
        while trial.state in ("waiting", "running") and trial.next in self.results:
            value = self.results[trial.next]
            if math.isnan(value):
                self.end(trial, "failed")
                return
            rung = self.rungs[len(trial.values)]
            trial.values.append(value)
            trial.asked.report(value, rung.get(EPOCHS, 1))
            # Asked at each rung, also the last, because the pruner compares later trials with this one.
            is_worse = trial.asked.should_prune()
            if len(trial.values) == len(self.rungs):
                self.end(trial, "done", value)
            elif is_worse and self.results.keys().isdisjoint(trial.names[len(trial.values) :]):
                self.end(trial, "pruned")

    def end(self, trial: Trial, state: str, value: float | None = None) -> None:
        """Tell Optuna how a trial ended, and add it to what optuna-dashboard shows."""
        from optuna.trial import TrialState

        trial.state = state
        kind = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[state]
        self.journal.add_trial(self.study.tell(trial.asked, value, kind))

    def propose(self) -> Trial | None:
        """The next new trial; None if there are no more."""
        from optuna.trial import TrialState

        for point in itertools.islice(self.points, SAME):
            if point is not None:
                self.study.enqueue_trial(point)
            asked = self.study.ask(self.varied)
            if self.names_of(asked.params)[-1] not in self.trials:
                return self.add(asked)
            self.study.tell(asked, state=TrialState.FAIL)
        return None

    def next(self) -> Trial | None:
        """The trial to run next: one that goes on, a new one, or one that another search left."""
        waiting = [trial for trial in self.trials.values() if trial.state == "waiting"]
        if ours := [trial for trial in waiting if trial.is_ours]:
            return ours[0]
        if len(self.trials) < self.target:
            if trial := self.propose():
                return trial
            self.target = len(self.trials)
            print(f"no new values were proposed: the search ends after {self.target} trials")
        return waiting[0] if waiting else None

    def run(self, workers: Workers) -> None:
        """Keep as many trials running as there is room for, until there are enough."""
        workers.fetch()
        self.note_results()
        self.began, room, told = True, -1, time.monotonic() + TELL
        print(f"{self.target} trials; already done: {self.count('done', 'pruned')}", flush=True)
        while True:
            free = workers.room()  # it also reports lost nodes
            if (now := self.jobs or free) != room:
                room = now
                waits = "" if room else f": no node has {self.threads} CPUs and {self.gpus:g} GPUs for one"
                print(f"trials at once: {room}{waits}", flush=True)
            while len(self.running) < room and (trial := self.next()):
                self.start(workers, trial)
            if time.monotonic() > told:
                print(self.progress(room), flush=True)
                told = time.monotonic() + TELL
            if not self.running:
                if room or not self.left():
                    return
                time.sleep(LOOK)  # until a node has room
                continue
            done = wait(self.running, timeout=LOOK, return_when=FIRST_COMPLETED).done
            try:
                workers.fetch()
            except StageError as error:
                print(f"{error}; the search tries again", flush=True)
                continue
            self.note_results()  # also another search's, so that both end at the same number
            for future in done:
                self.finish(future)
                told = 0

    def start(self, workers: Workers, trial: Trial) -> None:
        """Start a trial's next training."""
        name, rung = trial.next, len(trial.values)
        trial.state, trial.is_ours = "running", True
        print(f"{name}  {self.words(trial, rung)}: started", flush=True)
        changes = self.fixed | self.changes_of(trial, rung)
        settings = {path: as_yaml(value) for path, value in changes.items()}
        future = workers.submit(name, settings, name != trial.names[-1])
        self.running[future] = (trial, name, time.monotonic())

    def finish(self, future: Future) -> None:
        """Note and print how a trial's training ended."""
        trial, name, began = self.running.pop(future)
        trial.seconds += time.monotonic() - began
        value = self.results.get(name, math.nan)
        said = f"{self.metric} {value:.4f}{'; pruned' if trial.state == 'pruned' else ''}"
        if math.isnan(value):
            said = f"failed: {fault_of(future) or f'{self.metric} is not a number'}"
        if trial.state == "running":
            if name in self.results:
                trial.state = "waiting"
            else:
                self.end(trial, "failed")
        print(f"{name}  {self.words(trial, trial.names.index(name))}: {said}", flush=True)

    def changes_of(self, trial: Trial, rung: int) -> dict:
        """The params in which a trial's training differs from the others."""
        return trial.asked.params | self.rungs[rung]

    def words(self, trial: Trial, rung: int) -> str:
        """These params in words."""
        return ", ".join(f"{path}={short(value)}" for path, value in self.changes_of(trial, rung).items())

    def count(self, *states: str) -> int:
        """How many trials are in one of the states."""
        return sum(trial.state in states for trial in self.trials.values())

    def left(self) -> int:
        """How many trials have not ended."""
        return max(0, self.target - self.count(*ENDED))

    def progress(self, room: int) -> str:
        """One line: how many are done, running and failed, the best, and how long the rest will take."""
        pruned = f" ({self.count('pruned')} pruned)" if len(self.rungs) > 1 else ""
        counts = f"{self.count('done', 'pruned')} of {self.target} done{pruned}"
        counts += f", {len(self.running)} running, {self.count('failed')} failed"
        best = f"best {self.ranked()[0].values[-1]:.4f}" if self.ranked() else "none yet"
        took = [trial.seconds for trial in self.trials.values() if trial.seconds and trial.state in ENDED]
        if not took:
            return f"  {counts}; {best}"
        minutes = statistics.fmean(took) * math.ceil(self.left() / max(1, room)) / 60
        return f"  {counts}; {best}; {minutes:.0f} minutes left"

    def ranked(self) -> list[Trial]:
        """The trials that have a result, the best first."""
        found = [trial for trial in self.trials.values() if trial.values and trial.state != "failed"]
        return sorted(found, key=lambda trial: self.rank(trial, trial.values))

    def known_rank(self, trial: Trial) -> tuple:
        """The rank by all results that are known, also those that Optuna has not been told yet."""
        values = [self.results.get(name, math.nan) for name in trial.names]
        return self.rank(trial, [value for value in values if not math.isnan(value)])

    def rank(self, trial: Trial, values: list[float]) -> tuple:
        """A key that sorts trials: those that trained longest first, and of these the best."""
        return -len(values), [self.sign * value for value in values[-1:]], trial.last

    def report(self) -> None:
        """Print the table and the command for the best, and draw the metric against each param."""
        self.note_results()  # also those that ended after a stop
        names = [*self.varied, *([EPOCHS] if len(self.rungs) > 1 else [])]
        rows = [("trial", self.metric, *(name.rpartition(".")[2] for name in names))]
        failed = [trial for trial in self.trials.values() if trial.state == "failed"]
        for trial in [*self.ranked(), *failed]:
            value = "failed" if trial.state == "failed" else f"{trial.values[-1]:.4f}"
            has = self.changes_of(trial, trial.names.index(trial.last))
            rows.append((trial.last, value, *(short(has[name]) for name in names)))
        print("\n" + "\n".join(table(rows)))
        if self.ranked():
            best = self.ranked()[0].last
            pull = f"dvc exp pull origin {best} && " if self.cluster else ""
            # `dvc exp apply` would report the other stages' results, which no cache has, as errors.
            source = reference_of(self.commit, best)
            restore = f"git restore --source={source} -- params.yaml dvc.lock metrics"
            steps = f"{pull}{restore} && dvc checkout {self.training.stage} && make repro"
            print(f"\ntake the best    {steps}")
            if done := self.count("done"):
                draw(self.study, [*self.varied], self.metric, done)
                print(f"the picture      {PICTURE}")
            print(f"the dashboard    optuna-dashboard {JOURNAL}")


def minimizes(metric: str) -> bool:
    """Whether less is better."""
    return "loss" in metric


def studies(sampler: str, pruner: str, metric: str) -> tuple["optuna.Study", "optuna.Study"]:
    """Optuna's study, and its copy in JOURNAL, which optuna-dashboard shows."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    directions = optuna.study.StudyDirection
    direction = directions.MINIMIZE if minimizes(metric) else directions.MAXIMIZE
    asha = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=ETA)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler() if sampler == "tpe" else optuna.samplers.RandomSampler(),
        pruner=asha if pruner == "asha" else optuna.pruners.MedianPruner(),
        direction=direction,
    )
    journal = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(JOURNAL))),
        study_name=f"{metric} {datetime.now():%Y-%m-%d %H:%M:%S.%f}",
        direction=direction,
    )
    return study, journal


def fault_of(future: Future) -> str:
    """The line that says why a trial failed; empty if it did not."""
    lost = future.exception()  # for example, its node was lost
    if lost is None:
        return future.result()
    cause = getattr(lost, "cause", None) or lost  # of an error on a node; its own text is a traceback
    return " ".join(str(cause).split()) or type(cause).__name__


def check(params: dict[str, object]) -> None:
    """Raise StageError if params, under their paths, are not what fashion_cnn/schema.py allows."""
    sections: dict[str, dict] = {}
    for path, value in params.items():
        section, _, name = path.partition(".")
        sections.setdefault(section, {})[name] = value
    try:
        Params.model_validate(sections)
    except ValidationError as error:
        raise StageError(f"{PARAMS_PATH} of the last commit, with -S: {explain(error)}") from None


def draw(study, names: list[str], metric: str, done: int) -> None:
    """Optuna's own picture: the metric of the trials that are done against each param."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.ticker import LogLocator, NullLocator
    from optuna.visualization.matplotlib import plot_slice

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about an axis with one value
        axes = plot_slice(study, params=names, target_name=metric)
    panels = list(getattr(axes, "flat", [axes]))
    for panel in panels:
        if panel.get_xscale() == "log":  # otherwise its labels overlap
            low, high = panel.get_xlim()
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_locator(NullLocator())
        panel.tick_params("x", rotation=30)
    figure = panels[0].figure
    figure.set_size_inches(3.2 * len(panels) + 1.5, 4)
    figure.suptitle(f"{done} trials, the later the darker" if len(panels) > 1 else "")
    figure.savefig(PICTURE, dpi=120, bbox_inches="tight", metadata={"Software": None})


def short(value: object) -> str:
    """A value of a param in a few characters."""
    return f"{value:.4g}" if isinstance(value, float) else as_yaml(value)


if __name__ == "__main__":
    run_stage(main)
