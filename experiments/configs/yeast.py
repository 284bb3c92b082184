"""Yeast: one label of a protein with 5 % of its training labels, and 13 others with all of theirs as auxiliary tasks.

    python -m experiments.compare yeast --methods stl,stl+dev,equal,arml,jtds --seeds 0,1,2,3,4 \\
        --data-dir DIR --out out/yeast

`--data-dir` is a folder with Mulan's yeast-train.arff and yeast-test.arff, or with an npz (see docs/data.md). Of the
1,500 genes of the official training part, 60 are dev (the outer loss), 300 validation and 1,140 train, of which 57 show
the primary label; the official test part has 917. Methods are compared by the area under the ROC curve.

The primary task is Class4 unless `--set primary=` names another: it is neither rare nor common (36 % of the training
part), no other label repeats it (correlations of at most 0.44; Class12 and Class13, say, are all but one label), and of
the labels of which that holds it has most in common with the others together, so that there is something to gain. A run
takes some seconds on two CPU cores.
"""

import dataclasses

import jax.numpy as jnp
import optax

from auxjax.models import MLP
from experiments.contract import Experiment
from experiments.data import yeast as data
from experiments.inputs import batches
from experiments.methods.defaults import common_options
from experiments.settings import RunSettings, setting
from experiments.tasks import multilabel


@dataclasses.dataclass(frozen=True)
class Settings(RunSettings):
    """Beside those of any run: the primary label, the share of train that shows it, the width of the hidden layers."""

    primary: str = "Class4"
    labelled: float = setting(0.05, most=1.0)
    inner_steps: int = 5
    batch_size: int = 256
    outer_batch_size: int = 60
    outer_learning_rate: float = 0.1
    weight_learning_rate: float = 5e-3
    hidden: int = setting(128, least=1)
    dev_size: int = 60
    validation_size: int = 300
    log_every: int = 50


def load(settings, seed, data_dir):
    """The data, from disk."""
    return data.load(
        seed,
        data_dir=data_dir,
        primary=settings.primary,
        labelled=settings.labelled,
        dev_size=settings.dev_size,
        validation_size=settings.validation_size,
    )


def method_options(settings, shapes) -> dict[str, dict]:
    """Options of the methods that need some. Chosen on validation."""
    options = common_options(settings, shapes, shapes.tasks[1:], max_updates=100, fixed_weight=3.0)
    # A Gram matrix of 14 gradients at every inner update would take most of the time of a run.
    return {**options, "auxinash": {**options["auxinash"], "refresh": "outer"}}


def build(settings, shapes) -> Experiment:
    """The experiment: a multilayer perceptron trained by Adam."""
    network = MLP(hidden=(settings.hidden, settings.hidden), heads=multilabel.heads(shapes.tasks))

    def init_params(key):
        return network.init(key, jnp.zeros((1, *shapes.inputs), jnp.float32))["params"], None

    return Experiment(
        model=multilabel.task_model(network, shapes.tasks),
        optimizer=optax.adam(settings.learning_rate),
        init_params=init_params,
        draw_inner=batches.Draw(settings.batch_size),
        draw_outer=batches.Draw(settings.outer_batch_size),
        evaluators=(multilabel.evaluator(network),),
        metric="auroc",
    )
