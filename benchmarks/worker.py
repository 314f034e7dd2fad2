"""One side of a comparison, in a process of its own: runs each request and says how long it took.

Usage: worker.py lesson|project. Reads lines of JSON, [case, argument]; answers [seconds, result].
Two processes, because the project's side sets up OpenMP and malloc for everything in its process.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
THREADS = 2


class Lesson:
    """The lesson's loops and the plain calls of torchvision and imgaug."""

    def __init__(self):
        import lesson
        import torch
        from torchvision import datasets

        torch.set_num_threads(THREADS)
        dataset = datasets.FashionMNIST(ROOT / "data")
        self.images = dataset.data.numpy()
        self.batches = lesson.loader(self.images[:55_000], dataset.targets.numpy()[:55_000])

    def steps(self, count):
        """`count` training steps on batches of 32."""
        import lesson

        from fashion_cnn.models.cnns import build_cnn, fresh

        return lesson.train(fresh(build_cnn, 0), self.batches, count)

    def epoch(self, _):
        """A whole epoch of 55,000 images."""
        return self.steps(None)

    def toy(self, epochs):
        """`epochs` epochs of the toy."""
        import lesson

        from fashion_cnn.models.cnns import build_toy_cnn, fresh
        from fashion_cnn.project.files import read_tensors

        toy = read_tensors(ROOT / "data/toy.safetensors")
        return lesson.train_toy(fresh(build_toy_cnn, 0), toy["images"], toy["labels"], epochs)[-1]

    def augment(self, count):
        """One plain call of imgaug over `count` images."""
        from fashion_cnn.lesson.augmentation import imgaug_augmenters

        shift = {"x": (-4, 4), "y": (-4, 4)}
        affine = imgaug_augmenters().Affine(translate_px=shift, rotate=(-20, 20), seed=0)
        return affine(images=self.images[:count]).shape

    def load(self, _):
        """Read the files, and take every image out in batches of 32."""
        import lesson
        from torchvision import datasets

        dataset = datasets.FashionMNIST(ROOT / "data")
        batches = lesson.loader(dataset.data.numpy(), dataset.targets.numpy())
        return sum(len(images) for images, _ in batches)


class Project:
    """The same work by the project's own code."""

    def __init__(self):
        from fashion_cnn.data.fashion_mnist import RAW_DIR, TRAIN_IMAGES, TRAIN_LABELS, read_idx

        self.images = read_idx(TRAIN_IMAGES, ROOT / RAW_DIR)
        self.labels = read_idx(TRAIN_LABELS, ROOT / RAW_DIR)

    def steps(self, count):
        """`count` training steps on batches of 32."""
        return self._train(self.images[None], self.labels, count * 32 if count else 55_000)

    def epoch(self, _):
        """A whole epoch of 55,000 images."""
        return self.steps(None)

    def toy(self, epochs):
        """`epochs` epochs of the toy."""
        from fashion_cnn.lesson.toy import train_toy
        from fashion_cnn.models.device import prepare_torch
        from fashion_cnn.project.files import read_tensors

        prepare_torch("cpu", threads=1, fixed_order=False)
        toy = read_tensors(ROOT / "data/toy.safetensors")
        losses = train_toy(toy["images"], toy["labels"], epochs=epochs, learning_rate=0.01, seed=0)[1]
        return losses[-1]

    def augment(self, count):
        """augment_images' engine over `count` images."""
        from fashion_cnn.lesson.augmentation import augment

        [copy] = augment(self.images[:count], copies=1, max_shift=4, max_rotation=20.0, seed=0)
        return copy.shape

    def load(self, _):
        """Read the files, and take every image out in batches of 32, as float."""
        import torch

        from fashion_cnn.data.fashion_mnist import RAW_DIR, TRAIN_IMAGES, TRAIN_LABELS, read_idx
        from fashion_cnn.models.cnns import to_input

        images = torch.from_numpy(read_idx(TRAIN_IMAGES, ROOT / RAW_DIR))
        labels = torch.from_numpy(read_idx(TRAIN_LABELS, ROOT / RAW_DIR)).long()
        batches = torch.randperm(len(images)).split(32)
        return sum(len(to_input(images[index])) for index in batches if len(labels[index]))

    def growth(self, times):
        """200 steps on `times` times the images; returns the process's peak memory in MiB."""
        import numpy as np

        self._train(np.tile(self.images, (times, 1, 1))[None], np.tile(self.labels, times), 200 * 32)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def _train(self, pool, labels, count):
        from tqdm import tqdm

        from fashion_cnn.models.device import prepare_torch
        from fashion_cnn.training.loop import train_epoch

        prepare_torch("cpu")
        step, batches = training(pool, labels)
        batches = batches[: count // 32]
        return train_epoch(step, step, batches, [0.001] * len(batches), tqdm(disable=True))


def training(pool, labels, model="lesson"):
    """A step on a fresh CNN, and an epoch's batches: the lesson's, whatever the user's params.yaml holds."""
    import numpy as np
    import torch

    from fashion_cnn.models.cnns import build_cnn, fresh
    from fashion_cnn.models.inference import to_device
    from fashion_cnn.project.params import read_yaml
    from fashion_cnn.training.batches import draw_epoch
    from fashion_cnn.training.loop import TrainStep
    from fashion_cnn.training.optimizer import build_optimizer

    params = SimpleNamespace(**read_yaml(ROOT / "tests/helpers/params.yaml")["train_cnn"])
    cpu = torch.device("cpu")
    cnn = to_device(fresh(lambda: build_cnn(model), 0), cpu)
    optimizer = build_optimizer(cnn, params, cpu)
    step = TrainStep(cnn.train(), optimizer, torch.from_numpy(pool), torch.from_numpy(labels).long(), params)
    return step, torch.from_numpy(draw_epoch(np.arange(pool.shape[1]), 1, params, 1)).split(32)


def main() -> None:
    """Answer requests until standard input ends."""
    from fashion_cnn.project.process import start

    start()
    os.environ["FASHION_CNN_THREADS"] = str(THREADS)
    side = {"lesson": Lesson, "project": Project}[sys.argv[1]]()
    print("ready", flush=True)
    for line in sys.stdin:
        case, argument = json.loads(line)
        began = time.perf_counter()
        result = getattr(side, case)(argument)
        print(json.dumps([time.perf_counter() - began, result]), flush=True)


if __name__ == "__main__":
    main()
