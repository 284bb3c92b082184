"""hypergrad (moskomule): `conjugate_gradient`, `neumann` and `nystrom` of `hypergrad.approx_hypergrad`.

All three take the two objectives as functions of (params, meta) and a fixed number of steps or rank; no tolerance and
no start. `lr` is the step of the Neumann series, and 1 for CG, which it only scales forth and back. `nystrom` takes
`rho`, the damping; it draws its columns anew in every run, from torch's global generator.
"""

import functools

from benchmarks.hypergradients.peers import settings

NAME = "hypergrad"
VERSION = settings.version("hypergrad")
RANKS = (5, 10, 20, 40)
DAMPINGS = (0.1, 0.01)


def available() -> str | None:
    """None if it can be used, or why not."""
    return settings.why_not("hypergrad", "hypergrad.approx_hypergrad", has="nystrom")


def entries(kind: str) -> dict:
    """Entries for any kind of problem."""
    del kind
    nystrom = {
        f"nystrom rank={rank} rho={rho:g}": functools.partial(_make, method="nystrom", num_products=rank, rho=rho)
        for rank in RANKS
        for rho in DAMPINGS
    }
    return {
        **settings.by_products("neumann", functools.partial(_make, method="neumann")),
        **settings.by_products("cg", functools.partial(_make, method="conjugate_gradient")),
        **nystrom,
    }


def _make(problem, options, *, method: str, num_products: int, rho: float = 0.0):
    import torch
    from hypergrad import approx_hypergrad

    from benchmarks.hypergradients.peers import torch_point

    point = torch_point.load(problem, options)
    call = getattr(approx_hypergrad, method)
    arguments = {
        "neumann": {"num_iters": num_products, "lr": point.step},
        "conjugate_gradient": {"num_iters": num_products, "lr": 1.0},
        "nystrom": {"rank": num_products, "rho": rho},
    }[method]
    torch.manual_seed(options.get("seed", 0))

    def run(problem=None, restart: bool = False):
        del restart
        torch_point.move(point, problem)
        grads = call(point.inner, point.outer, point.params, point.meta, **arguments)
        return torch_point.arrays(point, grads)

    return run, num_products
