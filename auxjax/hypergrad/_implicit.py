"""Implicit differentiation: the exact hypergradient, up to the linear solve.

    d/d meta outer(params*(meta), meta) = d_meta outer - u^T d_meta field,      J^T u = v,      v = d_params outer

with J = d field / d params, everything taken at the given params. By the implicit function theorem this is exact where
field = 0; elsewhere `HypergradInfo.inner_grad_norm` says how far off that is. The lower level is linearised once, and
that linear map serves for all matrix-vector products.

For an inner loss J is its Hessian, and u^T d_meta field is the gradient in `meta` of the directional derivative of the
loss along u: one forward-mode pass, no second derivative in `params`. For an update field J^T is the transpose of its
linearisation, and u^T d_meta field a vector-Jacobian product; with `products="reverse"` an inner loss is taken as the
field of its gradients.

Not for: problems whose lower level is followed for a few steps only; unrolling differentiates those.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from auxjax._internal import checks, linear_maps, roles, tree_math
from auxjax.hypergrad import problem as problems
from auxjax.hypergrad import stacked
from auxjax.hypergrad.curvature import fisher, gauss_newton
from auxjax.hypergrad.problem import BilevelProblem, Curvature, Estimator
from auxjax.interface import PyTree
from auxjax.solvers.base import Operator, SolveInfo, Solver, make_system, report


def implicit(
    solver: Solver, *, curvature: Curvature | str | None = None, batches: str = "same", products: str | None = None
) -> Estimator:
    """Estimator of hypergradients by the implicit function theorem.

    `meta_grad = d_meta outer - u^T d_meta field`, u the solver's solution of `J^T u = d_params outer`

    Args:
      solver: `solve(matvec, b, *, init=None, key=None) -> (x, SolveInfo)`, such as `neumann(20)`, `cg()` or `dense()`.
        Damping is an option of the solver. `cg`, `minres` and `nystrom` refuse a J that is not symmetric, which is that
        of an update field unless the problem says `symmetric=True`.
      curvature: what the system is solved with in place of `J^T`, as `gauss_newton(outputs, loss)` or
        `fisher(losses, loss)` make it: `(level, inner_batch) -> matvec`. `None` for J itself, the Hessian of an inner
        loss. "problem" for what the problem knows, `BilevelProblem(curvature=)`; the problems of methods with task
        weights do. `converged` is then about that system, `relative_residual` still about J.
      batches: `"same"`: `inner_batch` is one batch. `"stacked"`: its leaves have a leading axis of mini-batches, and
        the lower level is their mean, in memory all at once; `neumann(..., fresh_batches=True)` takes one per term.
        Not together with `curvature`.
      products: "forward", or "reverse" for losses with `jax.custom_vjp` operations, see `BilevelProblem`; it holds
        for the curvature, too. `None` for what the problem says.

    Returns:
      `estimator(problem, params, meta, inner_batch, outer_batch, *, key=None, init=None) -> (meta_grad, info)`.

      `meta_grad` is a pytree like `meta`: the whole derivative with its true sign and scale, direct part included.
      Leaves of `meta` that no loss uses have zeros. `info` is a `HypergradInfo`. `init` is a pytree like `params`, the
      `solution` of an earlier call. `key` is for solvers that draw random numbers. Leaves of `params` that are not
      floating are held fixed.

      Cost: one outer gradient, one linearised inner gradient (or update field), the solver's products (each about two
      passes through the loss), and one forward-mode pass for the mixed derivative (a reverse pass for an update field).
      With another curvature, one product with J more for the residual, which jit drops when nobody reads it.

      It raises TypeError or ValueError at trace time: losses that are not scalar, an update field or `init` that is not
      like `params`, `meta` that is not floating, an old-style `key`.

    Raises:
      TypeError: `solver` or `curvature` is none.

    Reference: Lorraine, Vicol, Duvenaud, 2020, Optimizing Millions of Hyperparameters by Implicit Differentiation,
    AISTATS, theorem 1; Pedregosa, 2016, Hyperparameter Optimization with Approximate Gradient, ICML.
    """
    roles.solver("implicit", "a solver such as neumann(20) or dense()", solver=solver)
    if curvature is not None:
        check_curvature("implicit", curvature)
    linear_maps.check("implicit", products, None)
    checks.one_of("implicit", ("same", "stacked"), batches=batches)
    if batches == "stacked" and curvature is not None:
        raise ValueError(
            "implicit(curvature=, batches='stacked'): a curvature takes one batch. Join the mini-batches into one, or "
            "leave the curvature out."
        )

    def estimator(problem: BilevelProblem, params, meta, inner_batch, outer_batch, *, key=None, init=None):
        if key is not None:
            checks.key("implicit estimator", key)
        problem = problems.with_products(problem, products)
        level = problems.make_level("implicit estimator", problem, params, meta)
        guess = None
        if init is not None:
            guess = problems.floating_part("implicit estimator(init=)", init, level)
            checks.like("implicit estimator(init=)", guess, level.theta, "params")
        outer = problems.outer_gradients(problem, level, outer_batch)
        if batches == "stacked":
            count = stacked.count_batches("implicit", inner_batch)
            field, matvec, mixed = linearise(stacked.mean_problem(problem), level, inner_batch)
            matvec = stacked.sampled_operator(problem, level, inner_batch, matvec, linearise, count)
        else:
            field, matvec, mixed = linearise(problem, level, inner_batch)
        if curvature is None:
            u, solve_info = solver(matvec, outer.v, init=guess, key=key)
        else:
            operator = curvature_operator(curvature, problem, level, inner_batch)
            u, solve_info = solver(operator, outer.v, init=guess, key=key)
            solve_info = _measure(matvec, outer.v, u, solve_info)
        return problems.conclude(level, outer, mixed(u), field, u, solve_info)

    return estimator


def _measure(matvec, v, u, solve_info: SolveInfo) -> SolveInfo:
    """The report on u with the residual of `J^T u = v` itself, and the curvature of J along u."""
    system = make_system("implicit", matvec, v, None, None)
    measured = report(system, tree_math.cast_like(u, system.b), 0.0, 0.0, solve_info.num_matvecs)
    lowest = jnp.minimum(solve_info.min_curvature, measured.min_curvature)
    return measured._replace(converged=solve_info.converged, min_curvature=lowest)


def curvature_operator(
    curvature: Curvature | str, problem: BilevelProblem, level: problems.Level, batch: PyTree
) -> Operator:
    """The matrix in place of J^T, symmetric if the curvature says so; its reduction is the problem's."""
    known = problem.curvature if isinstance(curvature, str) else curvature
    if known is None:
        raise ValueError(
            'curvature="problem": the problem has none. Expected BilevelProblem(curvature=gauss_newton(...)); the '
            "problems of methods whose lower level is not a weighted loss have no curvature of their own: leave the "
            "option out, or give one."
        )
    made = known(level, batch)
    operator = made if isinstance(made, Operator) else Operator(made)
    return dataclasses.replace(operator, averages=problem.reduce is not None)


