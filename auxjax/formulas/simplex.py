"""Constraining task weights to the simplex {w >= 0, sum w = total}: projection, ARML's shortcut, and exact minimiser.

- `project_simplex`: the nearest point, for weights that a gradient step has carried outside.
- `keep_on_simplex`: the same as the last part of an optimiser, for any method whose outer variables are weights.
- `shift_and_clamp`: what the public code of ARML does instead; not a projection, and its sum can exceed the total.
- `simplex_quadratic_program`: the weights that minimise a quadratic, in one go. ARML's divergence
  `|| g_0 - sum_k w_k g_k ||^2` is one, so that for few tasks no gradient steps on the weights are needed at all.

`optax.projections.projection_simplex` computes the same projection but sums the entries as they come: a large common
offset or one huge entry costs it its digits, and it mixes integer and floating dtypes, which strict promotion refuses.
"""

import functools
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype


def project_simplex(weights, total):
    """Exact Euclidean projection on the simplex of a given sum.

    `argmin_p || p - w ||^2` subject to `p >= 0`, `sum p = total`: `p = max(w - tau, 0)` with the one threshold tau that
    gives the sum.

    Args:
      weights: `[K]`, or any pytree of floating-point arrays: then all entries together sum to `total`.
      total: scalar > 0.

    Returns:
      Like `weights`. Entries outside of the support are exactly 0. Where `weights` has a NaN, or +inf, all are NaN.

    Raises:
      TypeError: a leaf is not floating point.
      ValueError: `total` is a Python number <= 0, or `weights` has no entries.

    Cost: one sort, O(K log K). Differentiable in both arguments: with s the indicator of the support,
    `dp = s * (dw - mean over the support of dw) + s * dtotal / |support|`; on the border of the support, where the
    projection has a kink, that of the smaller support.
    Reference: Held, Wolfe and Crowder (1974); Duchi et al. (ICML 2008), figure 1.
    """
    where = "project_simplex"
    _check_total(where, total)
    flat, restore = _ravel(where, weights)
    return restore(_project(flat, jnp.asarray(total).astype(flat.dtype)))


def keep_on_simplex(total, held: Callable[[str], bool] = lambda path: False) -> optax.GradientTransformation:
    """The last part of an optimiser of weights: they stay on the simplex of a given sum, with exact zeros.

    `u <- project_simplex(w + u) - w`, as `optax.keep_params_nonnegative` does for the positive orthant:

        weights = optax.chain(optax.adam(0.1), auxjax.keep_on_simplex(3.0, held=lambda path: path == "digit"))
        method = auxjax.methods.get("auxilearn", outer_optimizer=weights)

    Args:
      total: scalar > 0, the sum of all weights that are not held; the first update brings them there.
      held: predicate on the path of a leaf ("digit", "a/b"): these stay where they are, such as the primary task's.

    Raises:
      TypeError: a leaf is not floating point.
      ValueError: `total` is a Python number <= 0; everything is held; no weights beside their updates.

    Cost: one sort. Reference: as `project_simplex`.
    """
    where = "keep_on_simplex"
    _check_total(where, total)
    checks.function(where, "a function of a leaf's path", held=held)

    def update(updates, weights):
        if weights is None:
            raise ValueError(f"{where}: expected the weights beside their updates, update(updates, state, params).")
        at, tree = jax.tree_util.tree_flatten_with_path(weights)
        stays = [held(jax.tree_util.keystr(path, simple=True, separator="/")) for path, _ in at]
        if all(stays):
            names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in at]
            raise ValueError(f"{where}(held=): expected some weights that are not held, got all of {names}.")
        pairs = list(zip(stays, [leaf for _, leaf in at], jax.tree.leaves(updates), strict=True))
        moved = iter(project_simplex([leaf + step for stay, leaf, step in pairs if not stay], total))
        steps = [jnp.zeros_like(step) if stay else next(moved) - leaf for stay, leaf, step in pairs]
        return jax.tree.unflatten(tree, steps)

    return optax.stateless(update)


