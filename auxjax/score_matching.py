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

from auxjax.partition import partition
from auxjax.precision import accumulation_dtype


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

    Cost: K axpys. It needs the K gradients; where only the gradient in the weights is wanted, use
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
                f"{where}(task_grads) has a leaf of shape {jnp.shape(rest)}; wanted {wanted}, the {wanted[0]} tasks "
                "of weights first. jax.jacrev of the vector of auxiliary losses gives it so."
            )
        mixed = jnp.tensordot(weights.astype(dtype), jnp.asarray(rest, dtype), axes=1)
        total = total + jnp.sum(jnp.square(jnp.asarray(first, dtype) - mixed))
    return total


def task_gradient_products(losses_fn: Callable, params, direction, *, trunk=None) -> jax.Array:
    """Inner products of every task's gradient with one direction, without forming a single gradient.

    `<g_k, direction>` for all k: the derivative of the vector of losses along `direction`.

    Args:
      losses_fn: function of `params` to `[K + 1]` losses (any number of them).
      params: pytree.
      direction: pytree like `params`; leaves outside of the trunk are not looked at.
      trunk: pytree of bools like `params` or a prefix of it; only chosen leaves take part. None: all floating-point
        leaves.

    Returns:
      `[K + 1]`, in the dtype of the losses.

    Raises:
      TypeError: `losses_fn` does not return floating point, or `trunk` is not made of bools.
      ValueError: `losses_fn` does not return a vector, `direction` is not like `params`, or `trunk` chooses nothing.

    Cost: one forward-mode pass. Held fixed: the leaves outside of the trunk.
    """
    where = "task_gradient_products"
    if jax.tree.structure(direction) != jax.tree.structure(params):
        raise ValueError(
            f"{where}(direction) has another structure than params: {jax.tree.structure(direction)} against "
            f"{jax.tree.structure(params)}."
        )
    losses_of, selected, mask = _on_trunk(where, losses_fn, params, trunk)
    along, _ = partition(direction, mask)
    along = [jnp.asarray(step).astype(jnp.result_type(leaf)) for step, leaf in zip(along, selected, strict=True)]
    return jax.jvp(losses_of, (selected,), (along,))[1]


def score_matching_value_and_gradient(
    losses_fn: Callable, params, weights: jax.Array, *, trunk=None, reduce: Callable = lambda tree: tree
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

    Returns:
      `ScoreMatching(divergence, gradient, products, losses)`.

    Raises:
      TypeError: `losses_fn` does not return floating point, or `trunk` is not made of bools.
      ValueError: `losses_fn` does not return `[K + 1]`, `weights` is not `[K]`, or `trunk` chooses nothing.

    Cost: one reverse and one forward-mode pass, for any K. Held fixed: `params` (the gradient is the partial one in
    the weights) and, in every g_k, the leaves outside of the trunk.
    Reference: Shi et al., ARML (NeurIPS 2020), section 3.2.
    """
    where = "score_matching_value_and_gradient"
    weights = _check_weights(where, weights)
    losses_of, selected, _ = _on_trunk(where, losses_fn, params, trunk)
    # One linearisation serves both passes. Under jit a vjp and a jvp compile to the same program, as the compiler
    # merges their two evaluations of the losses; where nothing is jitted they take about 1.5 times as long.
    losses, push = jax.linearize(losses_of, selected)
    if losses.shape[0] != weights.shape[0] + 1:
        raise ValueError(
            f"{where}(losses_fn) returns {losses.shape[0]} losses for {weights.shape[0]} weights; wanted "
            f"{weights.shape[0] + 1}: the primary loss first, then one auxiliary loss per weight."
        )
    cotangent = jnp.concatenate([jnp.ones((1,), losses.dtype), -weights.astype(losses.dtype)])
    (residual,) = jax.linear_transpose(push, selected)(cotangent)
    residual = reduce(residual)  # before the products: they are linear in the gradients, and r is the global one
    products = reduce(push(residual))
    dtype = accumulation_dtype(residual)
    squares = [jnp.sum(jnp.square(leaf.astype(dtype))) for leaf in residual]
    divergence = jnp.sum(jnp.stack(squares))
    return ScoreMatching(divergence, (-2 * products[1:]).astype(weights.dtype), products, losses)


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


def _on_trunk(where: str, losses_fn: Callable, params, trunk):
    """The losses as a function of the chosen leaves, these leaves, and the mask that chose them."""
    if trunk is None:
        trunk = jax.tree.map(lambda leaf: bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating)), params)
    selected, merge = partition(params, trunk)

    def losses_of(leaves):
        losses = losses_fn(merge(leaves))
        shape = getattr(losses, "shape", None)
        if shape is None or len(shape) != 1:
            came = f"shape {shape}" if shape is not None else f"a {type(losses).__name__}"
            raise ValueError(
                f"{where}(losses_fn) returns {came}; wanted a vector of scalar losses, the primary one first. "
                "Use jnp.stack([primary, first_auxiliary, ...])."
            )
        if not jnp.issubdtype(losses.dtype, jnp.floating):
            raise TypeError(f"{where}(losses_fn) returns dtype {losses.dtype}; wanted floating point.")
        return losses

    return losses_of, [jnp.asarray(leaf) for leaf in selected], trunk


def _check_weights(where: str, weights) -> jax.Array:
    weights = jnp.asarray(weights)
    if weights.ndim != 1 or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(
            f"{where}(weights) has shape {weights.shape} and dtype {weights.dtype}; wanted floating point [K], one "
            "weight per auxiliary task and none for the primary task."
        )
    return weights