def linearise(
    problem: BilevelProblem, level: problems.Level, batch: PyTree
) -> tuple[PyTree, Operator, Callable[[PyTree], PyTree]]:
    """The lower level at one point: `(field, matvec, mixed)`.

    The field there, before any reduction; `u -> J^T u` and `u -> u^T d_meta field`, both reduced. J^T is an `Operator`,
    symmetric for an inner loss and for a field that the problem says is a gradient.
    """
    if problem.inner is None:
        field, matvec, mixed = _linearise_field(problems.update_field(problem, level, batch), level)
    elif level.products == "reverse":
        field, matvec, mixed = _linearise_field(jax.grad(problems.inner_loss(problem, level, batch)), level)
    else:
        with linear_maps.explain_custom_vjp():
            field, matvec, mixed = _linearise_loss(problem, level, batch)
    symmetric = problem.inner is not None or problem.symmetric
    return field, Operator(matvec, averages=problem.reduce is not None, symmetric=symmetric), mixed


def _linearise_loss(problem, level, batch):
    """Gradient, Hessian-vector product and mixed product of the inner loss: `(field, matvec, mixed)`.

    The mixed product is the gradient in `meta` of the directional derivative, reverse over forward. Where `meta` are
    weights that enter the loss linearly, that is one forward pass of the losses and the weights' own reverse pass;
    the other order would transpose the gradient of the whole model.
    """
    loss = problems.inner_loss(problem, level, batch)

    def directional(meta, u):
        return jax.jvp(lambda theta: loss(theta, meta), (level.theta,), (u,))[1]

    field, hessian_product = jax.linearize(lambda theta: jax.grad(loss)(theta, level.meta), level.theta)
    linear_maps.require_forward_mode(lambda u: directional(level.meta, u), level.theta)

    def mixed(u):
        with linear_maps.explain_custom_vjp():
            return level.reduce(jax.grad(directional)(level.meta, u))

    return field, lambda u: level.reduce(hessian_product(u)), mixed


def _linearise_field(update, level):
    """Field, product with the transposed Jacobian and mixed product of `update(theta, meta)`: `(field, matvec, mixed)`.

    By reverse passes alone.
    """
    field, transposed_product = jax.vjp(lambda theta: update(theta, level.meta), level.theta)
    _, meta_product = jax.vjp(lambda meta: update(level.theta, meta), level.meta)
    return field, lambda u: level.reduce(transposed_product(u)[0]), lambda u: level.reduce(meta_product(u)[0])


def check_curvature(where: str, curvature) -> None:
    """Raises a TypeError unless this is a curvature, and not a solver or one of the functions that make one."""
    expected = 'gauss_newton(...), fisher(...), "problem", or None for the Hessian'
    if curvature == "problem":
        return
    if curvature in (gauss_newton, fisher):  # which have the arguments of a curvature, two of them
        name = curvature.__name__
        raise TypeError(
            f"{where}(curvature=): expected {expected}, got the function {name} itself; call it: {name}(...)."
        )
    roles.curvature(where, expected, curvature=curvature)
