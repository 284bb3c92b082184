"""Krylov solvers of jaxopt for matrices that are not symmetric: normal equations, and stabilised biconjugate gradients.

    normal_cg   A^T A x = A^T b by conjugate gradients: always positive, condition number squared
    bicgstab    two short recurrences, two products per step, no quantity that is sure to fall

They are of use where `gmres` cannot keep its vectors. The one file of the library that imports jaxopt, when a solver is
made and not before. jaxopt runs the iteration and returns the solution alone; what is added here: a right-hand side of
unit length and a matrix of about unit size, so that nothing under- or overflows; a finite answer when the iteration
breaks down; the true residual; the number of products.

Not for: symmetric matrices (`cg`, `minres`).
"""

import warnings

import jax
import jax.numpy as jnp

from auxjax._internal import checks, convolutions, tree_math
from auxjax.interface import Key, PyTree
from auxjax.solvers import base, iteration


def jaxopt_linear_solve():
    """jaxopt's linear solvers; its notice that it is no longer maintained is the only warning held back."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="JAXopt is no longer maintained", category=DeprecationWarning)
        from jaxopt import linear_solve
    return linear_solve


def normal_cg(
    *, max_steps: int = 20, rtol: float = 1e-3, damping: float = 0.0, preconditioner: base.Matvec | None = None
) -> base.Solver:
    """Solver by conjugate gradients on the normal equations, through jaxopt.

    `x ~ argmin ||b - B x||`,  by  `B^T B x = B^T b`,  `B = A + damping I`, any A

    Squares the condition number: it needs as many steps on a matrix of condition 100 as `cg` on one of condition
    10,000. Stops when `||B^T (b - B x)|| <= rtol ||B^T b||`, or after `max_steps` steps; `converged`, as everywhere,
    is about `||b - B x||` itself, which may still be larger. Singular systems get a least-squares solution.

    Args:
      max_steps: most steps taken, each of two products.
      rtol: relative residual of the normal equations at which the iteration stops, and relative residual of the system
        up to which `converged` is True. 0 for all steps.
      damping: multiple of the identity added to A (not to A^T A).
      preconditioner: linear function, pytree like `b` -> the same, that approximates the inverse of `B^T B`; symmetric
        positive definite.

    Returns:
      `solve(matvec, b, *, init=None, key=None) -> (x, SolveInfo)`; `key` is not used. `min_curvature` is the Rayleigh
      quotient of the solution. Differentiable (another solve). `matvec` must be one that `jax.linear_transpose` can
      transpose, or an `Operator` with `transpose=`.
      Cost: 2 steps + 4 products with A or its transpose (A^T b, the initial residual, the true residual at the end).

    Raises:
      TypeError, ValueError: an option of the wrong type or out of range; a mean over replicas inside
        `matvec`, as with `BilevelProblem(reduce=)`, and no `transpose` with one (from the solve).

    Reference: Hestenes, Stiefel, 1952, Methods of Conjugate Gradients for Solving Linear Systems, section 10.
    """
    _check("normal_cg", max_steps, rtol, damping, preconditioner)
    solve_cg = jaxopt_linear_solve().solve_cg

    def solve(matvec: base.Matvec, b: PyTree, *, init: PyTree = None, key: Key | None = None):
        if isinstance(matvec, base.Operator) and matvec.averages and matvec.transpose is None:
            raise ValueError(
                "normal_cg needs products with the transposed matrix, which a problem with reduce= does not give. Use "
                "gmres or minres, or sharded arrays under jit without reduce=. An Operator of your own may give "
                "transpose=, with the mean over replicas inside."
            )
        system = base.as_vectors(base.make_system("normal_cg", matvec, b, init, key))

        def iterate(operator, right, guess):
            transpose = _transpose(operator, right)
            back = transpose(right)
            size = _positive(tree_math.norm(back))
            unit_right = tree_math.scale(1.0 / size, back)

            def normal(x):
                product = tree_math.scale(1.0 / size, operator(x))
                return tree_math.scale(1.0 / size, transpose(product))

            apply = iteration.make_preconditioner("normal_cg", preconditioner, b, unit_right, system)
            run = _counted(solve_cg, max_steps + 2, rtol, max_steps)
            y, marks = run(normal, unit_right, tree_math.scale(size, guess), apply)
            return tree_math.scale(1.0 / size, y), 2 * marks + jnp.int32(3)

        x, products, fine = iteration.framed_solve(system, damping, iterate, symmetric=False)
        info = base.report(system, x, damping, rtol, products)
        return system.restore(x), info._replace(converged=info.converged & fine)

    return solve


def bicgstab(
    *, max_steps: int = 20, rtol: float = 1e-3, damping: float = 0.0, preconditioner: base.Matvec | None = None
) -> base.Solver:
    """Solver by stabilised biconjugate gradients, through jaxopt.

    `x ~ (A + damping I)^{-1} b`, any A

    Stops when the residual of the damped system is at most `rtol * ||b||` (or at rounding error, if `rtol` is smaller),
    or after `max_steps` steps. The residual rises and falls, and the iteration may break down: a solution that is not
    finite, or worse than x = 0, is replaced with the initial guess.

    Args:
      max_steps: most steps taken, each of two products.
      rtol: relative residual at which the iteration stops, and up to which `converged` is True. 0 for all steps.
      damping: multiple of the identity added to A.
      preconditioner: linear function, pytree like `b` -> the same, that approximates the inverse of `A + damping I`.

    Returns:
      `solve(matvec, b, *, init=None, key=None) -> (x, SolveInfo)`; `key` is not used. `min_curvature` is the Rayleigh
      quotient of the solution. Differentiable (another solve, with the transposed matrix); needs a `matvec` that
      `jax.linear_transpose` can transpose.
      Cost: 2 steps + 4 matrix-vector products: for the size of A, the initial residual, the comparison with x = 0, and
      the true residual of what is returned.
      After a breakdown the steps made are unknown, and `num_matvecs` is what `max_steps` would have cost.

    Raises:
      TypeError, ValueError: an option of the wrong type or out of range.

    Reference: van der Vorst, 1992, Bi-CGSTAB: A Fast and Smoothly Converging Variant of Bi-CG for the Solution of
    Nonsymmetric Linear Systems.
    """
    _check("bicgstab", max_steps, rtol, damping, preconditioner)
    solve_bicgstab = jaxopt_linear_solve().solve_bicgstab

    def solve(matvec: base.Matvec, b: PyTree, *, init: PyTree = None, key: Key | None = None):
        system = base.as_vectors(base.make_system("bicgstab", matvec, b, init, key))

        def iterate(operator, right, guess):
            size = _positive(tree_math.norm(operator(right)))
            apply = iteration.make_preconditioner("bicgstab", preconditioner, b, right, system)
            run = _counted(solve_bicgstab, 2 * max_steps + 2, rtol, max_steps)
            y, marks = run(
                lambda x: tree_math.scale(1.0 / size, operator(x)), right, tree_math.scale(size, guess), apply
            )
            x = tree_math.scale(1.0 / size, y)
            left = tree_math.norm(tree_math.add_scaled(right, -1.0, operator(x)))
            # A step that ends half-way marks one place and has made both products.
            return tree_math.select(left <= 1, x, guess), 2 * ((marks + 1) // 2) + jnp.int32(3)

        x, products, fine = iteration.framed_solve(system, damping, iterate, symmetric=False)
        info = base.report(system, x, damping, rtol, products)
        return system.restore(x), info._replace(converged=info.converged & fine)

    return solve


def _check(where, max_steps, rtol, damping, preconditioner) -> None:
    checks.count(where, 1, max_steps=max_steps)
    checks.number(where, least=0, known=True, rtol=rtol, damping=damping)
    iteration.check_preconditioner(where, preconditioner)


def _transpose(operator, like):
    """`x -> A^T x`: what an operator gives, or JAX's transpose of it."""
    given = operator.transpose if isinstance(operator, base.Operator) else None
    if given is not None:
        return given
    derived = jax.linear_transpose(operator, like)
    return lambda x: derived(x)[0]


