"""What a config builds: everything a run needs except its seed and its data.

A config module has a frozen dataclass `Settings`, `load(settings, seed, data_dir) -> Splits` and
`build(settings, method, shapes) -> Experiment` (`shapes`: see `trainer.Shapes`). The experiment depends on the shapes
of the data only, and takes data as an argument, so that one compiled step serves all seeds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from auxjax import Method, TaskModel


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
      evaluate: `(params, model_state, images, labels) -> accuracy of the primary task`, jitted.
      batch_of: `(data, indices) -> batch`, the examples at these places, to ask the method for their weights.
    """

    model: TaskModel
    method: Method
    optimizer: optax.GradientTransformation
    inner_steps: int
    init_params: Callable[[jax.Array], tuple[Any, Any]]
    draw_inner: Callable[[Any, jax.Array], Any]
    draw_outer: Callable[[Any, jax.Array], Any]
    evaluate: Callable[[Any, Any, Any, Any], jax.Array]
    batch_of: Callable[[Any, Any], Any]


def on_device(split: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The arrays of a split that training reads, on the device."""
    return {name: jax.numpy.asarray(split[name]) for name in ("image", "label")}
