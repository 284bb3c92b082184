"""Dynamic weight average: weights from how fast each task's loss falls.

    w_k = (1 + K) softmax_k(r_k / T),      r_k = L_k(t - 1) / L_k(t - 2)

with L_k(t) the mean loss over window t, an epoch in the paper. A task whose loss falls slowly gets more weight.

Reference: Liu, Johns, Davison, 2019, End-to-End Multi-Task Learning with Attention, equation 7.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import descent, evaluation


class DwaState(NamedTuple):
    """State of DWA, the tasks in the order of their names.

    Attributes:
      sums: `[K + 1]`, sums of the batch losses in the window under way.
      counts: `[K + 1]`, batches with labels in it.
      last: `[K + 1]`, mean losses of the last full window; 0 before there is one.
      ratios: `[K + 1]`, r_k; 1 in the first two windows.
      updates: int32 scalar, updates done.
    """

    sums: jax.Array
    counts: jax.Array
    last: jax.Array
    ratios: jax.Array
    updates: jax.Array


@register("statistics of losses", needs={"auxiliary"})
def dwa(*, window: int = 100, temperature: float = 2.0) -> Method:
    """Weights from the rate at which the losses fall.

    Args:
      window: updates over which a loss is averaged; the paper's is an epoch.
      temperature: T; large values give equal weights.

    Returns:
      A `Method` without an outer level. Cost: one gradient of the joint loss. All weights are 1 in the first two
      windows, and a task whose last means are not both positive (unlabelled so far, or a loss that goes negative)
      has the ratio 1. A window without a label of a task leaves its ratio as it is, and a
      batch loss that is not finite is left out (`skipped` counts them).

    Raises:
      TypeError, ValueError: an impossible option; no auxiliary task (when the state is made).
    """
    checks.count("dwa", 1, window=window)
    checks.number("dwa", above=0, temperature=temperature)

    def weights_of(context, state, out):
        tasks = sorted(out.values)
        return evaluation.by_task(tasks, len(tasks) * jax.nn.softmax(state.method.ratios / temperature))

    def inner(context, state, batch, key):
        grads, out, weights = descent.weighted_gradient(
            context, state, batch, key, lambda out: weights_of(context, state, out)
        )
        new = descent.descend_weighted(context, state, grads, out, weights, batch, key)
        method, skipped = _observe(window, context, state.method, out)
        return new._replace(method=method), descent.loss_metrics(out, weights) | {"skipped": skipped}

    return Method(_init, inner, weights=evaluation.reported(weights_of))


def _init(context, state, batch, key):
    out = evaluation.loss_shapes(context, state, batch, key)
    evaluation.auxiliary_or_raise("dwa", context, out)
    zeros = jnp.zeros(len(out.values), accumulation_dtype(*out.values.values()))
    return DwaState(zeros, zeros, zeros, jnp.ones_like(zeros), jnp.zeros((), jnp.int32))


def _observe(window, context, previous, out) -> tuple[DwaState, jax.Array]:
    """The state after a batch, with which the window may have ended, and how many losses were left out."""
    tasks = sorted(out.values)
    updates = previous.updates + jnp.int32(1)
    full = updates % window == 0
    means, seen, skipped = evaluation.observed(context, out, tasks)
    total = previous.sums + jnp.where(seen, means, jnp.zeros_like(means)).astype(previous.sums.dtype)
    count = previous.counts + seen.astype(total.dtype)
    mean = total / jnp.maximum(count, 1.0)
    usable = (previous.last > 0) & (mean > 0)
    ratio = jnp.where(usable, mean / jnp.where(usable, previous.last, jnp.ones_like(mean)), jnp.ones_like(mean))
    state = DwaState(
        sums=jnp.where(full, jnp.zeros_like(total), total),
        counts=jnp.where(full, jnp.zeros_like(count), count),
        last=jnp.where(full & (count > 0), mean, previous.last),
        ratios=jnp.where(full & (count > 0), ratio, previous.ratios),
        updates=updates,
    )
    return state, skipped
