"""hypertorch (Grazzi et al. 2020): fixed point, Neumann series and CG on the map of one gradient step.

It is imported as `hypergrad`, as is another library of that name, so the two cannot be installed together; the PyPI
package called hypertorch is about hypergraphs. Put a checkout of github prolearner/hypertorch first on PYTHONPATH.
CG works on I - d(step map)/d(params) = step * Hessian and stops at an absolute residual; the entries with a tolerance
give it the tolerance times the norm of the outer gradient at the first point, measured when they are made.
"""

import functools

from benchmarks.hypergradients.peers import settings

NAME = "hypertorch"
VERSION = ""


def available() -> str | None:
    """None if it can be used, or why not."""
    return settings.why_not("torch", "hypergrad", has="fixed_point")


def entries(kind: str) -> dict:
    """Entries for any kind of problem."""
    del kind
    return {
        **settings.by_products("fixed_point", functools.partial(_make, method="fixed_point")),
        **settings.by_products("neumann", functools.partial(_make, method="neumann")),
        **settings.by_products("cg", functools.partial(_make, method="CG")),
        **settings.by_tolerance("cg", functools.partial(_make, method="CG")),
        **settings.by_products("normal_cg", functools.partial(_make, method="CG_normaleq")),
    }


def _make(problem, options, *, method: str, num_products=None, tolerance=None):
    import hypergrad
    import torch

    from benchmarks.hypergradients.peers import torch_point

    point = torch_point.load(problem, options)
    params, meta = torch_point.leaves(point.params), torch_point.leaves(point.meta)
    state = {"passes": 0}

    def count(grad):
        state["passes"] += 1
        return grad

    def step(params, meta=meta):
        grads = torch.autograd.grad(point.inner(params, meta), params, create_graph=True)
        new = [param - point.step * grad for param, grad in zip(params, grads, strict=True)]
        new[0].register_hook(count)
        return new

    limit = num_products
    absolute = 0.0
    if method == "CG_normaleq":
        limit = num_products // 2
    if tolerance is not None:
        limit = settings.MOST_PRODUCTS
        grads = torch.autograd.grad(point.outer(params, meta), params)
        absolute = tolerance * float(torch.sqrt(sum(grad.square().sum() for grad in grads)))
    call = getattr(hypergrad, method)

    def run(problem=None, restart: bool = False):
        del restart
        torch_point.move(point, problem)
        state["passes"] = 0
        grads = call(params, meta, limit, step, point.outer, tol=absolute, set_grad=False)
        return torch_point.arrays(point, grads)

    if method == "CG_normaleq":
        return run, 2 * limit + 1
    return run, lambda: state["passes"] - 1  # the last pass is the one to the meta variables