def _positive(size):
    """`size`, and 1 where it is 0 or not finite."""
    return jnp.where((size > 0) & jnp.isfinite(size), size, jnp.ones_like(size))


def _counted(jaxopt_solve, places: int, rtol: float, max_steps: int):
    """Makes a solver of jaxopt count the calls of its preconditioner, which it does not return.

    The vectors get a second block of `places` numbers, on which the matrix is the identity, and the right-hand side a
    tiny multiple of the first unit vector. The preconditioner, which need not be transposed and so need not be linear,
    answers with a tiny number in the first place that is still zero. Each call thus makes one more place of the
    directions, and then of the solution, different from zero. The numbers are so small that their squares vanish beside
    the other block in every inner product: the iterates are those without it.

    Returns:
      `run(operator, right, guess, preconditioner) -> (x, calls that have entered x)`.
    """

    def run(operator, right, guess, preconditioner):
        size = tree_math.norm(right)
        tiny = jnp.sqrt(jnp.finfo(size.dtype).tiny).astype(size.dtype)
        order = jnp.arange(places, dtype=jnp.int32)
        # Where the right-hand side is 0 no step is made, and nothing is to be counted.
        mark = jnp.where((order == 0) & (size > 0), tiny, jnp.zeros_like(tiny))

        def marking(pair):
            r, marks = pair
            free = order == jnp.sum(marks != 0, dtype=jnp.int32)
            return preconditioner(r), jnp.where(free, tiny, jnp.zeros_like(tiny))

        multiply = convolutions.channels_last(operator)  # jaxopt repeats it in a loop
        x, marks = jaxopt_solve(
            lambda pair: (multiply(pair[0]), pair[1]),
            (right, mark),
            init=(guess, jnp.zeros_like(mark)),
            tol=iteration.stop_at(rtol, size.dtype),
            maxiter=max_steps,
            M=marking,
        )
        return x, jnp.minimum(jnp.sum(marks != 0, dtype=jnp.int32), places - 2)

    return run