def shift_and_clamp(weights: jax.Array, total) -> jax.Array:
    """Shifts all weights alike so that they sum to the total, then sets negative ones to 0.

    `max(w + (total - sum w) / K, 0)`. It agrees with `project_simplex` as long as no weight is clamped; otherwise the
    sum comes out larger than `total`: (2.5, -0.5) with total 2 gives (2.5, 0). Kept to reproduce ARML's public code.

    Args:
      weights: `[K]`, or any pytree of floating-point arrays: then all entries together are shifted.
      total: scalar > 0.

    Returns:
      Like `weights`, non-negative, with a sum >= `total`.

    Raises:
      TypeError: a leaf is not floating point.
      ValueError: `total` is a Python number <= 0, or `weights` has no entries.
    """
    where = "shift_and_clamp"
    _check_total(where, total)
    flat, restore = _ravel(where, weights)
    shift = jnp.asarray(total).astype(flat.dtype) / flat.size - jnp.mean(flat)
    return restore(jax.nn.relu(flat + shift))


def simplex_quadratic_program(gram: jax.Array, linear: jax.Array, total, *, max_steps: int = 60) -> jax.Array:
    """Exact minimiser of a convex quadratic over the simplex, for up to a few hundred weights.

    `argmin_w w^T G w - 2 b^T w` subject to `w >= 0`, `sum w = total`. With `G_kj = <g_k, g_j>` and `b_k = <g_0, g_k>`
    it minimises ARML's `|| g_0 - sum_k w_k g_k ||^2`.

    An interior-point method finds which weights are positive, whatever the conditioning of G; Newton steps on those
    weights alone then take the solution to rounding error (about 1e-12 relative in float64, 1e-5 in float32). Where
    several weights are optimal (G singular, e.g. two tasks with the same gradient) it returns a point in the middle of
    the optimal set.

    Args:
      gram: `[K, K]`, symmetric positive semi-definite; only its symmetric part is used.
      linear: `[K]`.
      total: scalar > 0.
      max_steps: largest number of interior-point steps; 10 to 25 are usual and it stops by itself.

    Returns:
      `[K]`, in the dtype of `linear`. NaN where an argument is not finite.

    Raises:
      ValueError: shapes do not fit, `max_steps` < 1, or `total` is a Python number <= 0.
      TypeError: `gram` or `linear` is not floating point.

    Cost: one K x K Cholesky factorisation per step. Differentiable in all three arguments with the support held fixed,
    which is the derivative wherever no weight is about to enter or leave.
    Reference: Mehrotra (1992); Nocedal and Wright (2006), algorithm 16.4.
    """
    where = "simplex_quadratic_program"
    _check_total(where, total)
    gram, linear = jnp.asarray(gram), jnp.asarray(linear)
    if linear.ndim != 1 or linear.shape[0] < 1 or gram.shape != (linear.shape[0], linear.shape[0]):
        raise ValueError(
            f"{where} got gram of shape {gram.shape} and linear of shape {linear.shape}; expected [K, K] "
            "and [K] with K >= 1."
        )
    if not (jnp.issubdtype(gram.dtype, jnp.floating) and jnp.issubdtype(linear.dtype, jnp.floating)):
        raise TypeError(
            f"{where} got gram of dtype {gram.dtype} and linear of dtype {linear.dtype}; expected floating point."
        )
    checks.count(where, 1, max_steps=max_steps)
    dtype = accumulation_dtype(gram, linear)
    total = jnp.asarray(total).astype(dtype)
    weights = _minimise(gram.astype(dtype), linear.astype(dtype), total, max_steps)
    return weights.astype(linear.dtype)


