"""CIFAR-10N: human annotations, 40 % (worse) or 9 % (aggregate) of them wrong; rotation prediction as auxiliary task.

    python -m experiments.compare cifar10n --methods stl,equal,uncertainty,cosine_similarity,jtds --seeds 0,1,2 \\
        --data-dir ~/tensorflow_datasets --out out/cifar10n-worse
    python -m experiments.compare cifar10n --set noise_kind=aggregate --methods ... --out out/cifar10n-aggregate

`--data-dir` holds CIFAR-10 and the labels (see docs/data.md). 10,000 training images with the labels of `noise_kind`
(aggregate, worse, random1, random2 or random3), 200 dev and 2,000 validation images with CIFAR-10's own, cut anew for
every seed; the official test set. A three-layer convolutional network with BatchNorm, 19 epochs, crops and mirror
images. `corrupted_auroc` says how well a method's weights tell right labels from wrong ones; 0.5 is chance. Methods
with one weight per task have none.

A run takes 3 minutes of processor time with stl, equal and uncertainty and 6 to 7 with jtds and cosine_similarity,
which two idle CPU cores share.

Chosen on validation accuracy, with kind worse, 1,200 updates and a seed of its own (100): the learning rate with
equal, 5e-3 (51.8 %) over 2e-3 (48.7 %); the scheduler's with jtds at 2e-3, 0.2 (50.1 %) over 0.05 (48.9 %), which one
seed and 2,000 images do not tell apart. Everything else was set once: width and length by the time they take.
"""

import dataclasses

from experiments.data import cifar10n
from experiments.settings import setting
from experiments.tasks import image_classification


@dataclasses.dataclass(frozen=True)
class Settings(image_classification.ConvNetSettings):
    """Those of a convolutional network, and the kind of labels; `train_size=0` takes all images."""

    noise_kind: str = setting("worse", choices=tuple(cifar10n.KINDS))
    steps: int = 3000
    outer_batch_size: int = 200
    learning_rate: float = 5e-3
    outer_learning_rate: float = 0.2
    channels: tuple[int, ...] = (8, 32, 64)
    log_every: int = 250


def load(settings, seed, data_dir):
    """The data, from disk: images and human annotations."""
    return cifar10n.load(
        seed,
        data_dir=data_dir,
        kind=settings.noise_kind,
        train_size=settings.train_size or None,
        dev_size=settings.dev_size,
        validation_size=settings.validation_size,
    )


method_options = image_classification.convnet_options
build = image_classification.convnet_experiment
