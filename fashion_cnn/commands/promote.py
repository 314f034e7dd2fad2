"""Register a trained CNN, and make it the champion if it is significantly better."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from fashion_cnn.commands.judgement import same_images
from fashion_cnn.commands.registry import (
    CHAMPION,
    NAME,
    champion,
    find_cnn_run,
    of_run,
    of_version,
    register,
)
from fashion_cnn.data.fashion_mnist import TRAIN_IMAGES, TRAIN_LABELS, read_idx
from fashion_cnn.data.split import split_indices
from fashion_cnn.models.cnns import load_cnn
from fashion_cnn.models.device import prepare_torch
from fashion_cnn.project.catalog import RUN_ID
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.repository import repository_root
from fashion_cnn.tracking.store import as_store_error, connect


def main(model: str, level: float, dry_run: bool) -> None:
    """Compare, decide, register, and print the decision."""
    prepare_torch("cpu")
    if not re.fullmatch(RUN_ID, model):
        load_cnn(Path(model))  # a fault here is the file's, not the store's
    # Two processes at once would each compare with a champion that the other may replace.
    with as_store_error(), FileLock(repository_root() / ".dvc/tmp/promote.lock"):
        store = connect()
        client, run = store.client, find_cnn_run(store, model)
        before = champion(client)
        if before and before.run_id == run.info.run_id:
            print(f"{NAME} version {before.version}, of this run, is already the champion")
            return
        print("reading the val images …", file=sys.stderr)
        decision = decide(client, run, before, level)
        print(decision.words)
        if dry_run:
            print("--dry-run: nothing was changed")
        else:
            carry_out(client, run, decision)


@dataclass
class Decision:
    """Whether a run's model becomes the champion, why, and the numbers."""

    promote: bool
    words: str
    numbers: dict[str, object]


def decide(client, run, before, level: float) -> Decision:
    """Compare a run's model with that of the version `before`, if there is one."""
    if before is None:
        images, labels = val_images(run)
        accuracy = float(np.mean(reads(of_run(client, run), images) == labels))
        words = f"there is no champion yet; val accuracy {100 * accuracy:.2f} % of {len(labels):,} images"
        return Decision(True, words, {"val_accuracy": accuracy, "images": len(labels)})
    images, labels = val_images(run, client.get_run(before.run_id))
    a = reads(of_version(client, before), images) == labels
    b = reads(of_run(client, run), images) == labels
    judged = same_images("val", a, b, names=("the champion", "this model"))
    promote = judged.p is not None and judged.p < level and judged.difference > 0
    words = (
        f"{'' if promote else 'not '}significantly better than version {before.version}, the champion: "
        f"{100 * b.mean():.2f} % against {100 * a.mean():.2f} % of {judged.n:,} val images that neither "
        f"was trained on ({judged.how}, level {level:g})"
    )
    numbers = {
        "val_accuracy": float(b.mean()),
        "champion_before": before.version,
        "champion_val_accuracy": float(a.mean()),
        "p": judged.p,
        "level": level,
        "images": judged.n,
    }
    return Decision(promote, words, numbers)


def reads(classify, images: np.ndarray) -> np.ndarray:
    """The class that a classifier assigns to each image."""
    return classify(images).argmax(1)


def val_images(*runs) -> tuple[np.ndarray, np.ndarray]:
    """The val images of the runs and their labels, without images that another of the runs was trained on."""
    images, labels = read_idx(TRAIN_IMAGES), read_idx(TRAIN_LABELS)
    in_val, in_train = np.zeros(len(labels), bool), np.zeros(len(labels), bool)
    for run in runs:
        if "split.train_size" not in run.data.params:
            raise StageError(f"{run.info.run_id}: the run lacks its params; `fashion-cnn sync` adds them")
        size = run.data.params["split.train_size"]
        train, val = split_indices(
            len(labels),
            int(run.data.params["split.val_size"]),
            None if size in ("null", "None") else int(size),  # None: as earlier versions logged it
            int(run.data.params["split.seed"]),
        )
        in_train[train], in_val[val] = True, True
    keep = in_val & ~in_train
    if not keep.any():
        raise StageError("each training saw the other's val images, expected the same split.seed in both")
    return images[keep], labels[keep]


MEASURED = {  # by evaluate_cnn
    "test_accuracy": "unmodified",
    "test_accuracy_shift_3px": "shifted by 3 px",
    "test_accuracy_rotation_15deg": "rotated by 15°",
}


def card(run, decision: Decision) -> str:
    """The model card of a version, in Markdown: what it was made from, what it reached, and its limits."""
    params, metrics = run.data.params, run.data.metrics
    images = run.data.tags["dvc_stage"].partition("@")[2]
    made = (
        f"{int(params['train_images']):,} {images} images" if "train_images" in params else f"{images} images"
    )
    reached = [f"{100 * metrics[name]:.1f} % {how}" for name, how in MEASURED.items() if name in metrics]
    lines = [f"The decision: {decision.words}.", f"Trained on {made} of Fashion-MNIST."]
    lines += [f"Test accuracy: {', '.join(reached)}."] if reached else []
    return "\n\n".join([*lines, "What these CNNs can and cannot do: docs/model_card.md."])


def carry_out(client, run, decision: Decision) -> None:
    """Register the model, note the decision on its version, and move the alias if that was decided.

    A version that was promoted earlier keeps the numbers of that promotion.
    """
    version = register(client, run)
    if decision.promote or version.tags.get("promoted") != "true":
        for name, value in decision.numbers.items():
            client.set_model_version_tag(NAME, version.version, name, str(value))
        client.update_model_version(NAME, version.version, card(run, decision))
        client.set_model_version_tag(NAME, version.version, "promoted", str(decision.promote).lower())
    if decision.promote:
        client.set_registered_model_alias(NAME, CHAMPION, version.version)
    print(f"{NAME} version {version.version}: {'champion' if decision.promote else 'registered'}")
