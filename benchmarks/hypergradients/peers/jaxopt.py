"""jaxopt: `implicit_diff.root_vjp` with its linear solvers, compiled as a whole.

`root_vjp` is what `custom_root` calls in its backward pass; called directly it is handed the outer gradient and works
on a solved inner problem. All solvers take a tolerance, a number of steps and a start ("warm"); the solution is
kept by a wrapper around the solver. jaxopt throws away what the solver knows about convergence and steps, so the
products of entries with a tolerance are not known. "default" is `root_vjp` as it comes: normal CG, tolerance 1e-5.
"""

import functools

from benchmarks.hypergradients.peers import settings

NAME = "jaxopt"
VERSION = settings.version("jaxopt")
RESTART = 20  # jaxopt's default for GMRES; its maxiter counts restarts


def available() -> str | None:
    """None if it can be used, or why not."""
    return settings.why_not("jaxopt")


def entries(kind: str) -> dict:
    """Entries for any kind of problem; `lu` where params are one array, which is all that it takes."""
    made = {}
    for name in ("cg", "normal_cg", "bicgstab"):
        made |= settings.by_products(name, functools.partial(_make, method=name))
        made |= settings.by_tolerance(name, functools.partial(_make, method=name))
    made |= settings.by_products("gmres", functools.partial(_make, method="gmres"), grid=settings.PRODUCTS[1:])
    made |= settings.by_tolerance("gmres", functools.partial(_make, method="gmres"))
    for name in ("cg", "bicgstab"):
        made |= settings.by_tolerance(name, functools.partial(_make, method=name, warm=True), suffix=" warm")
    if kind in ("ridge", "quadratics", "logistic", "data_cleaning"):
        made["lu"] = functools.partial(_make, method="lu")
    made["default"] = functools.partial(_make, method="default")
    return made


def _make(problem, options, *, method: str, num_products=None, tolerance=None, warm: bool = False):
    del options
    import jax
    from jaxopt import implicit_diff

    from benchmarks.hypergradients.peers import jax_point
    from benchmarks.hypergradients.problems import LeftOut

    size = sum(leaf.size for leaf in problem.params.values())
    if method == "lu" and size > settings.DENSE:
        raise LeftOut(f"a dense Hessian of {size} params is not formed")
    settle, products = _solver(method, num_products, tolerance)

    def hypergradient(inner, outer, params, meta, start):
        right, direct = jax.grad(outer, argnums=(0, 1))(params, meta)
        kept = []

        def solve(matvec, b):
            kept.append(settle(matvec, b, init=start))
            return kept[0]

        (through,) = implicit_diff.root_vjp(jax.grad(inner), params, (meta,), right, solve=solve)
        return jax.tree.map(jax.numpy.add, direct, through), kept[0], None

    return jax_point.runner(problem, hypergradient, warm=warm, num_products=products)


def _solver(method: str, num_products, tolerance):
    """jaxopt's solver `(matvec, b, init) -> x`, and how many products it makes, where that is fixed."""
    from jaxopt import linear_solve

    if method == "default":
        return linear_solve.solve_normal_cg, None
    if method == "lu":
        return _lu, None
    solver = getattr(linear_solve, f"solve_{method}")
    per_step = {"cg": 1, "normal_cg": 2, "bicgstab": 2, "gmres": RESTART}[method]
    if tolerance is not None:
        return functools.partial(solver, tol=tolerance, maxiter=settings.MOST_PRODUCTS // per_step), None
    steps = num_products // per_step
    start = 2 if method == "normal_cg" else 1  # the residual of the start, and the transpose of the right-hand side
    products = steps * per_step + start + (1 if method == "normal_cg" else 0)
    if method == "gmres":
        products += steps  # the residual after every restart
    return functools.partial(solver, tol=0.0, maxiter=steps), products


def _lu(matvec, b, init):
    """jaxopt's dense solve on the one array that params consist of."""
    import jax
    from jaxopt import linear_solve

    del init
    (array,), tree = jax.tree.flatten(b)
    flat = linear_solve.solve_lu(
        lambda x: jax.tree.leaves(matvec(jax.tree.unflatten(tree, [x.reshape(array.shape)])))[0].ravel(), array.ravel()
    )
    return jax.tree.unflatten(tree, [flat.reshape(array.shape)])
