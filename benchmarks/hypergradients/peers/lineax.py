"""lineax: its solvers on the Hessian as a `FunctionLinearOperator`, and one mixed product.

The Hessian-vector product is the linearised inner gradient. lineax measures a tolerance entry by entry, against
atol + rtol |b|, in the right-hand side and in the solution; here atol is the tolerance times the root mean square of b
and the norm is `rms_norm`, so that `tol` is a relative residual as elsewhere, up to a factor of two, and small entries
of b do not stop it from ever ending. `stabilise_every=None`: no extra products. `y0` is its start ("warm").

Its CG turns to NaN unless p'Hp > 200 eps n r'r, which a flat loss with many params does not keep in float32. "scaled"
is what a user who knows can do about it: both sides times a number, and the measured residual is the same.
"""

import functools

from benchmarks.hypergradients.peers import settings

NAME = "lineax"
VERSION = settings.version("lineax")
RESTART = 20


def available() -> str | None:
    """None if it can be used, or why not."""
    return settings.why_not("lineax")


def entries(kind: str) -> dict:
    """Entries for any kind of problem."""
    del kind
    made = {}
    for name in ("cg", "cg scaled", "normal_cg", "gmres", "bicgstab"):
        grid = settings.PRODUCTS[1:] if name == "gmres" else settings.PRODUCTS
        made |= settings.by_products(name, functools.partial(_make, method=name), grid=grid)
    for name in ("cg", "cg scaled", "normal_cg", "gmres", "bicgstab", "lsmr"):
        made |= settings.by_tolerance(name, functools.partial(_make, method=name))
    for name in ("cg", "cg scaled", "gmres", "bicgstab"):
        made |= settings.by_tolerance(name, functools.partial(_make, method=name, warm=True), suffix=" warm")
    made["lu"] = functools.partial(_make, method="lu")
    return made


def _make(problem, options, *, method: str, num_products=None, tolerance=None, warm: bool = False):
    del options
    import jax
    import lineax

    from benchmarks.hypergradients.peers import jax_point
    from benchmarks.hypergradients.problems import LeftOut

    size = sum(leaf.size for leaf in problem.params.values())
    if method == "lu" and size > settings.DENSE:
        raise LeftOut(f"a dense Hessian of {size} params is not formed")
    scale = scale_of(problem, size) if method == "cg scaled" else 1.0
    tags = lineax.positive_semidefinite_tag if method.startswith("cg") else lineax.symmetric_tag

    def hypergradient(inner, outer, params, meta, start):
        right, direct = jax.grad(outer, argnums=(0, 1))(params, meta)
        if scale != 1.0:
            right = jax.tree.map(lambda leaf: scale * leaf, right)
        _, product = jax.linearize(jax.grad(lambda params: scale * inner(params, meta)), params)
        operator = lineax.FunctionLinearOperator(product, jax.eval_shape(lambda: params), tags)
        atol = 0.0 if tolerance is None else tolerance * jax_point.norm(right) / size**0.5
        solution = lineax.linear_solve(
            operator,
            right,
            solver(method, num_products, tolerance, atol),
            options={} if start is None else {"y0": start},
            throw=False,
        )
        _, back = jax.vjp(lambda meta: jax.grad(inner)(params, meta), meta)
        (through,) = back(solution.value)
        gradient = jax.tree.map(jax.numpy.subtract, direct, through)
        return gradient, solution.value, _products(method, solution.stats.get("num_steps"), size)

    return jax_point.runner(problem, hypergradient, warm=warm)


def solver(method: str, num_products, tolerance, atol):
    """lineax's solver for a number of products or a tolerance."""
    import lineax
    from lineax.internal import rms_norm

    if method == "lu":
        return lineax.LU()
    limits = {"rtol": 0.0, "atol": 0.0} if tolerance is None else {"rtol": tolerance, "atol": atol}
    limits["norm"] = rms_norm
    most = (num_products if tolerance is None else settings.MOST_PRODUCTS) // _per_step(method)
    if method in ("cg", "cg scaled"):
        return lineax.CG(**limits, stabilise_every=None, max_steps=most)
    if method == "normal_cg":
        return lineax.Normal(lineax.CG(**limits, stabilise_every=None, max_steps=most))
    if method == "gmres":
        return lineax.GMRES(**limits, restart=RESTART, max_steps=most + 1)  # the first only sets the residual up
    if method == "bicgstab":
        return lineax.BiCGStab(**limits, max_steps=most)
    return lineax.LSMR(**limits, max_steps=most)


def _per_step(method: str) -> int:
    """Products of one of its steps; those of GMRES are restarts."""
    return {"normal_cg": 2, "bicgstab": 2, "lsmr": 2, "gmres": RESTART}.get(method, 1)


def _products(method: str, steps, size: int):
    """Products that were made: those of all steps, and the residuals of the start and, by GMRES, of every restart."""
    if method == "lu":
        return size
    if method == "gmres":
        return (steps - 1) * (RESTART + 1) + 1
    return steps * _per_step(method) + (3 if method == "normal_cg" else 1)


def scale_of(problem, size: int) -> float:
    """A power of two with which the smallest curvature passes lineax's test with room to spare."""
    import math

    import numpy as np

    smallest = abs(problem.facts.get("lambda_min") or problem.facts["lambda_max"])
    wanted = 1000 * size * float(np.finfo(problem.precision).eps) / smallest
    return 2.0 ** max(0, math.ceil(math.log2(wanted)))
