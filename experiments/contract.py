"""What a config builds: everything a run needs except its seed and its data.

A config module has a frozen dataclass `Settings`, `load(settings, seed, data_dir) -> Splits`, `method_options(settings,
shapes) -> {method: options}` and `build(settings, method, shapes) -> Experiment` (`shapes`: see
`training.single.Shapes`; `method`: a label, see `methods.labels`). The experiment depends on the shapes of the data
only, and takes data as an argument, so that one compiled step serves all seeds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from auxjax import Method, TaskModel
from auxjax.training.parallel import replicate
from experiments.inputs.batches import Draw


class Experiment(NamedTuple):
    """A model, a method and how to feed and judge them.

    Attributes:
      model: the `TaskModel`.
      method: the `Method`.
      optimizer: the inner optimiser.
      inner_steps: inner updates per outer update.
      init_params: `key -> (params, model_state)`.
      draw_inner: `(data, key) -> batch`, see `auxjax.make_step`.
      draw_outer: the same for the dev data.
      evaluate: `(params, model_state, split) -> {metric: number}`, metrics of the primary task as
        `experiments.evaluation.metrics` knows them, on a split (see `data.splits`).
      metric: the one of them that chooses the best step on validation.
      outer_steps: outer updates after every `inner_steps` inner ones.
      step_model: the model in the form in which the training step takes it, where that is another one, in parts or in
        half precision; `None` for `model`.
    """

    model: TaskModel
    method: Method
    optimizer: optax.GradientTransformation
    inner_steps: int
    init_params: Callable[[jax.Array], tuple[Any, Any]]
    draw_inner: Draw
    draw_outer: Draw
    evaluate: Callable[[Any, Any, dict], dict[str, float]]
    metric: str
    outer_steps: int = 1
    step_model: TaskModel | None = None


_NOT_FOR_TRAINING = ("true_label", "corrupted", "example_id")


def visible(split: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a split that training may see."""
    return {name: array for name, array in split.items() if name not in _NOT_FOR_TRAINING}


def on_device(split: dict[str, np.ndarray], mesh=None) -> dict[str, jax.Array]:
    """The arrays of a split that training may see, on the device, or on every device of a mesh."""
    found = visible(split)
    return jax.tree.map(jax.numpy.asarray, found) if mesh is None else replicate(found, mesh)
