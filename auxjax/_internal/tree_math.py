"""Vector arithmetic on pytrees for the linear solvers, in at least float32.

    <x, y> = sum over leaves and entries of x_i y_i        ||x|| = m sqrt(sum (x_i / m)^2),  m = max |x_i|

Three things that the tree functions of optax leave open: scalars are cast to each leaf's dtype, so that trees of mixed
precision work under strict dtype promotion; products are multiplied and summed elementwise, never through a matrix unit
that rounds float32 to fewer bits; and norms neither overflow nor underflow, so that a loss multiplied by 1e-25 gives
the same iterates. The norm's derivative at 0 is 0 instead of NaN.

Not for: sums, casts and zeros, which `jax.tree.map` and `optax.tree` do.
"""

import jax
import jax.numpy as jnp

from auxjax._internal.precision import accumulation_dtype
from auxjax._internal.safe_math import positive_or_one


def upcast(tree):
    """Every leaf in the accumulation dtype of the whole tree: float64 if one leaf is, and float32 otherwise."""
    dtype = accumulation_dtype(tree)
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def cast_like(tree, like):
    """Every leaf of `tree` in the dtype of the leaf of `like` in its place."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def vdot(x, y) -> jax.Array:
    """Inner product `<x, y>`, a scalar of the trees' accumulation dtype."""
    dtype = accumulation_dtype(x, y)
    products = [
        jnp.sum(a.astype(dtype) * b.astype(dtype)) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    ]
    return sum(products, jnp.zeros((), dtype))


def norm(x) -> jax.Array:
    """Euclidean norm `||x||`; NaN or infinite when an entry is."""
    dtype = accumulation_dtype(x)
    peaks = [jnp.max(jnp.abs(leaf), initial=0).astype(dtype) for leaf in jax.tree.leaves(x)]
    peak = jax.lax.stop_gradient(jnp.max(jnp.stack(peaks)) if peaks else jnp.zeros((), dtype))
    unit = positive_or_one(peak)
    scaled = jax.tree.map(lambda leaf: leaf.astype(dtype) / unit, x)
    square = vdot(scaled, scaled)
    # Two selections, so that the derivative of the root is never taken at 0.
    root = jnp.sqrt(jnp.where(square == 0, jnp.ones((), dtype), square))
    return jnp.where(square == 0, jnp.zeros((), dtype), peak * root)


def scale(alpha, x):
    """`alpha x`."""
    return jax.tree.map(lambda a: jnp.asarray(alpha, a.dtype) * a, x)


def add_scaled(x, alpha, y):
    """`x + alpha y`."""
    return jax.tree.map(lambda a, b: a + jnp.asarray(alpha, a.dtype) * b, x, y)


def combine(coefficients, trees):
    """`sum_j coefficients[j] trees[j]` over a non-empty list of trees."""
    total = scale(coefficients[0], trees[0])
    for j in range(1, len(trees)):
        total = add_scaled(total, coefficients[j], trees[j])
    return total


def select(condition, x, y):
    """`x` where the scalar `condition` holds, else `y`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def all_finite(x) -> jax.Array:
    """Whether every entry is finite, a boolean scalar."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(x)]))
