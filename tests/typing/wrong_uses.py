"""What a type checker must find: every line that says so, and no other. Read by `test_typing.py`, never run."""

import jax.numpy as jnp

import auxjax
from auxjax import solvers


def losses_without_key(params, batch):
    return auxjax.TaskLosses({})


def losses_as_a_dict(params, batch, key):
    return {"main": jnp.ones(3)}


def no_labels(params, batch, key):
    return jnp.ones(3)


auxjax.TaskModel(losses_without_key, "main")  # wrong
auxjax.TaskModel(losses_as_a_dict, "main")  # wrong
auxjax.TaskModel(lambda params, batch, key: auxjax.TaskLosses({}), "main", None, no_labels)  # wrong


def solver_without_keywords(matvec, b):
    return auxjax.cg()(matvec, b)


def solver_without_report(matvec, b, *, init=None, key=None):
    return {"w": b}


auxjax.implicit(0.1)  # wrong
auxjax.implicit(auxjax.cg)  # wrong
auxjax.implicit(auxjax.implicit(auxjax.cg()))  # wrong
auxjax.implicit(solver_without_keywords)  # wrong
auxjax.implicit(solver_without_report)  # wrong
auxjax.implicit(auxjax.cg(), curvature=lambda batch: lambda u: u)  # wrong
auxjax.implicit(auxjax.cg(), curvature=lambda level, batch: 1.0)  # wrong
auxjax.cg(preconditioner=2.0)  # wrong
auxjax.amortise(auxjax.implicit(auxjax.cg()))  # wrong
auxjax.amortise(auxjax.cg(), prepare=solvers.nystrom_preparation)  # wrong
auxjax.warm_started(auxjax.cg())  # wrong
auxjax.warm_started(auxjax.amortise(auxjax.cg()))  # wrong
auxjax.one_step("adam")  # wrong


def estimator_without_batches(problem, params, meta, *, key=None, init=None):
    return auxjax.one_step(0.1)(problem, params, meta, None, None)


auxjax.methods.jtds(hypergradient=auxjax.cg())  # wrong
auxjax.methods.jtds(hypergradient=auxjax.implicit)  # wrong
auxjax.methods.maoal(hypergradient=estimator_without_batches)  # wrong
auxjax.methods.maoal(hypergradient="implicit")  # wrong
auxjax.BilevelProblem(inner=lambda params, batch: jnp.ones(()), outer=lambda params, meta, batch: 1.0)  # wrong
auxjax.BilevelProblem(jnp.sum, None, jnp.sum)  # wrong
auxjax.gauss_newton(lambda params, batch: params, lambda z, params, meta, batch: 1.0)  # wrong


def update(context, state, batch, key):
    return state, {}


auxjax.Method(lambda state: (), update)  # wrong
auxjax.Method(lambda context, state, batch, key: (), lambda context, state, batch, key: state)  # wrong
auxjax.Method(lambda context, state, batch, key: (), update, outer=update)  # wrong
