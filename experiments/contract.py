"""What a config builds: everything a run needs except its seed, its data and its method.

A config module has three things, and may have a fourth:

    Settings                             a frozen dataclass that extends `experiments.settings.RunSettings`
    load(settings, seed, data_dir)       -> `experiments.data.pools.Data`
    build(settings, shapes)              -> `Experiment`; `shapes` are the `Shapes` of the data
    method_options(settings, shapes)     -> {method: options}; without it, `methods.defaults.common_options` with
                                            `shapes.tasks` as the names of the tasks

The experiment depends on the shapes of the data only, and takes data as an argument, so that one compiled step serves
all seeds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from auxjax import Average, TaskModel
from experiments.evaluation.evaluators import Evaluator
from experiments.inputs.batches import Draw, Draws


class Experiment(NamedTuple):
    """A model and how to feed and judge it.

    Attributes:
      model: the `TaskModel`.
      optimizer: the inner optimiser.
      init_params: `key -> (params, model_state)`.
      draw_inner: how an inner batch is drawn: a `Draw` from the one train pool, or `Draws` from several.
      draw_outer: the same for the outer batch and the dev pools.
      evaluators: what judges the params.
      metric: the metric that chooses the best step on validation, in the direction of its `Metric`; the mean over
        pools where there are several. To choose on one of them, give an evaluator of that pool alone.
      average: running mean of the params to keep in the state, for evaluators and for models that name `averaged`.
      step_model: the model in the form in which the training step takes it, where that is another one, in parts or in
        half precision; `None` for `model`.
    """

    model: TaskModel
    optimizer: optax.GradientTransformation
    init_params: Callable[[jax.Array], tuple[Any, Any]]
    draw_inner: Draw | Draws
    draw_outer: Draw | Draws
    evaluators: tuple[Evaluator, ...]
    metric: str
    average: Average | None = None
    step_model: TaskModel | None = None