@functools.partial(jax.jit, static_argnums=3)
def _minimise(gram: jax.Array, linear: jax.Array, total: jax.Array, max_steps: int) -> jax.Array:
    """`simplex_quadratic_program` in one dtype; compiled as a whole, since op by op it is a hundred small programs."""
    dtype = linear.dtype
    # In the unknown x = w / total, and with the largest coefficient scaled to 1, nothing below depends on units.
    gram = (gram + gram.T) * jnp.square(total)
    linear = 2 * linear * total
    size = jax.lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(gram)), jnp.max(jnp.abs(linear))))
    size = jnp.where(size == 0, jnp.ones((), dtype), size)
    gram, linear = gram / size, linear / size
    inside, slack = _interior_point(*jax.lax.stop_gradient((gram, linear)), max_steps)
    polished = _polish(gram, linear, inside, inside > slack)
    # The wrong support can only come from a support that is not clear-cut; there the interior point is the better one.
    errors = [_optimality_error(gram, linear, _project(x, jnp.ones((), dtype))) for x in (inside, polished)]
    best = jnp.where(errors[1] <= errors[0], jax.lax.stop_gradient(polished), inside)
    best = best + (polished - jax.lax.stop_gradient(polished))
    return total * _project(best, jnp.ones((), dtype))


@jax.custom_jvp
def _project(values: jax.Array, total: jax.Array) -> jax.Array:
    """Projection of `[K]` on the simplex of sum `total`, in the dtype of `values`."""
    # The projection does not change when all entries are shifted alike, and entries that are `total` or more below the
    # largest are outside of the support: shifted and clipped, no entry is large, and no digit is lost to an offset.
    shifted = jnp.clip(values - jnp.max(values), -total, jnp.zeros_like(total))
    sizes = jnp.arange(1, values.shape[0] + 1).astype(values.dtype)
    descending = jnp.sort(shifted, descending=True)
    thresholds = (jnp.cumsum(descending) - total) / sizes
    # Exactly as many entries exceed their threshold as the support has; the first always does.
    count = jnp.maximum(jnp.sum(descending > thresholds), 1)
    result = jax.nn.relu(shifted - thresholds[count - 1])
    # One Newton step takes the sum from the rounding error of a long cumsum to that of a single sum.
    support = (result > 0).astype(values.dtype)
    excess = (jnp.sum(result) - total) / jnp.maximum(jnp.sum(support), jnp.ones((), values.dtype))
    result = jax.nn.relu(result - excess * support)
    return jnp.where(jnp.isfinite(jnp.max(values)), result, jnp.full_like(result, jnp.nan))


@_project.defjvp
def _project_jvp(primals, tangents):
    result = _project(*primals)
    values_dot, total_dot = tangents
    support = (result > 0).astype(result.dtype)
    count = jnp.maximum(jnp.sum(support), jnp.ones((), result.dtype))
    mean = (jnp.sum(support * values_dot) - total_dot) / count
    return result, support * (values_dot - mean)


def _interior_point(gram: jax.Array, linear: jax.Array, max_steps: int) -> tuple[jax.Array, jax.Array]:
    """Mehrotra's method for `min x^T Q x / 2 - c^T x` on the unit simplex; returns x and its multipliers, both > 0."""
    dtype, size = gram.dtype, linear.shape[0]
    one, eps = jnp.ones((), dtype), jnp.finfo(dtype).eps
    ridge = gram + size * eps * jnp.eye(size, dtype=dtype)  # a Gram matrix has eigenvalues down to -eps, not 0

    def direction(factor, x, s, dual, complement):
        """Newton direction for residuals of stationarity and of x * s; the sum constraint holds throughout."""
        solve = functools.partial(jax.scipy.linalg.cho_solve, (factor, True))
        free, ones = solve(complement / x - dual), solve(jnp.ones_like(x))
        dy = -jnp.sum(free) / jnp.sum(ones)
        dx = free + dy * ones
        return dx, (complement - s * dx) / x, dy

    def longest(value, change):
        """The largest step in (0, 1] along `change` that keeps `value` positive."""
        ratios = jnp.where(change < 0, -value / jnp.where(change < 0, change, -one), one)
        return jnp.minimum(one, jnp.min(ratios))

    def body(carry):
        step, x, s, y, _ = carry
        gap = jnp.mean(x * s)
        dual = gram @ x - linear - y - s
        factor = jnp.linalg.cholesky(ridge + jnp.diag(s / x))
        dx, ds, _ = direction(factor, x, s, dual, -x * s)
        affine_gap = jnp.mean((x + longest(x, dx) * dx) * (s + longest(s, ds) * ds))
        center = (affine_gap / gap) ** 3
        dx, ds, dy = direction(factor, x, s, dual, center * gap - x * s - dx * ds)
        along = 0.995 * jnp.minimum(longest(x, dx), longest(s, ds))
        moved = (x + along * dx, s + along * ds, y + along * dy)
        moved = (moved[0] / jnp.sum(moved[0]), *moved[1:])
        fine = jnp.all(jnp.array([jnp.all(jnp.isfinite(part)) for part in moved]))
        fine = fine & jnp.all(moved[0] > 0) & jnp.all(moved[1] > 0)
        x, s, y = (jnp.where(fine, new, old) for new, old in zip(moved, (x, s, y), strict=True))
        return step + 1, x, s, y, fine

    def go_on(carry):
        step, x, s, y, fine = carry
        error = jnp.maximum(jnp.sum(x * s), jnp.max(jnp.abs(gram @ x - linear - y - s)))
        return fine & (step < max_steps) & (error > eps)

    x = jnp.full((size,), 1 / size, dtype)
    gradient = gram @ x - linear
    y = jnp.min(gradient) - one  # so that every multiplier starts at 1 or above, on the scale of the problem
    start = (jnp.zeros((), jnp.int32), x, gradient - y, y, jnp.all(jnp.isfinite(gradient)))
    _, x, s, _, _ = jax.lax.while_loop(go_on, body, start)
    return jnp.where(jnp.all(jnp.isfinite(gradient)), x, jnp.full_like(x, jnp.nan)), s


