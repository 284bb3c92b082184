"""Fixed weights by hand: what a sweep over the weights trains, and the control that learned weights must beat.

min_theta  sum_k w_k L_k
"""

from collections.abc import Mapping
from typing import Any

from auxjax._internal import checks
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import descent, evaluation


@register("fixed weights")
def fixed_weights(*, weights: Mapping[str, float]) -> Method:
    """Trains on a weighted sum of losses with weights that are given.

    Args:
      weights: `{task: weight}`. Auxiliary tasks that are left out have weight 0, the primary task has weight 1.

    Returns:
      A `Method` without an outer level. Cost: one gradient of the joint loss.

    Raises:
      TypeError: `weights` is not a mapping.
      ValueError: a weight that is not finite; a name that is not a task (when the state is made).
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"fixed_weights(weights=): expected {{task: weight}}, got {type(weights).__name__}.")
    numbers: dict[str, Any] = {f"weights[{task!r}]": weight for task, weight in weights.items()}
    checks.number("fixed_weights", **numbers)
    chosen = {task: weight if checks.is_traced(weight) else float(weight) for task, weight in weights.items()}

    def init(context, state, batch, key):
        evaluation.check_names("fixed_weights(weights=)", chosen, evaluation.loss_shapes(context, state, batch, key))
        return ()

    def weights_of(context, state, out):
        return {context.model.primary: 1.0, **chosen}

    return Method(init=init, inner=descent.weighted_by(weights_of), weights=evaluation.reported(weights_of))
