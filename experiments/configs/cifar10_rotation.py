"""CIFAR-10 with rotation prediction as the auxiliary task, after the CF-10 column of JTDS's table 2.

    python -m experiments.compare cifar10_rotation --methods stl,equal,arml,jtds --seeds 0,1,2 \\
        --data-dir ~/tensorflow_datasets --out out/cifar10

`--data-dir` is a folder in which tensorflow-datasets has prepared cifar10 as array_record, or an npz of residual-coded
images (see docs/data.md). The four-layer convolutional network, clean labels and 200 dev images are the paper's; its
optimiser and schedule for this data set were never published, so those here are ours: Adam with a cosine schedule,
crops and mirror images. The paper reports 71.6 % (single task), 70.4 % (equal weights) and 72.6 % (JTDS).

An accelerator takes minutes. Two CPU cores need about 0.2 s per update: shorten with --steps and --set train_size.
Label noise: --set noise=0.4.
"""

import dataclasses

from experiments.data import cifar10
from experiments.settings import setting
from experiments.tasks import image_classification


@dataclasses.dataclass(frozen=True)
class Settings(image_classification.ConvNetSettings):
    """Those of a convolutional network, and the share of wrong labels; `train_size=0` takes all images."""

    noise: float = setting(0.0, most=1.0)
    steps: int = 20_000
    inner_steps: int = 20
    batch_size: int = 128
    outer_batch_size: int = 200
    channels: tuple[int, ...] = (64, 64, 128, 128)
    padding: int = 4
    train_size: int = 0
    log_every: int = 500
    checkpoint_every: int = 1000


def load(settings, seed, data_dir):
    """The data, from disk."""
    return cifar10.load(
        seed,
        data_dir=data_dir,
        noise=settings.noise,
        train_size=settings.train_size or None,
        dev_size=settings.dev_size,
        validation_size=settings.validation_size,
    )


method_options = image_classification.convnet_options
build = image_classification.convnet_experiment
