"""Fixed weights: given by hand, or learned in an earlier run.

min_theta  sum_k mean_i w_ik l_ik

What a sweep over the weights trains, the control that learned weights must beat, and the refit: a run from scratch with
the weights that another one has learned.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import descent, evaluation, example_tables


@register("fixed weights")
def fixed_weights(*, weights: Mapping[str, Any], ids: Callable | None = None) -> Method:
    """Trains on a weighted sum of losses with weights that are given.

    Args:
      weights: `{task: weight}`: a number; a schedule `step -> number`, as optax has them; or one weight per example,
        `[N]`, for which `ids` says where the examples of a batch stand. Auxiliary tasks that are left out have weight
        0, the primary task has weight 1.
      ids: `batch -> int [n_task]`, or `{task: int [n_task]}`, for tasks with one weight per example. An id outside of
        the table reads NaN, which shows in every metric.

    Returns:
      A `Method` without an outer level. Its state is `{task: array}`, the numbers and tables, so that one compiled step
      serves all values: `state._replace(method=other)`. Cost: one gradient of the joint loss.

    Raises:
      TypeError: `weights` is not a mapping, `ids` not a function.
      ValueError: a weight that is not finite; tables without `ids`; a name that is not a task, or ids that do not fit
        the losses (when the state is made).
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"fixed_weights(weights=): expected {{task: weight}}, got {type(weights).__name__}.")
    schedules = {task: weight for task, weight in weights.items() if callable(weight)}
    tables = {task: len(weight) for task, weight in weights.items() if not callable(weight) and np.ndim(weight)}
    for task, weight in weights.items():
        if task in tables:
            _check_table(task, weight)
        elif task not in schedules:
            checks.number("fixed_weights", **{f"weights[{task!r}]": weight})
    if ids is not None:
        checks.function("fixed_weights", "a function from a batch to the ids of its examples", ids=ids)
    elif tables:
        raise ValueError(
            f"fixed_weights(weights[{min(tables)!r}]=) has one weight per example; expected ids=, a function from a "
            "batch to the places of its examples in that table."
        )

    def init(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        evaluation.check_names("fixed_weights(weights=)", weights, out)
        example_tables.check_rows("fixed_weights", rows_of(batch, None), out)
        return {
            task: jnp.asarray(weight, accumulation_dtype(out.values[task]))
            for task, weight in weights.items()
            if task not in schedules
        }

    def rows_of(batch, primary) -> dict[str, jax.Array]:
        return {} if ids is None else example_tables.rows_of("fixed_weights", ids, batch, tables, primary)

    def chosen(context, state, batch):
        given = {task: schedule(state.step) for task, schedule in schedules.items()}
        by_example = example_tables.read(state.method, rows_of(batch, context.model.primary), tables)
        return {context.model.primary: 1.0, **given, **state.method, **by_example}

    def inner(context, state, batch, key):
        found = chosen(context, state, batch)
        return descent.weighted_update(context, state, batch, key, lambda out: found)

    def weights_in(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        return evaluation.constant_weights(chosen(context, state, batch), out)

    return Method(init=init, inner=inner, weights=weights_in)


def _check_table(task: str, weight) -> None:
    if np.ndim(weight) != 1 or not (checks.is_traced(weight) or np.isfinite(np.asarray(weight)).all()):
        raise ValueError(
            f"fixed_weights(weights[{task!r}]=): expected a finite number, a schedule or finite weights [N], got an "
            f"array of shape {list(np.shape(weight))}."
        )
