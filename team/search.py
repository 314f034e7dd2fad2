"""Search for better params: Optuna proposes, trials run in parallel, DVC keeps each as an experiment.

Usage, after `make setup-team`:

    python -m team.search --trials 12 \\
        -S 'train_cnn.learning_rate=tag(log,interval(1e-4,1e-2))' -S train_cnn.batch_size=16,32,64

-S takes what `dvc exp run -S` takes (values, range(1,5), or a single value for all trials), and
interval(a,b), tag(int,interval(a,b)), tag(log,interval(a,b)). Each trial is a DVC experiment of HEAD, named
by a digest of its params. Existing experiments count and are not rerun, so the same command resumes a
stopped search.
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from fashion_cnn.commands.compare import table
from fashion_cnn.commands.dvc_state import experiments, files_at
from fashion_cnn.project.catalog import CNNS
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.params import PARAMS_PATH, Params, as_yaml, explain, params_in
from fashion_cnn.project.process import run_stage, usable_threads
from fashion_cnn.project.repository import file_at, git
from fashion_cnn.tracking.store import address
from team.trial import reference_of
from team.workers import Workers, here, on_ray

ROOT = Path(__file__).resolve().parents[1]
PICTURE = Path("search.png")
LOOK = 5  # seconds between checks of how many trials there is room for
TELL = 60  # seconds between lines on progress, unless a trial ends
SAME = 200  # give up after this many consecutive proposals of known trials
STAGES = {training.stage: training for training in CNNS.values()}
EXAMPLE = "train_cnn.epochs=2,4"


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
    if not search.known:
        raise StageError(f"no trial succeeded ({len(search.failed)} failed); the lines above say why")


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
        raise StageError(f"-S {' -S '.join(settings)}: nothing varies, expected several, such as {EXAMPLE}")
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
        raise ValueError(f"'{value}' is quoted, but {PARAMS_PATH} reads it unquoted as another value")
    return value


class Search:
    """The trials of a space: those that are done, running, failed."""

    def __init__(self, arguments: argparse.Namespace):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.training, self.metric = STAGES[arguments.stage], arguments.metric
        self.minimizes = "loss" in self.metric
        self.varied, self.fixed = read_space(arguments.set)
        self.commit = git("rev-parse", "HEAD").decode().strip()
        self.base = params_in(file_at(self.commit, PARAMS_PATH) or b"")
        for name in (*self.varied, *self.fixed):
            if name not in self.base:
                raise StageError(f"-S {name}: no param of this name, expected one of {PARAMS_PATH}")
        check(self.base | self.fixed)
        for name, values in self.varied.items():
            if hasattr(values, "low"):  # also one in between, which need not be an integer
                for value in (values.low, values.high, *values_between(values)):
                    check(self.base | self.fixed | {name: value})
        # Reject a wrong --metric before hours of training.
        self.value_in(file_at(self.commit, self.training.metrics))
        self.jobs, self.threads, self.gpus = arguments.jobs, arguments.threads, arguments.gpus
        self.cluster = None if arguments.workers == "local" else address("RAY_ADDRESS")
        if arguments.workers == "ray" and not self.cluster:
            raise StageError("RAY_ADDRESS: not set, expected a cluster's address, such as 10.0.0.1:6379")
        if self.gpus and not self.cluster:
            raise StageError(f"--gpus {self.gpus:g}: there is no cluster, expected one in RAY_ADDRESS")
        self.known: dict[str, float] = {}  # metrics by trial name
        self.failed: dict[str, str] = {}  # faults by trial name
        self.params: dict[str, dict] = {}  # varied params by trial name
        self.running: dict[Future, str] = {}
        self.starts: dict[str, float] = {}  # of trials, monotonic seconds
        self.seconds: list[float] = []  # that each ended trial took
        self.began = False
        self.asked: dict[str, optuna.trial.Trial] = {}  # whose results the study awaits
        self.others: set[str] = set()  # experiments of HEAD outside the space
        samplers = optuna.samplers
        self.study = optuna.create_study(
            sampler=samplers.TPESampler() if arguments.sampler == "tpe" else samplers.RandomSampler(),
            direction="minimize" if self.minimizes else "maximize",
        )
        if arguments.sampler == "grid":
            points = grid(self.varied)
            random.shuffle(points)  # two searches at once begin at different ends
            self.trials = arguments.trials or len(points)
            self.proposals: Iterator[dict] = (
                point for point in points if self.name_of(point) not in self.known
            )
        else:
            self.trials = arguments.trials or 20
            self.proposals = self.ask()

    def workers(self) -> AbstractContextManager[Workers]:
        """What runs the trials."""
        if self.cluster:
            return on_ray(self.commit, self.training.stage, self.cluster, self.threads, self.gpus)
        jobs = self.jobs or max(1, usable_threads() // self.threads)
        return here(self.commit, self.training.stage, jobs, self.threads)

    def note_known(self) -> None:
        """Add HEAD's trials that lie in the space, including new ones of another search."""
        import optuna

        seen = self.known.keys() | self.others
        new = [one for one in experiments() if one.baseline == self.commit and one.name not in seen]
        if not new:  # mostly so: the search looks every few seconds
            return
        references = [one.reference for one in new]
        params, metrics = (files_at(references, path) for path in (PARAMS_PATH, self.training.metrics))
        for one, content, results in zip(new, params, metrics, strict=True):
            has = params_in(content or b"")
            varied = {name: has.get(name) for name in self.varied}
            if one.name != self.name_of(varied) or (value := self.value_in(results)) is None:
                self.others.add(one.name)  # other fixed params, or it diverged
                continue
            if one.name in self.asked:
                self.study.tell(self.asked.pop(one.name), value)
            else:
                try:
                    self.study.add_trial(
                        optuna.trial.create_trial(params=varied, distributions=self.varied, value=value)
                    )
                except ValueError:  # from a wider space
                    self.others.add(one.name)
                    continue
            self.known[one.name], self.params[one.name] = value, varied
            self.failed.pop(one.name, None)  # it failed here, not in another search

    def value_in(self, content: bytes | None) -> float | None:
        """The metric in a file of metrics; None if absent or not a number.

        Raises StageError for a wrong name.
        """
        if content is None:
            return None
        metrics = json.loads(content)
        allowed = [name for name in metrics if name.startswith("val_")]
        if self.metric not in allowed:
            raise StageError(f"--metric {self.metric}: expected one of {', '.join(allowed)}")
        return metrics[self.metric] if math.isfinite(metrics[self.metric]) else None

    def name_of(self, varied: dict) -> str:
        """The name of a trial: a digest of its stage and of all params."""
        facts = json.dumps([self.training.stage, self.base | self.fixed | varied], sort_keys=True)
        return f"trial-{hashlib.sha256(facts.encode()).hexdigest()[:10]}"

    def ask(self) -> Iterator[dict]:
        """Optuna's proposals, without end."""
        while True:
            trial = self.study.ask(self.varied)
            name = self.name_of(trial.params)
            if name in self.asked | self.known | self.failed:
                self.drop(trial)
            else:
                self.asked[name] = trial
            yield trial.params

    def drop(self, trial) -> None:
        """Report a proposal to the study as failed."""
        from optuna.trial import TrialState

        self.study.tell(trial, state=TrialState.FAIL)

    def propose(self) -> str | None:
        """The name of the next new trial; None if there are no more."""
        for params in itertools.islice(self.proposals, SAME):
            name = self.name_of(params)
            if name not in self.known | self.failed and name not in self.running.values():
                self.params[name] = params
                return name
        return None

    def run(self, workers: Workers) -> None:
        """Keep as many trials running as there is room for, until there are enough."""
        workers.fetch()
        self.note_known()
        self.began, room, told = True, -1, time.monotonic() + TELL
        print(f"{self.trials} trials; done already: {len(self.known)}", flush=True)
        while True:
            free = workers.room()  # it also reports lost nodes
            if (now := self.jobs or free) != room:
                room = now
                waits = "" if room else f": no node has {self.threads} CPUs and {self.gpus:g} GPUs for one"
                print(f"trials at once: {room}{waits}", flush=True)
            while len(self.running) < room and self.left() > len(self.running):
                if (name := self.propose()) is None:
                    self.trials = len(self.known | self.failed) + len(self.running)
                    print(f"no new values were proposed: the search ends after {self.trials} trials")
                    break
                changes = self.fixed | self.params[name]
                settings = {path: as_yaml(value) for path, value in changes.items()}
                self.running[workers.submit(name, settings)] = name
                self.starts[name] = time.monotonic()
                print(f"{name}  {self.values_of(name)}: started", flush=True)
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
            self.note_known()  # also another search's, so that both end at the same number
            for future in done:
                self.seconds.append(time.monotonic() - self.starts[self.running[future]])
                self.finish(future)
                told = 0

    def left(self) -> int:
        """How many trials have not ended."""
        return max(0, self.trials - len(self.known | self.failed))

    def finish(self, future: Future) -> None:
        """Record how a trial ended."""
        name = self.running.pop(future)
        if name in self.known:
            said = f"{self.metric} {self.known[name]:.4f}"
        else:
            self.failed[name] = fault_of(future) or f"{self.metric} is not a number"
            said = f"failed: {self.failed[name]}"
            if name in self.asked:
                self.drop(self.asked.pop(name))
        print(f"{name}  {self.values_of(name)}: {said}", flush=True)

    def values_of(self, name: str) -> str:
        """The values of a trial, in words."""
        return ", ".join(f"{path}={short(value)}" for path, value in self.params[name].items())

    def progress(self, room: int) -> str:
        """One line: how many are done, running and failed, the best, and how long the rest will take."""
        counts = f"{len(self.known)} of {self.trials} done"
        counts += f", {len(self.running)} running, {len(self.failed)} failed"
        best = f"best {self.known[self.ranked()[0]]:.4f}" if self.known else "none yet"
        if not self.seconds:
            return f"  {counts}; {best}"
        minutes = statistics.fmean(self.seconds) * math.ceil(self.left() / max(1, room)) / 60
        return f"  {counts}; {best}; {minutes:.0f} minutes left"

    def ranked(self) -> list[str]:
        """The trials that are done, the best first."""
        return sorted(sorted(self.known), key=self.known.__getitem__, reverse=not self.minimizes)

    def report(self) -> None:
        """Print the table and the command for the best, and draw the metric against each param."""
        self.note_known()  # also those that ended after a stop
        rows = [("trial", self.metric, *(name.rpartition(".")[2] for name in self.varied))]
        for name in [*self.ranked(), *self.failed]:
            value = f"{self.known[name]:.4f}" if name in self.known else "failed"
            rows.append((name, value, *(short(self.params[name][one]) for one in self.varied)))
        print("\n" + "\n".join(table(rows)))
        if self.known:
            best = self.ranked()[0]
            pull = f"dvc exp pull origin {best} && " if self.cluster else ""
            # `dvc exp apply` would report the other stages' results, which no cache has, as errors.
            source = reference_of(self.commit, best)
            restore = f"git restore --source={source} -- params.yaml dvc.lock metrics"
            steps = f"{pull}{restore} && dvc checkout {self.training.stage} && make repro"
            print(f"\ntake the best    {steps}")
            draw(self.study, [*self.varied], self.metric)
            print(f"the picture      {PICTURE}")


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


def draw(study, names: list[str], metric: str) -> None:
    """Optuna's own picture: the metric against each param."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.ticker import LogLocator, NullLocator
    from optuna.exceptions import ExperimentalWarning
    from optuna.visualization.matplotlib import plot_slice

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
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
    done = sum(trial.value is not None for trial in study.trials)
    figure.suptitle(f"{done} trials, the later the darker" if len(panels) > 1 else "")
    figure.savefig(PICTURE, dpi=120, bbox_inches="tight", metadata={"Software": None})


def short(value: object) -> str:
    """A value of a param in a few characters."""
    return f"{value:.4g}" if isinstance(value, float) else as_yaml(value)


if __name__ == "__main__":
    run_stage(main)
