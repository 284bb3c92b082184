"""Dynamic weight average: weights from how fast each task's loss falls.

    w_k = (1 + K) softmax_k(r_k / T),      r_k = L_k(t - 1) / L_k(t - 2)

with L_k(t) the mean loss over window t, an epoch in the paper. A task whose loss falls slowly gets more weight.

Reference: Liu, Johns, Davison, 2019, End-to-End Multi-Task Learning with Attention, equation 7.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from auxjax.methods import base
from auxjax.precision import accumulation_dtype


class DwaState(NamedTuple):
    """State of DWA.

    Attributes:
      sums: `{task: scalar}`, sum of the batch losses in the window under way.
      counts: `{task: scalar}`, batches with labels in it.
      last: `{task: scalar}`, mean loss of the last full window; 0 before there is one.
      ratios: `{task: scalar}`, r_k; 1 in the first two windows.
      updates: int32 scalar, updates done.
    """

    sums: dict[str, jax.Array]
    counts: dict[str, jax.Array]
    last: dict[str, jax.Array]
    ratios: dict[str, jax.Array]
    updates: jax.Array


def dwa(*, window: int = 100, temperature: float = 2.0) -> base.Method:
    """Weights from the rate at which the losses fall.

    Args:
      window: updates over which a loss is averaged; the paper's is an epoch.
      temperature: T; large values give equal weights.

    Returns:
      A `Method` without an outer level. Cost: one gradient of the joint loss. All weights are 1 in the first two
      windows, and a task whose last means are not both positive (unlabelled so far, or a loss that goes negative)
      has the ratio 1.

    Raises:
      ValueError: an impossible option; no auxiliary task (when the state is made).
    """
    if not isinstance(window, int) or window < 1 or not temperature > 0:
        raise ValueError(
            f"dwa(window={window}, temperature={temperature}): wanted a whole number >= 1 and a number > 0."
        )

    def weights(context, state, batch, key):
        return base.constant_weights(
            _weights_of(temperature, state.method), base.loss_shapes(context, state, batch, key)
        )

    return base.Method(_init, partial(_inner, window, temperature), weights=weights)


def _init(context, state, batch, key):
    out = base.loss_shapes(context, state, batch, key)
    base.auxiliary_or_raise("dwa", context, out)

    def constant(value):
        return {task: jnp.full((), value, accumulation_dtype(losses)) for task, losses in out.values.items()}

    return DwaState(constant(0.0), constant(0.0), constant(0.0), constant(1.0), jnp.zeros((), jnp.int32))


def _weights_of(temperature, method_state):
    tasks = list(method_state.ratios)
    ratios = jnp.stack([method_state.ratios[task] for task in tasks])
    weights = len(tasks) * jax.nn.softmax(ratios / temperature)
    return dict(zip(tasks, weights, strict=True))


def _inner(window, temperature, context, state, batch, key):
    weights = _weights_of(temperature, state.method)
    grads, out, _ = base.weighted_gradient(context, state, batch, key, lambda out: weights)
    method = _observe(window, context, state.method, out)
    metrics = base.loss_metrics(out, weights)
    return base.descend(context, state, grads, out.state)._replace(method=method), metrics


def _observe(window, context, previous, out) -> DwaState:
    """The state after a batch; the window may have ended with it."""
    updates = previous.updates + jnp.int32(1)
    full = updates % window == 0
    means = context.reduce(base.mean_losses(out))
    sums, counts, last, ratios = {}, {}, {}, {}
    for task, total in previous.sums.items():
        seen = base.labelled(context, out, task)
        total = total + jnp.where(seen, means[task].astype(total.dtype), jnp.zeros_like(total))
        count = previous.counts[task] + seen.astype(total.dtype)
        mean = total / jnp.maximum(count, 1.0)
        before = previous.last[task]
        usable = (before > 0) & (mean > 0)
        ratio = jnp.where(usable, mean / jnp.where(usable, before, jnp.ones_like(before)), jnp.ones_like(mean))
        sums[task], counts[task] = (jnp.where(full, jnp.zeros_like(value), value) for value in (total, count))
        last[task] = jnp.where(full & (count > 0), mean, before)
        ratios[task] = jnp.where(full, ratio, previous.ratios[task])
    return DwaState(sums, counts, last, ratios, updates)
