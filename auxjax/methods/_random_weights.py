"""Random weights: a control. What a method gains over these, it has learned.

    w = (1 + K) softmax(z),  z ~ N(0, 1)^(1+K)         distribution="normal"
    w = (1 + K) Dirichlet(1, ..., 1)                   distribution="dirichlet"

drawn anew at every update, or once for the whole run. Drawn anew they have mean 1: gradient descent on equal weights
with noise, which may help by itself.

Reference: Lin, Ye, Zhang, Tsang, 2022, Reasonable Effectiveness of Random Weighting, TMLR.
"""

import jax
import jax.numpy as jnp

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import descent, evaluation


@register("control")
def random_weights(*, distribution: str = "normal", redraw: bool = True, weigh_primary: bool = True) -> Method:
    """Trains with weights that nothing has been learned for.

    Args:
      distribution: "normal" or "dirichlet", see above.
      redraw: draw at every update; False draws once, when the state is made.
      weigh_primary: False keeps the primary task's weight at 1, and the auxiliary weights sum to K.

    Returns:
      A `Method` without an outer level; its state is the weights of the last update, `{task: scalar}`.
      Cost: one gradient of the joint loss.

    Raises:
      ValueError: another distribution.
    """
    checks.one_of("random_weights", ("normal", "dirichlet"), distribution=distribution)

    def draw(context, out, key):
        tasks = sorted(out.values) if weigh_primary else evaluation.auxiliary_tasks(out, context.model.primary)
        if not tasks:
            return {context.model.primary: jnp.ones((), accumulation_dtype(out.values))}
        dtype = accumulation_dtype(*(out.values[task] for task in tasks))
        if distribution == "normal":
            shares = jax.nn.softmax(jax.random.normal(key, (len(tasks),), dtype))
        else:
            shares = jax.random.dirichlet(key, jnp.ones((len(tasks),), dtype), dtype=dtype)
        drawn = dict(zip(tasks, len(tasks) * shares, strict=True))
        return drawn if weigh_primary else {context.model.primary: jnp.ones((), dtype), **drawn}

    def init(context, state, batch, key):
        return draw(context, evaluation.loss_shapes(context, state, batch, key), key)

    def inner(context, state, batch, key):
        key_loss, key_draw = jax.random.split(key)
        weights = state.method
        if redraw:
            weights = draw(context, evaluation.loss_shapes(context, state, batch, key_loss), key_draw)
        state, metrics = descent.weighted_update(context, state, batch, key_loss, lambda out: weights)
        return state._replace(method=weights), metrics

    return Method(init=init, inner=inner, weights=evaluation.reported(lambda context, state, out: state.method))
