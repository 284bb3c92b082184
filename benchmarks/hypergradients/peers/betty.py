"""betty (leopard-ai): the hypergradient that its outer problem computes in one step of `Engine`.

The outer problem's `one_step_descent` is run, with an `optimizer_step` that keeps the gradient and moves nothing.
`cg_alpha` is 1, its default: at any other value its CG scales one of two terms only (see `check`). `cg` and `neumann`
take neither tolerance nor start; `darts` is a finite difference along the outer gradient, with the inverse Hessian
replaced by the identity.
"""

import functools
import logging

from benchmarks.hypergradients.peers import settings

NAME = "betty"
VERSION = settings.version("betty-ml")


def available() -> str | None:
    """None if it can be used, or why not."""
    return settings.why_not("betty", "betty.engine", "betty.problems")


def entries(kind: str) -> dict:
    """Entries for any kind of problem."""
    del kind
    return {
        **settings.by_products("neumann", functools.partial(_make, method="neumann")),
        **settings.by_products("cg", functools.partial(_make, method="cg")),
        "darts": functools.partial(_make, method="darts", num_products=0),
    }


def _make(problem, options, *, method: str, num_products: int):
    from benchmarks.hypergradients.peers import torch_point

    point = torch_point.load(problem, options)
    lower_config = {
        "neumann": {"neumann_iterations": num_products, "neumann_alpha": point.step},
        "cg": {"cg_iterations": num_products},
        "darts": {},
    }
    upper, kept = build(point, {"type": method, **lower_config[method]})
    start = [tensor.clone() for tensor in point.params]

    def run(problem=None, restart: bool = False):
        del restart
        torch_point.move(point, problem)
        if method == "darts":  # it leaves the params displaced; without this every run would start elsewhere
            restore(problem)
        upper.one_step_descent()
        return torch_point.arrays(point, kept)

    def restore(problem):
        for tensor, before in zip(point.params, start, strict=True):
            before.copy_(tensor) if problem is not None else tensor.copy_(before)

    return run, num_products


def build(point, lower_config: dict):
    """The two problems and the engine that ties them; returns the outer problem and the list that gets its gradient."""
    import torch
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    from benchmarks.hypergradients.peers import torch_point

    kept = []

    class Lower(ImplicitProblem):
        def training_step(self, batch):
            del batch
            return point.inner(self.trainable_parameters(), self.upper.trainable_parameters())

        def get_batch(self):
            return None

    class Upper(ImplicitProblem):
        def training_step(self, batch):
            del batch
            return point.outer(self.lower.trainable_parameters(), self.trainable_parameters())

        def get_batch(self):
            return None

        def optimizer_step(self):
            kept[:] = [parameter.grad for parameter in self.trainable_parameters()]

    logging.getLogger("betty").disabled = True  # it announces every problem on standard output
    problems = []
    for cls, config, tensors in (
        (Lower, Config(**lower_config), point.params),
        (Upper, Config(retain_graph=True), point.meta),
    ):
        module = torch_point.module(tensors)
        optimizer = torch.optim.SGD(module.parameters(), lr=point.step)  # required; never steps
        problems.append(cls(cls.__name__.lower(), config, module=module, optimizer=optimizer))
    lower, upper = problems
    dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    Engine(problems=[upper, lower], config=EngineConfig(), dependencies=dependencies)
    return upper, kept
