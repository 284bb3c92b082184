"""ARML's objective, the Fisher divergence between primary and weighted auxiliary losses, and its gradient.

    D(w) = || r ||^2,    r = g_0 - sum_k w_k g_k,    dD/dw_k = -2 <g_k, r>

with g_0 the gradient of the primary loss in the parameters and g_k that of auxiliary loss k.

The K gradients are never formed. Every <g_k, r> is the derivative of loss k in the direction r, so one reverse pass
(cotangent (1, -w) on the vector of K + 1 losses) gives r, and one forward-mode pass along r gives all K + 1 products
together: the cost is that of about two gradients, whatever K is, and no second derivative is taken. The same products
in the direction g_0 or sum_k w_k g_k serve OL_AUX and the sign test of gradient cosine similarity.

Squared norms are sums of squares and never a norm squared, whose derivative at 0 is NaN.

Not for: divergences between distributions that are only known through samples (score matching in Hyvarinen's sense),
and per-example weights, which need one loss per example in `losses_fn`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from auxjax._internal.precision import accumulation_dtype
from auxjax.formulas.task_gradients import squared_norms, task_gradients


class ScoreMatching(NamedTuple):
    """What one reverse and one forward-mode pass tell about the task weights.

    Attributes:
      divergence: scalar, `|| g_0 - sum_k w_k g_k ||^2`.
      gradient: `[K]`, the derivative of `divergence` in the weights.
      products: `[K + 1]`, `<g_k, r>` for the primary task and then the auxiliary tasks.
      losses: `[K + 1]`, the losses themselves.
    """

    divergence: jax.Array
    gradient: jax.Array
    products: jax.Array
    losses: jax.Array


def fisher_divergence(primary_grad, task_grads, weights: jax.Array) -> jax.Array:
    """Squared gap between the primary gradient and the weighted auxiliary gradients.

    `|| g_0 - sum_k w_k g_k ||^2`, summed over all leaves.

    Args:
      primary_grad: pytree, g_0.
      task_grads: pytree like `primary_grad` whose leaves have a leading axis of length K.
      weights: `[K]`.

    Returns:
      A scalar, in float64 if an argument is, and in float32 otherwise.

    Raises:
      ValueError: `weights` is not of rank 1, the two pytrees differ, or a leaf has another shape than (K, ...).

    Cost: K axpys. It needs the K gradients; where only the gradient in the weights is needed, use
    `score_matching_gradient`, which does not.
    Reference: Shi et al., ARML (NeurIPS 2020), the last objective of section 3.2.
    """
    where = "fisher_divergence"
    weights = _check_weights(where, weights)
    if jax.tree.structure(primary_grad) != jax.tree.structure(task_grads):
        raise ValueError(
            f"{where}(task_grads) has another structure than primary_grad: {jax.tree.structure(task_grads)} against "
            f"{jax.tree.structure(primary_grad)}."
        )
    dtype = accumulation_dtype(primary_grad, task_grads, weights)
    total = jnp.zeros((), dtype)
    for first, rest in zip(jax.tree.leaves(primary_grad), jax.tree.leaves(task_grads), strict=True):
        wanted = (weights.shape[0], *jnp.shape(first))
        if jnp.shape(rest) != wanted:
            raise ValueError(
                f"{where}(task_grads) has a leaf of shape {jnp.shape(rest)}; expected {wanted}, the {wanted[0]} tasks "
                "of weights first. jax.jacrev of the vector of auxiliary losses gives it so."
            )
        mixed = jnp.tensordot(weights.astype(dtype), jnp.asarray(rest, dtype), axes=1)
        total = total + jnp.sum(jnp.square(jnp.asarray(first, dtype) - mixed))
    return total


def score_matching_value_and_gradient(
    losses_fn: Callable,
    params,
    weights: jax.Array,
    *,
    trunk=None,
    reduce: Callable = lambda tree: tree,
    products: str = "forward",
    normalise: bool = False,
    chunk: int = 8,
) -> ScoreMatching:
    """The Fisher divergence, its gradient in the task weights, and the products behind it, at the cost of the latter.

    `D = ||r||^2`, `dD/dw_k = -2 <g_k, r>` with `r = g_0 - sum_j w_j g_j`.

    Args:
      losses_fn: function of `params` to `[K + 1]` losses, the primary one first.
      params: pytree.
      weights: `[K]`, the weights of the auxiliary losses.
      trunk: pytree of bools like `params` or a prefix of it; only chosen leaves enter the gradients. None: all
        floating-point leaves. Heads belong outside: one task's head gets nothing from the others.
      reduce: pytree -> pytree, the mean over replicas that each see a part of the batch, applied to r and to the
        products with it; the identity everywhere but inside a pmapped step.
      products: "forward" or "reverse", as `task_gradients` has it.
      normalise: divide every gradient, g_0 too, by its length, so that directions alone are compared; a gradient of 0
        stays 0. Without it a task looks near to the primary one whose gradient is short.
      chunk: gradients that are in memory at a time with `normalise`.

    Returns:
      `ScoreMatching(divergence, gradient, products, losses)`, with `normalise` those of the divided gradients.

    Raises:
      TypeError: `losses_fn` does not return floating point, or `trunk` is not made of bools.
      ValueError: `losses_fn` does not return `[K + 1]`, `weights` is not `[K]`, or `trunk` chooses nothing.

    Cost: one reverse and one forward-mode pass, for any K; with `normalise` K + 1 reverse passes more. Held fixed:
    `params` (the gradient is the partial one in the weights) and, in every g_k, the leaves outside of the trunk.
    Reference: Shi et al., ARML (NeurIPS 2020), section 3.2.
    """
    where = "score_matching_value_and_gradient"
    weights = _check_weights(where, weights)
    tasks = task_gradients(losses_fn, params, trunk=trunk, reduce=reduce, where=where, products=products)
    count = tasks.losses.shape[0]
    if count != weights.shape[0] + 1:
        raise ValueError(
            f"{where}(losses_fn) returns {count} losses for {weights.shape[0]} weights; expected "
            f"{weights.shape[0] + 1}: the primary loss first, then one auxiliary loss per weight."
        )
    mixture = jnp.concatenate([jnp.ones((1,), weights.dtype), -weights])
    inverse_lengths = jnp.ones_like(mixture)
    if normalise:
        lengths = jnp.sqrt(squared_norms(tasks, chunk=chunk)).astype(weights.dtype)
        inverse_lengths = jnp.where(lengths == 0, 0.0, 1.0 / jnp.where(lengths == 0, 1.0, lengths))  # NaN stays NaN
    residual = tasks.combine(inverse_lengths * mixture)
    along = tasks.products(residual)
    along = inverse_lengths.astype(along.dtype) * along
    dtype = accumulation_dtype(residual)
    squares = [jnp.sum(jnp.square(leaf.astype(dtype))) for leaf in residual]
    divergence = jnp.sum(jnp.stack(squares))
    return ScoreMatching(divergence, (-2 * along[1:]).astype(weights.dtype), along, tasks.losses)


def score_matching_gradient(losses_fn: Callable, params, weights: jax.Array, *, trunk=None) -> jax.Array:
    """The gradient of the Fisher divergence in the task weights, at a cost that does not grow with their number.

    `dD/dw_k = -2 <g_k, g_0 - sum_j w_j g_j>`.

    Args:
      losses_fn: function of `params` to `[K + 1]` losses, the primary one first.
      params: pytree.
      weights: `[K]`, the weights of the auxiliary losses.
      trunk: as in `score_matching_value_and_gradient`.

    Returns:
      `[K]`, in the dtype of `weights`.

    Raises, cost, what is held fixed, reference: as `score_matching_value_and_gradient`.
    """
    return score_matching_value_and_gradient(losses_fn, params, weights, trunk=trunk).gradient


def _check_weights(where: str, weights) -> jax.Array:
    weights = jnp.asarray(weights)
    if weights.ndim != 1 or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(
            f"{where}(weights) has shape {weights.shape} and dtype {weights.dtype}; expected floating point [K], one "
            "weight per auxiliary task and none for the primary task."
        )
    return weights
