"""The hypergradients that are compared, exact ones first."""

from typing import Any, NamedTuple

import optax

from auxjax import hypergrad, solvers

DAMPING = 1e-2


class OfLosses(NamedTuple):
    """Losses in the place of the params."""

    out: Any


def of_losses_too(model):
    """The model, whose losses take losses as well, so that a method's inner loss does."""

    def losses(params, batch, key):
        return params.out if isinstance(params, OfLosses) else model.losses(params, batch, key)

    return model._replace(losses=losses)


def empirical_fisher(model, solver):
    """Implicit differentiation with the empirical Fisher matrix of whatever loss a method has."""

    def estimator(problem, params, meta, inner_batch, outer_batch, *, key=None, init=None):
        def losses(params, meta, batch):
            return model.losses(params, batch, key).values

        def of_losses(values, params, meta, batch):
            return problem.inner(OfLosses(model.losses(params, batch, key)._replace(values=values)), meta, batch)

        how = hypergrad.implicit(solver, curvature=hypergrad.fisher(losses, of_losses))
        return how(problem, params, meta, inner_batch, outer_batch, key=key, init=init)

    return estimator


def gauss_newton(solver):
    """Implicit differentiation with the method's own Gauss-Newton matrix."""
    return hypergrad.implicit(solver, curvature="problem")


def estimators(model, method: str) -> dict[str, Any]:
    """`{name: estimator}`; the first ones are exact. The lower level of `maoal` is no loss, so that it has fewer."""
    long = {"max_steps": 300, "rtol": 1e-4, "damping": DAMPING, "unroll": False}
    is_loss = method != "maoal"
    with_output = is_loss and model.outputs is not None
    solver = solvers.minres(**long) if is_loss else solvers.gmres(**long)
    exact = {"exact, Hessian": hypergrad.implicit(solver)}
    if with_output:
        exact["exact, Gauss-Newton"] = gauss_newton(solvers.cg(**long))
    found = {
        "one step": hypergrad.one_step(optax.sgd(1.0)),
        "neumann(3)": hypergrad.implicit(solvers.neumann(3)),
        "neumann(3), warm start": hypergrad.warm_started(hypergrad.implicit(solvers.neumann(3))),
        "neumann(20)": hypergrad.implicit(solvers.neumann(20, unroll=False)),
    }
    short = {"max_steps": 10, "damping": DAMPING, "unroll": False}
    if is_loss:
        found["cg(10)"] = hypergrad.implicit(solvers.cg(**short))
        found["minres(10)"] = hypergrad.implicit(solvers.minres(**short))
    else:
        found["gmres(10)"] = hypergrad.implicit(solvers.gmres(**short))
    if with_output:
        for steps in (3, 10):
            solver = solvers.cg(**{**short, "max_steps": steps})
            found[f"cg({steps}), Gauss-Newton"] = gauss_newton(solver)
        solver = solvers.neumann(3, damping=DAMPING)
        found["neumann(3), Gauss-Newton"] = gauss_newton(solver)
    if is_loss:
        for steps in (3, 10):
            solver = solvers.cg(**{**short, "max_steps": steps})
            found[f"cg({steps}), Fisher"] = empirical_fisher(model, solver)
    return exact | found