def _polish(gram: jax.Array, linear: jax.Array, start: jax.Array, support: jax.Array) -> jax.Array:
    """Solves on the support, with the sum kept at 1, by three proximal Newton steps from a constant `start`.

    The ridge keeps each step solvable where G is singular on the support, and does not bias the limit. Since the last
    step starts from a constant, its derivative is that of the implicit function theorem.
    """
    dtype, size = gram.dtype, linear.shape[0]
    inside = support.astype(dtype)
    ridge = 8 * size * jnp.finfo(dtype).eps
    outside = jnp.diag(1 - inside)
    x = jax.lax.stop_gradient(start * inside)
    x = x / jnp.sum(x)
    matrix = inside[:, None] * gram * inside[None, :] + outside + ridge * jnp.diag(inside)
    factor = jax.scipy.linalg.cho_factor(matrix, lower=True)
    ones = jax.scipy.linalg.cho_solve(factor, inside)
    for _ in range(3):
        x = jax.lax.stop_gradient(x)
        free = jax.scipy.linalg.cho_solve(factor, inside * (linear - gram @ x))
        x = x + inside * (free - ones * (jnp.sum(free) / jnp.sum(ones)))
    return x


def _optimality_error(gram: jax.Array, linear: jax.Array, x: jax.Array) -> jax.Array:
    """Duality gap `x^T gradient - min gradient` of a feasible x: 0 at a minimiser and positive elsewhere."""
    gradient = gram @ x - linear
    return jax.lax.stop_gradient(jnp.sum(x * (gradient - jnp.min(gradient))))


def _ravel(where: str, tree):
    """All entries of a pytree as one vector wide enough to add up in, and the way back."""
    leaves, structure = jax.tree.flatten(tree)
    for leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"{where}(weights) has dtype {jnp.result_type(leaf)}; expected floating point.")
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    if not sum(leaf.size for leaf in leaves):
        raise ValueError(f"{where}(weights) has no entries; expected at least one weight.")
    dtype = accumulation_dtype(leaves)
    flat = jnp.concatenate([leaf.astype(dtype).ravel() for leaf in leaves])

    def restore(values):
        parts, at = [], 0
        for leaf in leaves:
            parts.append(values[at : at + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
            at += leaf.size
        return jax.tree.unflatten(structure, parts)

    return flat, restore


def _check_total(where: str, total) -> None:
    if jnp.ndim(total) != 0:
        raise ValueError(f"{where}(total=): expected one number > 0, got an array of shape {jnp.shape(total)}.")
    if isinstance(total, numbers.Real):
        checks.number(where, above=0, total=total)
