"""Handwritten digits with 40 % wrong training labels; rotation prediction as the auxiliary task.

    python -m experiments.compare digits_noise --methods stl,equal,arml,jtds --seeds 0,1,2 --out out/demo

Scikit-learn's bundled digits: 1,797 grey images of 8 x 8 pixels. 897 train (40 % of their labels flipped to another
class), 200 dev, 200 validation and 500 test images with clean labels. A run takes some seconds on two CPU cores.
"""

import dataclasses

import jax.numpy as jnp
import optax

from auxjax.models import MLP
from experiments.contract import Experiment
from experiments.data import digits
from experiments.methods.defaults import common_options
from experiments.settings import RunSettings, setting
from experiments.tasks import image_classification


@dataclasses.dataclass(frozen=True)
class Settings(RunSettings):
    """Beside those of any run: the share of wrong labels, the width of the hidden layers, the auxiliary tasks."""

    noise: float = setting(0.4, most=1.0)
    steps: int = 3000
    batch_size: int = 128
    outer_batch_size: int = 200
    learning_rate: float = 3e-4
    outer_learning_rate: float = 0.2
    weight_learning_rate: float = 0.1
    hidden: int = setting(128, least=1)
    auxiliary: tuple[str, ...] = ("rotation",)


def load(settings, seed, data_dir):
    """The data; the digits come with scikit-learn, `data_dir` is not used."""
    if data_dir is not None:
        raise ValueError(f"--data-dir {data_dir}: the digits are bundled with scikit-learn; leave --data-dir out.")
    return digits.load(seed, noise=settings.noise, dev_size=settings.dev_size)


def method_options(settings, shapes) -> dict[str, dict]:
    """Options of the methods that need some. Chosen on validation."""
    return common_options(settings, shapes, settings.auxiliary, max_updates=150, fixed_weight=3.0)


def build(settings, shapes) -> Experiment:
    """The experiment: a multilayer perceptron trained by Adam."""
    network = MLP(
        hidden=(settings.hidden, settings.hidden),
        heads=image_classification.heads(shapes.num_classes, settings.auxiliary),
    )

    def init_params(key):
        return network.init(key, jnp.zeros((1, *shapes.inputs), jnp.float32))["params"], None

    return Experiment(
        model=image_classification.task_model(network, settings.auxiliary),
        optimizer=optax.adam(settings.learning_rate),
        init_params=init_params,
        draw_inner=image_classification.draw(settings.batch_size),
        draw_outer=image_classification.draw(settings.outer_batch_size),
        evaluators=(image_classification.evaluator(network),),
        metric="accuracy",
    )
