"""CIFAR-10 with twelve auxiliary tasks of known worth: four help, four know the image alone, four are noise.

    python -m experiments.compare known_worth_cifar10 --methods equal+dev,arml+dev,cross_fit+refit --seeds 0,1,2 \\
        --data-dir ~/tensorflow_datasets --out out/known-worth-cifar10

The config `known_worth` on natural images, with a convolutional network: 100 images show their class in training and
100 in the outer loss, 16,000 others show the labels of the auxiliary tasks. `--data-dir` is as for `cifar10_rotation`.
A run takes a minute or two on two CPU cores.
"""

import dataclasses

from auxjax.models import ConvNet
from experiments.contract import Experiment
from experiments.data import known_worth_cifar10 as data
from experiments.data.known_worth import VARIANTS
from experiments.settings import RunSettings, setting
from experiments.tasks import known_worth


@dataclasses.dataclass(frozen=True)
class Settings(RunSettings):
    """Beside those of any run: the data, and the channels of the network.

    Attributes:
      variant: what is special about the tasks.
      times: how many images per class show it for each one on digits.
      pool_size: images with auxiliary labels.
      side: height and width of the images.
      pool_batch_size: examples of the pool per batch.
      outer_loss: of held-out labels: cross-entropy, or the expected error, which calibration moves less.
      channels: of the convolutions.
    """

    variant: str = setting("plain", choices=tuple(VARIANTS))
    times: int = setting(2, least=1)
    pool_size: int = setting(16_000, least=1)
    side: int = setting(16, choices=(8, 16, 32))
    steps: int = 2000
    batch_size: int = 500  # all that are labelled
    pool_batch_size: int = setting(64, least=1)
    outer_loss: str = setting("cross_entropy", choices=tuple(known_worth.OUTER_LOSSES))
    outer_batch_size: int = 500
    learning_rate: float = 1e-3
    outer_learning_rate: float = 0.1
    weight_learning_rate: float = 0.1
    channels: tuple[int, ...] = setting((16, 32, 64), least=1)


def load(settings, seed, data_dir):
    """The data, from disk."""
    chosen = {name: getattr(settings, name) for name in ("variant", "times", "pool_size", "side")}
    return data.load(seed, data_dir=data_dir, **chosen)


method_options = known_worth.method_options


def build(settings, shapes) -> Experiment:
    """The experiment: a convolutional network without normalisation, trained by Adam."""
    network = ConvNet(channels=settings.channels, heads=known_worth.heads(shapes))
    return known_worth.experiment(network, settings, shapes)
