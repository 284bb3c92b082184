"""Digits with twelve auxiliary tasks of known worth: four help, four know the image alone, four are noise.

    python -m experiments.compare known_worth --methods equal+dev,arml,arml+refit --seeds 0,1,2 --out out/known-worth

50 images show their class in training and 50 in the outer loss; some 900 others show the labels of the auxiliary tasks.
`--set variant=` changes one thing about the tasks, see `experiments.data.known_worth`: in every variant it is known
which tasks help, so that the weights of a method can be held against the right ones. `python -m benchmarks.known_worth`
compares all methods over all variants. A run takes some seconds on two CPU cores.
"""

import dataclasses

from auxjax.models import MLP
from experiments.contract import Experiment
from experiments.data import known_worth as data
from experiments.settings import RunSettings, setting
from experiments.tasks import known_worth


@dataclasses.dataclass(frozen=True)
class Settings(RunSettings):
    """Beside those of any run: the variant, examples of the pool per batch, the outer loss, the width of the layers."""

    variant: str = setting("plain", choices=tuple(data.VARIANTS))
    steps: int = 2000
    batch_size: int = 250  # all that are labelled
    pool_batch_size: int = setting(64, least=1)
    outer_loss: str = setting("cross_entropy", choices=tuple(known_worth.OUTER_LOSSES))
    outer_batch_size: int = 250
    learning_rate: float = 1e-3
    outer_learning_rate: float = 0.1
    weight_learning_rate: float = 0.1
    hidden: int = setting(128, least=1)


def load(settings, seed, data_dir):
    """The data; the digits come with scikit-learn, `data_dir` is not used."""
    if data_dir is not None:
        raise ValueError(f"--data-dir {data_dir}: the digits are bundled with scikit-learn; leave --data-dir out.")
    return data.load(seed, variant=settings.variant)


method_options = known_worth.method_options


def build(settings, shapes) -> Experiment:
    """The experiment: a multilayer perceptron trained by Adam."""
    network = MLP(hidden=(settings.hidden, settings.hidden), heads=known_worth.heads(shapes))
    return known_worth.experiment(network, settings, shapes)
