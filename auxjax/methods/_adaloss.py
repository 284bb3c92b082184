"""AdaLoss: weights of tasks inversely proportional to their mean losses.

    w_k = total * (1 / m_k) / sum_j (1 / m_j),      m_k = running mean of L_k

so that all tasks contribute alike; equivalently, the geometric mean of the losses is minimised, d/dtheta sum_k log L_k.

Reference: Hu, Dey, Hebert, Bagnell, 2019, Learning Anytime Predictions in Neural Networks via Adaptive Loss Balancing.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
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
      batch keeps its mean; before the first one its mean counts as 1.

    Raises:
      ValueError: an impossible option; a name in `shift` that is no task (when the state is made).
    """
    if form not in ("normalised", "log_auxiliary"):
        raise ValueError(f"adaloss(form={form!r}): expected 'normalised' or 'log_auxiliary'.")
    if not checks.is_traced(decay, epsilon) and (not 0 <= decay < 1 or not epsilon > 0):
        raise ValueError(f"adaloss(decay={decay}, epsilon={epsilon}): expected 0 <= decay < 1 and epsilon > 0.")
    options = _Options(form == "normalised", decay, shift, epsilon)

    def weights(context, state, batch, key):
        out = evaluation.evaluate(context.model, state.params, state.model_state, batch, key)
        observed = _observe(options, context, state.method, out)
        return descent.constant_weights(_weights_of(options, context, sorted(out.values), observed), out)

    return Method(partial(_init, options), partial(_inner, options), weights=weights)


class _Options(NamedTuple):
    normalised: bool
    decay: float
    shift: float | dict[str, float]
    epsilon: float


def _init(options, context, state, batch, key):
    out = evaluation.loss_shapes(context, state, batch, key)
    evaluation.auxiliary_or_raise("adaloss", context, out)
    if isinstance(options.shift, dict) and set(options.shift) - set(out.values):
        unknown = sorted(set(options.shift) - set(out.values))
        raise ValueError(f"adaloss(shift=) names {unknown[0]!r}; the model has the tasks {sorted(out.values)}.")
    zeros = jnp.zeros(len(out.values), accumulation_dtype(*out.values.values()))
    return AdalossState(zeros, zeros)


def _inner(options, context, state, batch, key):
    def weights_of(out):
        return _weights_of(options, context, sorted(out.values), _observe(options, context, state.method, out))

    grads, out, weights = descent.weighted_gradient(context, state, batch, key, weights_of)
    method = _observe(options, context, state.method, out)
    return descent.descend(context, state, grads, out.state)._replace(method=method), descent.loss_metrics(out, weights)


def _observe(options, context, previous, out) -> AdalossState:
    """The running means after a batch."""
    tasks = sorted(out.values)
    shift = options.shift if isinstance(options.shift, dict) else dict.fromkeys(tasks, options.shift)
    dtype = previous.means.dtype
    found = context.reduce(evaluation.mean_losses(out, tasks)).astype(dtype)
    found = found + jnp.array([shift.get(task, 0.0) for task in tasks], dtype)
    seen = evaluation.labelled(context, out, tasks)
    means = options.decay * previous.means + (1 - options.decay) * found
    counts = options.decay * previous.counts + (1 - options.decay)
    return AdalossState(jnp.where(seen, means, previous.means), jnp.where(seen, counts, previous.counts))


def _weights_of(options, context, tasks, method_state):
    means, counts = method_state
    known = counts > 0
    level = jnp.where(known, means / jnp.where(known, counts, jnp.ones_like(counts)), jnp.ones_like(means))
    inverse = 1.0 / (jnp.maximum(level, 0.0) + options.epsilon)
    if not options.normalised:
        return {**evaluation.by_task(tasks, inverse), context.model.primary: 1.0}
    return evaluation.by_task(tasks, len(tasks) * inverse / jnp.sum(inverse))
