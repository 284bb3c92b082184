"""torchopt: `torchopt.diff.implicit.custom_root` around an inner problem that is already solved.

The optimality function is the inner gradient (`torch.func.grad`); the solution is handed through, so a run is one
outer forward pass and torchopt's backward pass. `linear_solve.solve_cg` and `solve_normal_cg` take a start (entries
"warm"), a tolerance and a number of steps; `solve_inv(ns=True, alpha=step)` is the Neumann series. `solve_inv()`
without it is called dense, but solves with the Hessian's own block of every tensor only (see `check`).
"""

import functools

from benchmarks.hypergradients.peers import settings

NAME = "torchopt"
VERSION = settings.version("torchopt")


def available() -> str | None:
    """None if it can be used, or why not."""
    return settings.why_not("torchopt", "torchopt.diff.implicit")


def entries(kind: str) -> dict:
    """Entries for any kind of problem."""
    del kind
    return {
        **settings.by_products("neumann", functools.partial(_make, method="neumann")),
        **settings.by_products("cg", functools.partial(_make, method="cg")),
        **settings.by_tolerance("cg", functools.partial(_make, method="cg")),
        **settings.by_tolerance("cg", functools.partial(_make, method="cg", warm=True), suffix=" warm"),
        **settings.by_products("normal_cg", functools.partial(_make, method="normal_cg")),
        **settings.by_tolerance("normal_cg", functools.partial(_make, method="normal_cg")),
        "dense": functools.partial(_make, method="dense"),
    }


def _make(problem, options, *, method: str, num_products=None, tolerance=None, warm: bool = False):
    import torch
    import torchopt

    from benchmarks.hypergradients.peers import torch_point
    from benchmarks.hypergradients.problems import LeftOut

    point = torch_point.load(problem, options)
    if method == "dense" and torch_point.num_params(point) > settings.DENSE:
        raise LeftOut(f"a dense Hessian of {torch_point.num_params(point)} params is not formed")
    params, meta = point.params, torch_point.leaves(point.meta)
    state = {"solution": None, "products": 0}
    settle = _solver(method, point.step, num_products, tolerance)

    def solve(matvec, b):
        state["products"] = 0

        def counted(x):
            state["products"] += 1
            return matvec(x)

        solution = settle(counted, b, state["solution"])
        if warm:
            state["solution"] = solution
        return solution

    @torchopt.diff.implicit.custom_root(torch.func.grad(point.inner, argnums=0), argnums=1, solve=solve)
    def solved(params, meta):
        del meta
        return params

    def run(problem=None, restart: bool = False):
        torch_point.move(point, problem)
        if restart:
            state["solution"] = None
        loss = point.outer(solved(params, meta), meta)
        return torch_point.arrays(point, torch.autograd.grad(loss, meta))

    products_per_call = 2 if method == "normal_cg" else 1
    return run, lambda: products_per_call * state["products"] if method != "dense" else None


def _solver(method: str, step: float, num_products, tolerance):
    """torchopt's linear solver as `(matvec, b, start) -> x`; number of steps or tolerance, whichever is given."""
    from torchopt import linear_solve

    if method == "neumann":
        neumann = linear_solve.solve_inv(ns=True, maxiter=num_products, alpha=step)
        return lambda matvec, b, start: neumann(matvec, b)
    if method == "dense":
        dense = linear_solve.solve_inv()
        return lambda matvec, b, start: dense(matvec, b)
    normal = method == "normal_cg"
    kind = linear_solve.solve_normal_cg if normal else linear_solve.solve_cg
    if tolerance is None:
        limits = {"rtol": 0.0, "maxiter": num_products // 2 if normal else num_products}
    else:
        # Its own default is ten times the sum of the sizes of all axes, which can be too few.
        limits = {"rtol": tolerance, "maxiter": settings.MOST_PRODUCTS // (2 if normal else 1)}
    return lambda matvec, b, start: kind(init=start, **limits)(matvec, b)
