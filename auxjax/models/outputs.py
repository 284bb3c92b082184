"""What a multi-task model returns, and the heads that every model of this package ends with.

A model here is a trunk that turns an input into features `[n, d]`, and one head per task on these features, linear or
with hidden layers of its own. Submodules of the trunk have names that begin with "trunk", and the head of task t is
named "head_t" (hidden layers: "head_t_hidden_0", ...), so that paths of parameters tell them apart:
`auxjax.formulas.partition.mask_by_path(params, lambda path: "trunk_" in path)` is the trunk.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
from flax import linen as nn


class Outputs(NamedTuple):
    """What a multi-task model returns.

    Attributes:
      heads: `{task: [n, outputs of the task]}`, before any softmax or other link function.
      features: `[n, d]`, the shared features that the heads read.
    """

    heads: dict[str, jax.Array]
    features: jax.Array


def apply_heads(
    features: jax.Array,
    heads: Mapping[str, int],
    *,
    hidden: tuple[int, ...] = (),
    where: str,
    dtype=None,
    param_dtype,
) -> Outputs:
    """Adds one head per task; call it inside a `compact` method.

    Args:
      features: `[n, d]`.
      heads: `{task: number of outputs}`.
      hidden: widths of dense layers with ReLU that every head has before its linear one.
      where: name of the model, for messages.
      dtype: dtype of the computation, or None for that of features and parameters.
      param_dtype: dtype in which parameters are made.

    Returns:
      `Outputs`.

    Raises:
      ValueError: a number of outputs is not a positive int, or a task's name holds a "/", which separates paths.
    """
    outputs = {}
    for task, size in heads.items():
        if "/" in task:
            raise ValueError(f'{where}(heads) has a task {task!r}; a name must not hold a "/", which separates paths.')
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{where}(heads[{task!r}]) is {size!r}; expected the number of outputs, an int >= 1.")
        x = features
        for i, width in enumerate(hidden):
            x = nn.relu(nn.Dense(width, dtype=dtype, param_dtype=param_dtype, name=f"head_{task}_hidden_{i}")(x))
        outputs[task] = nn.Dense(size, dtype=dtype, param_dtype=param_dtype, name=f"head_{task}")(x)
    return Outputs(heads=outputs, features=features)


def head_on(params: Mapping, task: str, features: jax.Array) -> jax.Array:
    """A trained head on features of any origin, for `TaskModel.feature_loss`.

    Args:
      params: the model's parameters, `variables["params"]`.
      task: a task that the model has a head for.
      features: `[n, d]`, like `Outputs.features`.

    Returns:
      `[n, outputs of the task]`, what the model itself would make of these features.

    Raises:
      ValueError: no such head.
    """
    name = f"head_{task}"
    if name not in params:
        known = sorted(key.removeprefix("head_") for key in params if key.startswith("head_") and "_hidden_" not in key)
        raise ValueError(f"head_on(task={task!r}): the parameters have heads for {known}.")
    x, i = features, 0
    while (hidden := f"{name}_hidden_{i}") in params:
        x, i = nn.relu(_dense(params[hidden], x)), i + 1
    return _dense(params[name], x)


def _dense(layer: Mapping, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"][None, :]
