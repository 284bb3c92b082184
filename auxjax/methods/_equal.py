"""Equal weights: the sum, or the mean, of all tasks' losses (also called uniform weighting or NAL).

    min_theta  l_0 + c sum_k l_k            reduction="sum"
    min_theta  (l_0 + c sum_k l_k)/(1+K)    reduction="mean"

The two differ by a factor of 1 + K in the effective learning rate, which matters with plain SGD; papers use both and
seldom say which.
"""

from auxjax._internal import checks
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import descent, evaluation


@register("fixed weights")
def equal(*, auxiliary_weight: float = 1.0, reduction: str = "sum") -> Method:
    """Trains on all tasks with fixed equal weights.

    Args:
      auxiliary_weight: c, the weight of every auxiliary task beside the primary task's 1; at least 0.
      reduction: "sum" or "mean" over the 1 + K tasks.

    Returns:
      A `Method` without an outer level. Cost: one gradient of the joint loss.

    Raises:
      ValueError: a negative weight or another reduction.
    """
    if not checks.is_traced(auxiliary_weight) and not auxiliary_weight >= 0:
        raise ValueError(f"equal(auxiliary_weight={auxiliary_weight}): expected a number >= 0.")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"equal(reduction={reduction!r}): expected 'sum' or 'mean'.")

    def weights_of(context, out):
        scale = 1.0 if reduction == "sum" else 1.0 / len(out.values)
        return {task: scale * (1.0 if task == context.model.primary else auxiliary_weight) for task in out.values}

    def inner(context, state, batch, key):
        return descent.weighted_update(context, state, batch, key, lambda out: weights_of(context, out))

    def weights(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        return descent.constant_weights(weights_of(context, out), out)

    return Method(init=lambda *_: (), inner=inner, weights=weights)
