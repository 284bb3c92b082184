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
      TypeError, ValueError: not a finite weight of at least 0, or another reduction.
    """
    checks.number("equal", least=0, auxiliary_weight=auxiliary_weight)
    checks.one_of("equal", ("sum", "mean"), reduction=reduction)

    def weights_of(context, state, out):
        scale = 1.0 if reduction == "sum" else 1.0 / len(out.values)
        return {task: scale * (1.0 if task == context.model.primary else auxiliary_weight) for task in out.values}

    return Method(init=lambda *_: (), inner=descent.weighted_by(weights_of), weights=evaluation.reported(weights_of))
