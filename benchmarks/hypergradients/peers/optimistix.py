"""optimistix: `minimise` with `ImplicitAdjoint`, differentiated by `jax.grad` of the outer loss at the minimum.

The inner problem is solved already, so `minimise` gets `max_steps=0` and hands the params through; what is measured is
its implicit adjoint. That solves with a solver of lineax, set up as in the adaptor to lineax; the size that turns a
tolerance into lineax's atol is that of the outer gradient where the entry is made. It takes no start, and
stops with an error where the linear solver runs out of steps or breaks down. "scaled" is the inner loss times a number,
as in the adaptor to lineax. Without a solver it forms the Hessian ("default").
"""

import functools

from benchmarks.hypergradients.peers import lineax as lineax_peer
from benchmarks.hypergradients.peers import settings

NAME = "optimistix"
VERSION = settings.version("optimistix")


def available() -> str | None:
    """None if it can be used, or why not."""
    return settings.why_not("lineax", "optimistix")


def entries(kind: str) -> dict:
    """Entries for any kind of problem."""
    del kind
    made = {}
    for name in ("cg", "cg scaled", "gmres", "bicgstab"):
        grid = settings.PRODUCTS[1:] if name == "gmres" else settings.PRODUCTS
        made |= settings.by_products(name, functools.partial(_make, method=name), grid=grid)
        made |= settings.by_tolerance(name, functools.partial(_make, method=name))
    made["default"] = functools.partial(_make, method="default")
    return made


def _make(problem, options, *, method: str, num_products=None, tolerance=None):
    del options
    import jax
    import lineax
    import optimistix

    from benchmarks.hypergradients.peers import jax_point
    from benchmarks.hypergradients.problems import LeftOut

    size = sum(leaf.size for leaf in problem.params.values())
    if method == "default":
        if size > settings.DENSE:
            raise LeftOut(f"a dense Hessian of {size} params is not formed")
        adjoint = optimistix.ImplicitAdjoint()
    else:
        atol = 0.0 if tolerance is None else tolerance * _root_mean_square(problem)
        adjoint = optimistix.ImplicitAdjoint(lineax_peer.solver(method, num_products, tolerance, atol))
    tags = frozenset({lineax.positive_semidefinite_tag if method.startswith("cg") else lineax.symmetric_tag})
    scale = lineax_peer.scale_of(problem, size) if method == "cg scaled" else 1.0
    nothing = optimistix.GradientDescent(learning_rate=0.0, rtol=1.0, atol=1.0)

    def hypergradient(inner, outer, params, meta, start):
        del start

        def reduced(meta):
            minimum = optimistix.minimise(
                lambda params, meta: scale * inner(params, meta),
                nothing,
                params,
                meta,
                max_steps=0,
                adjoint=adjoint,
                throw=False,
                tags=tags,
            )
            return outer(minimum.value, meta)

        return jax.grad(reduced)(meta), None, None

    products = None
    if num_products is not None:
        products = num_products + 1 + (num_products // lineax_peer.RESTART if method == "gmres" else 0)
    return jax_point.runner(problem, hypergradient, num_products=products)


def _root_mean_square(problem) -> float:
    """Of the outer gradient at the first point."""
    import jax

    jax.config.update("jax_enable_x64", problem.precision == "float64")
    gradient = jax.jit(jax.grad(problem.outer))(problem.params, problem.meta, problem.outer_batch)
    leaves = jax.tree.leaves(gradient)
    return float((sum(float((leaf**2).sum()) for leaf in leaves) / sum(leaf.size for leaf in leaves)) ** 0.5)
