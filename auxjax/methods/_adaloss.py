"""AdaLoss: weights of tasks inversely proportional to their mean losses.

    w_k = total * (1 / m_k) / sum_j (1 / m_j),      m_k = running mean of L_k

so that all tasks contribute alike; equivalently, the geometric mean of the losses is minimised, d/dtheta sum_k log L_k.

Reference: Hu, Dey, Hebert, Bagnell, 2019, Learning Anytime Predictions in Neural Networks via Adaptive Loss Balancing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax._internal.safe_math import positive_or_one
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import descent, evaluation


class AdalossState(NamedTuple):
    """State of AdaLoss.

    Attributes:
      means: `[K + 1]`, running means of the losses, the tasks in the order of their names; zero at first.
      counts: `[K + 1]`, the weight each mean has gathered, 1 - decay^n after n batches with labels.
    """

    means: jax.Array
    counts: jax.Array


@register("statistics of losses", needs={"auxiliary"})
def adaloss(
    *, form: str = "normalised", decay: float = 0.99, shift: float | dict[str, float] = 0.0, epsilon: float = 1e-6
) -> Method:
    """Weights one over the running mean of each loss.

    Args:
      form: "normalised" weighs all 1 + K tasks, the weights summing to 1 + K. "log_auxiliary" gives the primary task
        weight 1 and auxiliary task k the weight 1 / (m_k + epsilon): the gradient of `L_0 + sum_k log(L_k + epsilon)`,
        as ARML's code has its baseline, with `decay=0`.
      decay: of the running means per update, at least 0 and below 1; 0 takes the batch's own loss.
      shift: added to the losses before the mean is taken, for all tasks or `{task: shift}`: a loss in [-1, 1], such as
        a negative cosine, wants a shift of 1. A shifted mean that is not positive counts as 0.
      epsilon: added to the means.

    Returns:
      A `Method` without an outer level. Cost: one gradient of the joint loss. A task without a labelled example in a
      batch keeps its mean, and so does one whose loss is not finite (`skipped` counts them); before the first one its
      mean counts as 1.

    Raises:
      TypeError, ValueError: an impossible option; a name in `shift` that is not a task (when the state is made).
    """
    checks.one_of("adaloss", ("normalised", "log_auxiliary"), form=form)
    checks.number("adaloss", least=0, below=1, decay=decay)
    checks.number("adaloss", above=0, epsilon=epsilon)

    def init(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        evaluation.auxiliary_or_raise("adaloss", context, out)
        if isinstance(shift, dict):
            evaluation.check_names("adaloss(shift=)", shift, out)
        zeros = jnp.zeros(len(out.values), accumulation_dtype(*out.values.values()))
        return AdalossState(zeros, zeros)

    def observe(context, previous, out) -> tuple[AdalossState, jax.Array]:
        """The running means after a batch, and how many losses were left out."""
        tasks = sorted(out.values)
        shifts = [shift.get(task, 0.0) if isinstance(shift, dict) else shift for task in tasks]
        dtype = previous.means.dtype
        found, seen, skipped = evaluation.observed(context, out, tasks)
        found = found.astype(dtype) + jnp.array(shifts, dtype)
        means = decay * previous.means + (1 - decay) * found
        counts = decay * previous.counts + (1 - decay)
        kept = AdalossState(jnp.where(seen, means, previous.means), jnp.where(seen, counts, previous.counts))
        return kept, skipped

    def weights_of(context, state, out):
        tasks, ((means, counts), _) = sorted(out.values), observe(context, state.method, out)
        level = jnp.where(counts > 0, means / positive_or_one(counts), jnp.ones_like(means))
        inverse = 1.0 / (jnp.maximum(level, 0.0) + epsilon)
        if form == "log_auxiliary":
            return {**evaluation.by_task(tasks, inverse), context.model.primary: 1.0}
        return evaluation.by_task(tasks, len(tasks) * inverse / jnp.sum(inverse))

    def inner(context, state, batch, key):
        grads, out, weights = descent.weighted_gradient(
            context, state, batch, key, lambda out: weights_of(context, state, out)
        )
        new = descent.descend_weighted(context, state, grads, out, weights, batch, key)
        method, skipped = observe(context, state.method, out)
        return new._replace(method=method), descent.loss_metrics(out, weights) | {"skipped": skipped}

    return Method(init, inner, weights=evaluation.reported(weights_of, from_losses=True))
