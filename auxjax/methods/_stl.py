"""Single-task learning: the primary task alone.

    min_theta  mean_i l_0(x_i; theta)

The baseline every auxiliary method has to beat. The fair one also trains on the examples that other methods keep for
their outer loss; that is a choice of data, made by the caller.
"""

from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import descent, evaluation


@register("control")
def stl() -> Method:
    """Trains on the mean primary loss; auxiliary losses are computed for the metrics only.

    Returns:
      A `Method` without an outer level.
      Cost: one gradient of the primary loss (auxiliary heads get zero gradients) and the forward pass of all heads.
    """

    def weights_of(context, state, out):
        return {context.model.primary: 1.0}

    return Method(init=lambda *_: (), inner=descent.weighted_by(weights_of), weights=evaluation.reported(weights_of))
