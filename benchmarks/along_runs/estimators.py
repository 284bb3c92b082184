"""The hypergradients that are compared, exact ones first."""

from typing import Any, NamedTuple

import optax

from auxjax import hypergrad, solvers

DAMPING = 1e-2
FIELDS = ("auxinash", "maoal")  # their lower level is no loss in one call: no Gauss-Newton matrix for them here


class OfOutputs(NamedTuple):
    """Outputs of a network in the place of its params."""

    outputs: Any


class OfLosses(NamedTuple):
    """Losses in the place of the params."""

    out: Any


def either(model):
    """The model, whose losses take the network's outputs or the losses as well, so that a method's inner loss does."""

    def losses(params, batch, key):
        if isinstance(params, OfOutputs):
            return model.output_losses(params.outputs, batch, key)
        if isinstance(params, OfLosses):
            return params.out
        return model.losses(params, batch, key)

    return model._replace(losses=losses)


def with_curvature(model, solver, kind: str):
    """Implicit differentiation with the Gauss-Newton or the empirical Fisher matrix of whatever loss a method has."""

    def estimator(problem, params, meta, inner_batch, outer_batch, *, key=None, init=None):
        def outputs(params, meta, batch):
            return model.outputs(params, batch, key)

        def of_outputs(z, params, meta, batch):
            return problem.inner(OfOutputs(z), meta, batch)

        def losses(params, meta, batch):
            return model.losses(params, batch, key).values

        def of_losses(values, params, meta, batch):
            return problem.inner(OfLosses(model.losses(params, batch, key)._replace(values=values)), meta, batch)

        made = {
            "gauss_newton": lambda: hypergrad.gauss_newton(outputs, of_outputs),
            "fisher": lambda: hypergrad.fisher(losses, of_losses),
        }[kind]()
        return hypergrad.implicit(solver, curvature=made)(
            problem, params, meta, inner_batch, outer_batch, key=key, init=init
        )

    return estimator


def estimators(model, method: str) -> dict[str, Any]:
    """`{name: estimator}`; the first ones are exact."""
    long = {"max_steps": 300, "rtol": 1e-4, "damping": DAMPING, "unroll": False}
    with_output = method not in FIELDS and model.outputs is not None
    solver = solvers.gmres(**long) if method == "maoal" else solvers.minres(**long)
    exact = {"exact, Hessian": hypergrad.implicit(solver)}
    if with_output:
        exact["exact, Gauss-Newton"] = with_curvature(model, solvers.cg(**long), "gauss_newton")
    found = {
        "one step": hypergrad.one_step(optax.sgd(1.0)),
        "neumann(3)": hypergrad.implicit(solvers.neumann(3)),
        "neumann(3), warm start": hypergrad.warm_started(hypergrad.implicit(solvers.neumann(3))),
        "neumann(20)": hypergrad.implicit(solvers.neumann(20, unroll=False)),
    }
    short = {"max_steps": 10, "damping": DAMPING, "unroll": False}
    if method == "maoal":
        found["gmres(10)"] = hypergrad.implicit(solvers.gmres(**short))
    else:
        found["cg(10)"] = hypergrad.implicit(solvers.cg(**short))
        found["minres(10)"] = hypergrad.implicit(solvers.minres(**short))
    if with_output:
        for steps in (3, 10):
            solver = solvers.cg(**{**short, "max_steps": steps})
            found[f"cg({steps}), Gauss-Newton"] = with_curvature(model, solver, "gauss_newton")
        solver = solvers.neumann(3, damping=DAMPING)
        found["neumann(3), Gauss-Newton"] = with_curvature(model, solver, "gauss_newton")
    if method not in FIELDS:
        for steps in (3, 10):
            solver = solvers.cg(**{**short, "max_steps": steps})
            found[f"cg({steps}), Fisher"] = with_curvature(model, solver, "fisher")
    return exact | found
