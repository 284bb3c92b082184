"""Where the optimiser itself comes to rest, which need not be where the gradient of the inner loss vanishes.

    params+, state+ = params + U(g(params), state, params), S(g(params), state, params)
    fixed point:   U = 0   and   S = state

Decoupled weight decay moves it: AdamW stops where m / sqrt(v) = -decay * params, not where g = 0. Momentum and second
moments are functions of the gradients, and at the fixed point they follow the params. Two bilevel problems say so:
`optimizer_fixed_point`, exact, in the params and the state together, and `optimizer_field`, in the params alone with
the state held fixed, which is exact where the state's own change does not matter: for plain steps, and for Adam as a
preconditioner at a point where g = 0. There the preconditioner cancels from the hypergradient and improves the system.

Not for: getting to the fixed point. `params` and state come from the caller's own training loop.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from auxjax._internal.finite_slopes import finite_slopes
from auxjax.hypergrad import inner_step
from auxjax.hypergrad import problem as problems
from auxjax.hypergrad.problem import BilevelProblem
from auxjax.interface import PyTree, Scalar


class OptimizerPoint(NamedTuple):
    """Inner variables of a problem whose lower level is an optimiser with its state.

    Attributes:
      params: the problem's own params.
      opt_state: the optimiser's state; its floating leaves are variables as well, its counters are held fixed.
    """

    params: PyTree
    opt_state: PyTree


def optimizer_field(
    problem: BilevelProblem, optimizer: optax.GradientTransformation | Scalar, opt_state: PyTree = None
) -> BilevelProblem:
    """The problem whose lower level follows one update of an optimiser, its state held fixed.

    `field(params, meta) = -U(g(params, meta), opt_state, params)`,   g the problem's own field

    Args:
      problem: with an inner loss or an update field.
      optimizer: a step size, or an optax transformation.
      opt_state: its state at the params; `None` for a fresh one.

    Returns:
      A `BilevelProblem` in the same variables with `update_field=`, to be given to `implicit` with a solver for
      matrices that are not symmetric. `neumann(T, step_size=1.0, keep="all")` is then the derivative of the last T + 1
      updates. Where a gradient is exactly 0, the optimiser's derivative is its limit, as in `one_step`.

    Raises:
      TypeError: not a problem; an optimiser that is none.
      ValueError: an `opt_state` of another optimiser (when the estimator runs).

    Reference: Lorraine, Vicol, Duvenaud, 2020, section 3; Choe et al., 2023, Making Scalable Meta Learning Practical
    (SAMA), NeurIPS, section 3.1, for Adam's preconditioner.
    """
    _check_problem("optimizer_field", problem)
    optimizer = inner_step.as_optimizer("optimizer_field", optimizer)

    def field(params, meta, batch):
        level = problems.make_level("optimizer_field", problem, params, meta)
        theta, state = inner_step.start("optimizer_field", optimizer, opt_state, level.theta)
        updates, _ = finite_slopes(optimizer.update)(_gradients(problem, level, batch), state, theta)
        update = level.merge(_negative(updates, theta))
        return (update, ()) if problem.has_aux else update

    return dataclasses.replace(problem, inner=None, update_field=field, symmetric=False)


def optimizer_fixed_point(problem: BilevelProblem, optimizer: optax.GradientTransformation | Scalar) -> BilevelProblem:
    """The problem whose inner variables are the params and the optimiser's state together.

    `field(params, state) = (-U(g(params), state, params), state - S(g(params), state, params))`

    Exact for any optimiser that has come to rest: the Jacobian counts how momentum and second moments follow the
    params. The inner variables are an `OptimizerPoint(params, opt_state)`.

    Args:
      problem: with an inner loss or an update field; its mask holds for the params.
      optimizer: a step size, or an optax transformation. Where a gradient is exactly 0, its derivative is the limit, as
        in `one_step`.

    Returns:
      A `BilevelProblem` with `update_field=`, whose `params` are an `OptimizerPoint`. The system is not symmetric and
      (1 + number of moments) times as large; `gmres`, or `neumann(T, step_size=1.0, keep="all")`, which is the
      derivative of the last T + 1 updates of params and state. Hyper-parameters that are kept in the state as floats
      (`optax.inject_hyperparams`) make it singular: use the optimiser without them.

    Raises:
      TypeError: not a problem; an optimiser that is none; params that are not an `OptimizerPoint` (when it runs).
    """
    _check_problem("optimizer_fixed_point", problem)
    optimizer = inner_step.as_optimizer("optimizer_fixed_point", optimizer)

    def field(point, meta, batch):
        _check_point(point)
        level = problems.make_level("optimizer_fixed_point", problem, point.params, meta)
        theta, state = inner_step.start("optimizer_fixed_point", optimizer, point.opt_state, level.theta)
        updates, new_state = finite_slopes(optimizer.update)(_gradients(problem, level, batch), state, theta)
        still = jax.tree.map(_difference, state, new_state)
        update = OptimizerPoint(level.merge(_negative(updates, theta)), still)
        return (update, ()) if problem.has_aux else update

    def outer(point, meta, batch):
        _check_point(point)
        return problem.outer(point.params, meta, batch)

    mask = problem.mask
    if callable(mask):
        inside = mask

        def in_params(path):
            where, _, rest = path.partition("/")
            return where == "opt_state" or inside(rest)

        mask = in_params
    elif mask is not None:
        mask = OptimizerPoint(mask, True)
    return dataclasses.replace(problem, inner=None, update_field=field, symmetric=False, outer=outer, mask=mask)


def _gradients(problem: BilevelProblem, level: problems.Level, batch):
    """The problem's own field, like `level.theta`, averaged over replicas.

    Its derivative stays local and is averaged where it is used: no collective is differentiated.
    """
    local = inner_step.field_values(problem, level, level.theta, level.meta, batch)
    mean = level.reduce(jax.lax.stop_gradient(local))
    return jax.tree.map(lambda a, b: a + (b - jax.lax.stop_gradient(b)), mean, local)


def _negative(updates, theta):
    """Minus the update, which must not be the difference of params that are rounded to themselves."""
    return jax.tree.map(lambda leaf, like: -leaf.astype(like.dtype), updates, theta)


def _difference(old, new):
    return old - new if jnp.issubdtype(old.dtype, jnp.floating) else old


def _check_problem(where: str, problem) -> None:
    if not isinstance(problem, BilevelProblem):
        raise TypeError(f"{where}: expected a BilevelProblem first, got {type(problem).__name__}.")


def _check_point(point) -> None:
    if not isinstance(point, OptimizerPoint):
        raise TypeError(
            f"optimizer_fixed_point: params are {type(point).__name__}; expected OptimizerPoint(params, opt_state)."
        )
