"""Neumann series in which every term multiplies with another mini-batch's matrix.

    x_{k+1} = x_k + step (b - A_{k mod M} x_k - damping x_k),      x_0 = 0 (or the guess),      A = mean_i A_i

With independent mini-batches the mean of x_k is the k-th partial sum of the series of A: the expectation passes through
every step. A term costs one mini-batch, and the answer fluctuates about that sum, the less the smaller the step.

Not for: exact solutions; nothing here knows the residual of the mean matrix before the end.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from auxjax._internal import convolutions, tree_math
from auxjax._internal.safe_math import inverse_or_zero, positive_or_one
from auxjax.solvers import base

POWER_STEPS = 5  # p: the automatic step takes up to p products, and without fresh batches holds p + 1 vectors


def fresh_series(system: base.System, num_terms: int, step_size, damping: float, rtol: float, unroll):
    """Solves by a series with one mini-batch per term: `(x, SolveInfo)`.

    A step that would make x larger than 1 / eps of its first term, or not finite, is not taken.

    Args:
      system: from `base.make_system`, of an `Operator` with entries.
      num_terms: T, terms after the first.
      step_size: step, or `None` for one over the largest growth in 5 power steps, each with its own mini-batch.
      damping: multiple of the identity added to A.
      rtol: relative residual of the mean system up to which `converged` is True.
      unroll: terms per loop iteration.

    Reference: Agarwal, Bullins, Hazan, 2017, Second-Order Stochastic Optimization for Machine Learning in Linear Time
    (LiSSA), JMLR; Grazzi, Pontil, Salzo, 2021, Convergence Properties of Stochastic Hypergradients, AISTATS.
    """
    dtype, entry = system.norm.dtype, system.entry
    assert entry is not None
    step, spent = jnp.asarray(0 if step_size is None else step_size).astype(dtype), 0
    if step_size is None:
        spent = min(POWER_STEPS, num_terms + 1)
        step = _automatic_step(system, entry, spent, damping)
    step = jax.lax.stop_gradient(step)
    start, shift = system.start, 0
    if start is None:
        start, shift = tree_math.scale(step, system.b), 1
    limit = jnp.maximum(tree_math.norm(start), step * system.norm) / float(jnp.finfo(dtype).eps)

    def term(x, index):
        left = tree_math.add_scaled(system.b, -1.0, entry(x, index % system.count))
        left = tree_math.add_scaled(left, -damping, x) if damping else left
        new = tree_math.add_scaled(x, step, left)
        return tree_math.select(tree_math.norm(new) <= limit, new, x), None  # False for NaN

    order = jnp.arange(num_terms + 1 - shift, dtype=jnp.int32)
    x = start
    if order.size:  # scan refuses none while jit is disabled
        x = jax.lax.scan(convolutions.channels_last(term), start, order, unroll=unroll)[0]
    return system.restore(x), base.report(system, x, damping, rtol, spent + int(order.size))


def _automatic_step(system: base.System, entry: Callable, steps: int, damping: float):
    vector, bound = system.b, jnp.zeros_like(system.norm)
    size = tree_math.norm(vector)
    for index in range(steps):
        vector = tree_math.scale(1.0 / positive_or_one(size), vector)
        product = entry(vector, index % system.count)
        vector = tree_math.add_scaled(product, damping, vector) if damping else product
        size = tree_math.norm(vector)
        bound = jnp.maximum(bound, jnp.where(jnp.isfinite(size), size, jnp.full_like(size, math.inf)))
    return inverse_or_zero(bound)
