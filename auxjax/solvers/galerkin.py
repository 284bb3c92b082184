"""The solution of a linear system within a subspace of a few vectors, as the start of an iteration.

    x = W y,    (W^T A W) y = W^T b

Of all combinations of the vectors W this is, for a symmetric positive definite A, the one nearest to the solution in
the energy norm. Along a sequence of systems that change slowly, with the last few solutions as W, it leaves less to do
than the last solution alone.

Not for: large subspaces; every vector costs a product with A.

Reference: Fischer, 1998, Projection Techniques for Iterative Solution of Ax = b with Successive Right-Hand Sides.
"""

import jax
import jax.numpy as jnp

from auxjax import tree_math
from auxjax.solvers import base


def galerkin(matvec, b, directions: list):
    """Solves A x = b within the span of some directions.

    Args:
      matvec: linear function `x -> A x` of pytrees like `b`.
      b: pytree of floating arrays.
      directions: m pytrees like `b`. Zero and dependent ones do no harm; those of decreasing importance first round
        best.

    Returns:
      A pytree like `b` in its dtypes. Zero where that is nearer to solving the system than the Galerkin solution is,
      which happens when A is not positive definite, and where the Galerkin solution is not finite.

      Cost: m products, and memory for 2 m pytrees like `b`.

    Raises:
      TypeError, ValueError: as any solver, about `matvec` and `b`; `directions` that is empty or not like `b`.
    """
    if not directions:
        raise ValueError("galerkin(directions=) is empty; wanted at least one pytree like b.")
    for number, direction in enumerate(directions):
        base.check_like(f"galerkin(directions=)[{number}]", direction, b, "b")
    system = base.make_system("galerkin", matvec, b, None, None)
    vectors = [_unit(tree_math.cast_like(direction, system.b)) for direction in directions]
    products = [system.matvec(vector) for vector in vectors]
    # The right-hand side in units of its norm: coefficients neither overflow nor underflow.
    size = jnp.where(system.norm > 0, system.norm, jnp.ones_like(system.norm))
    unit = tree_math.scale(1.0 / size, system.b)
    matrix = jnp.stack([jnp.stack([tree_math.vdot(w, p) for p in products]) for w in vectors])
    right = jnp.stack([tree_math.vdot(w, unit) for w in vectors])
    largest = jnp.max(jnp.abs(matrix))
    usable = jnp.isfinite(largest) & (largest > 0)
    scale = jnp.where(usable, largest, jnp.ones_like(largest))
    safe = jnp.where(usable, matrix / scale, jnp.eye(len(vectors), dtype=matrix.dtype))
    cutoff = 10 * len(vectors) * float(jnp.finfo(matrix.dtype).eps)
    coefficients = jnp.linalg.pinv(safe, rtol=cutoff) @ right / scale
    left = tree_math.add_scaled(unit, -1.0, tree_math.combine(coefficients, products))
    better = usable & (tree_math.norm(left) <= 1)
    x = tree_math.combine(size * coefficients, vectors)
    return system.restore(jax.tree.map(lambda leaf: jnp.where(better, leaf, jnp.zeros_like(leaf)), x))


def _unit(x):
    """`x / ||x||`, and 0 for 0."""
    size = tree_math.norm(x)
    return tree_math.scale(1.0 / jnp.where(size > 0, size, jnp.ones_like(size)), x)
