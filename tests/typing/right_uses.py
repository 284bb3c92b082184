"""What a type checker must take. Read by `test_typing.py`, never run."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import auxjax
from auxjax import solvers
from auxjax.interface import Context, Key, PyTree


def losses(params, batch, key):
    return auxjax.TaskLosses({"main": params["w"] * batch["x"]})


def losses_with_extras(params: PyTree, batch: dict, key: Key, *, state: PyTree, averaged: PyTree) -> auxjax.TaskLosses:
    return auxjax.TaskLosses({"main": batch["x"]}, state=state)


def soft_label_loss(params, batch, labels, key, *, step) -> jax.Array:
    return jnp.sum(labels, axis=-1)


auxjax.TaskModel(losses, "main")
auxjax.TaskModel(losses_with_extras, "main", trunk=lambda path: "trunk" in path)
auxjax.TaskModel(partial(losses_with_extras, averaged=None), "main", trunk={"w": True})
auxjax.TaskModel(lambda params, batch, key: auxjax.TaskLosses({}), "main", soft_label_loss=soft_label_loss)


def my_solver(matvec, b, *, init=None, key=None):
    return b, auxjax.cg()(matvec, b, init=init, key=key)[1]


def my_estimator(problem, params, meta, inner_batch, outer_batch, *, key=None, init=None):
    return auxjax.one_step(0.1)(problem, params, meta, inner_batch, outer_batch, key=key, init=init)


def inner(params, meta, batch):
    return jnp.sum(params * meta)


problem = auxjax.BilevelProblem(inner=inner, outer=inner)
with_aux = auxjax.BilevelProblem(
    inner=lambda p, m, b: (inner(p, m, b), 1), outer=lambda p, m, b: (0.0, 2), has_aux=True
)
field = auxjax.BilevelProblem(update_field=jax.grad(inner), outer=inner, symmetric=True, mask=lambda path: "w" in path)
curvature = auxjax.gauss_newton(lambda p, m, b: p, lambda z, p, m, b: jnp.sum(z))
sketched = auxjax.amortise(
    lambda sketch: auxjax.cg(preconditioner=sketch), prepare=solvers.nystrom_preparation(3, damping=0.1)
)
estimated = auxjax.amortise(
    lambda estimate: auxjax.neumann(3, 1 / estimate.bound), prepare=solvers.power_iteration(), curvature=curvature
)
estimators: list[auxjax.Estimator] = [
    auxjax.implicit(my_solver),
    auxjax.implicit(auxjax.minres(preconditioner=lambda r: r), curvature=curvature),
    auxjax.implicit(auxjax.gmres(), curvature=lambda level, batch: lambda u: u),
    auxjax.unrolled(3, optax.adam(0.1)),
    auxjax.finite_difference(jnp.ones(())),
    my_estimator,
]
carried = [auxjax.warm_started(my_estimator), auxjax.amortise(auxjax.cg()), auxjax.single_loop()]
gradient, info = auxjax.implicit(auxjax.dense())(problem, jnp.ones(3), jnp.ones(3), None, None, key=jax.random.key(0))
residual: jax.Array = info.relative_residual
x, report = solvers.cg()(solvers.Operator(lambda u: u, symmetric=True), {"w": jnp.ones(3)}, init=None)
products: jax.Array = report.num_matvecs

auxjax.methods.jtds(hypergradient=my_estimator)
auxjax.methods.maoal(hypergradient=auxjax.single_loop())
auxjax.methods.auxilearn(hypergradient=None)


def update(context: Context, state: auxjax.TrainState, batch: Any, key: jax.Array):
    return state, {"loss": jnp.ones(())}


auxjax.Method(lambda context, state, batch, key: (), update)
auxjax.Method(
    init=lambda context, state, batch, key: None,
    inner=partial(update),
    outer=lambda context, state, inner_batch, outer_batch, key: (state, {}),
    weights=lambda context, state, batch, key: {"main": jnp.ones(())},
)
