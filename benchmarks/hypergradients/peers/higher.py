"""higher (facebookresearch): reverse differentiation through K steps of gradient descent from the solved params.

`higher.innerloop_ctx` around a module that holds the params, `copy_initial_weights=False` and a constant learning
rate. The fast weights of all steps are kept until the gradient is there, which is what a user of it does and pays for.
"""

import functools

from benchmarks.hypergradients.peers import settings

NAME = "higher"
VERSION = settings.version("higher")
STEPS = (10, 20, 40, 80, 160, 320)


def available() -> str | None:
    """None if it can be used, or why not."""
    return settings.why_not("higher", has="innerloop_ctx")


def entries(kind: str) -> dict:
    """Entries for any kind of problem."""
    del kind
    return {f"unrolled T={steps}": functools.partial(_make, steps=steps) for steps in STEPS}


def _make(problem, options, *, steps: int):
    import higher
    import torch

    from benchmarks.hypergradients.peers import torch_point

    point = torch_point.load(problem, options)
    meta = torch_point.leaves(point.meta)
    model = torch_point.module(point.params)
    optimizer = torch.optim.SGD(model.parameters(), lr=point.step)

    def run(problem=None, restart: bool = False):
        del restart
        torch_point.move(point, problem)
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fast, differentiable):
            for _ in range(steps):
                differentiable.step(point.inner(fast.parameters(time=-1), meta))
            loss = point.outer(fast.parameters(time=-1), meta)
            return torch_point.arrays(point, torch.autograd.grad(loss, meta))

    return run, steps
