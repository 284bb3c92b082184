"""Fixed weights by hand: what a sweep over the weights trains, and the control that learned weights must beat.

min_theta  sum_k w_k L_k
"""

from collections.abc import Mapping

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
      TypeError: `weights` is no mapping.
      ValueError: a weight that is not finite; a name that is no task (when the state is made).
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"fixed_weights(weights=): expected {{task: weight}}, got {type(weights).__name__}.")
    for task, weight in weights.items():
        if not checks.is_traced(weight) and not -float("inf") < weight < float("inf"):
            raise ValueError(f"fixed_weights(weights=): the weight of {task!r} is {weight}; expected a finite number.")
    chosen = {task: weight if checks.is_traced(weight) else float(weight) for task, weight in weights.items()}

    def init(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        unknown = sorted(set(chosen) - set(out.values))
        if unknown:
            raise ValueError(f"fixed_weights(weights=) names {unknown[0]!r}; the model has {sorted(out.values)}.")
        return ()

    def inner(context, state, batch, key):
        return descent.weighted_update(context, state, batch, key, lambda out: {context.model.primary: 1.0, **chosen})

    def weights_of(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        return descent.constant_weights({context.model.primary: 1.0, **chosen}, out)

    return Method(init=init, inner=inner, weights=weights_of)
