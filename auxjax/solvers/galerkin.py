"""The solution of a linear system within a subspace of a few vectors, as the start of an iteration.

    x = W y,    W^T (A + damping I) W y = W^T b

Of all combinations of the vectors W this is, for a symmetric positive definite matrix, the one nearest to the solution
in the energy norm. Along a sequence of systems that change slowly, with the last solution and its last changes as W,
it leaves less to do than the last solution alone.

Not for: large subspaces; every vector costs a product with A.

Reference: Fischer, 1998, Projection Techniques for Iterative Solution of Ax = b with Successive Right-Hand Sides.
"""

import jax
import jax.numpy as jnp

from auxjax._internal import checks, tree_math
from auxjax._internal.safe_math import positive_or_one
from auxjax.interface import PyTree
from auxjax.solvers import base


def galerkin(matvec: base.Matvec, b: PyTree, directions: list[PyTree], *, damping: float = 0.0) -> PyTree:
    """Solves `(A + damping I) x = b` within the span of some directions.

    Args:
      matvec: linear function `x -> A x` of pytrees like `b`.
      b: pytree of floating arrays.
      directions: m pytrees like `b`, the first of them the best guess there is. Zero, dependent and nearly dependent
        ones do no harm; those that are not finite, or whose product is not, count as zero.
      damping: multiple of the identity added to A.

    Returns:
      A pytree like `b` in its dtypes: the Galerkin solution, or the first direction. That is taken where the Galerkin
      solution is not finite, and where its residual is the larger one: on a span on which the matrix is positive
      definite, ten times larger, since there the energy norm and not the residual tells what is nearer.

      Cost: m products, and memory for 2 m pytrees like `b`.

    Raises:
      TypeError, ValueError: as any solver, about `matvec` and `b`; `directions` that is empty or not like `b`.
    """
    if not directions:
        raise ValueError("galerkin(directions=) is empty; expected at least one pytree like b.")
    for number, direction in enumerate(directions):
        checks.like(f"galerkin(directions=)[{number}]", direction, b, "b")
    checks.number("galerkin", least=0, known=True, damping=damping)
    system = base.make_system("galerkin", matvec, b, None, None)
    vectors, sizes = zip(*[_unit(tree_math.cast_like(direction, system.b)) for direction in directions], strict=True)
    products = [tree_math.add_scaled(system.matvec(vector), damping, vector) for vector in vectors]
    # In units of ||b||, and of the square root of each product's norm: neither scale nor stiffness decides what is
    # dependent.
    norm = positive_or_one(system.norm)
    right = tree_math.scale(1.0 / norm, system.b)
    lengths = jnp.stack([tree_math.norm(product) for product in products])
    known = (lengths > 0) & jnp.isfinite(lengths)
    products = [
        jax.tree.map(lambda leaf, usable=usable: jnp.where(usable, leaf, jnp.zeros_like(leaf)), product)
        for usable, product in zip(known, products, strict=True)
    ]
    units = jnp.where(known, 1.0 / jnp.sqrt(jnp.where(known, lengths, jnp.ones_like(lengths))), jnp.zeros_like(lengths))
    matrix = jnp.stack([jnp.stack([tree_math.vdot(w, p) for p in products]) for w in vectors])
    matrix = units[:, None] * matrix * units[None, :]
    cutoff = 10 * len(vectors) * float(jnp.finfo(matrix.dtype).eps)
    inverse = jnp.linalg.pinv(matrix, rtol=cutoff)

    def solve(residual):
        h = units * jnp.stack([tree_math.vdot(w, residual) for w in vectors])
        return units * jnp.sum(inverse * h[None, :], axis=1)

    def left(coefficients):
        return tree_math.add_scaled(right, -1.0, tree_math.combine(coefficients, products))

    y = solve(right)
    y = y + solve(left(y))  # nearly dependent vectors cost digits, which this brings back
    x = system.restore(tree_math.combine(norm * y, vectors))
    first = jax.tree.map(lambda leaf: jnp.where(sizes[0] > 0, leaf, jnp.zeros_like(leaf)), directions[0])
    definite = jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[0] >= -cutoff
    allowed = tree_math.norm(left(jnp.zeros_like(y).at[0].set(sizes[0] / norm))) * jnp.where(definite, 10.0, 1.0)
    taken = tree_math.all_finite(x) & (tree_math.norm(left(y)) <= allowed)
    return tree_math.select(taken, x, tree_math.cast_like(first, x))


def _unit(x):
    """`(x / ||x||, ||x||)`, and 0 for what is 0 or not finite."""
    size = tree_math.norm(x)
    usable = jnp.isfinite(size) & (size > 0)
    inverse = 1.0 / jnp.where(usable, size, jnp.ones_like(size))
    unit = jax.tree.map(lambda leaf: jnp.where(usable, leaf * inverse, jnp.zeros_like(leaf)), x)
    return unit, jnp.where(usable, size, jnp.zeros_like(size))
