"""The one-step hypergradient without second derivatives: its mixed product by a central difference.

    u^T d_meta grad inner(params) ~ ||u|| (d_meta inner(after) - d_meta inner(before)) / (2 epsilon)
    after = params + epsilon u / ||u||,     before = params - epsilon u / ||u||

with u as in the one-step estimator: for a plain step, u = step_size * v with v the outer gradient at params+. The
product's error is at most epsilon^2 / 6 ||u|| times the gradient in `meta` of the inner loss's third derivative along
u / ||u||, plus rounding of the order of eps / epsilon, where eps = 1e-7 in float32. At epsilon = 0.01 both are usually
far below the error of looking ahead by one step only. It is the first-order variant of DARTS, MAXL and Auto-Lambda,
with the direct part, which some public code leaves out.

Not for: update fields, which have no loss to difference; params in half precision, which round the displacement away.
"""

import jax
import optax

from auxjax._internal import checks, tree_math
from auxjax._internal.safe_math import positive_or_one
from auxjax.hypergrad import inner_step
from auxjax.hypergrad import problem as problems
from auxjax.hypergrad.problem import BilevelProblem, Estimator
from auxjax.interface import PyTree, Scalar
from auxjax.solvers import base


def finite_difference(
    optimizer: optax.GradientTransformation | Scalar,
    *,
    epsilon: Scalar = 0.01,
    opt_state: PyTree = None,
    rtol: float = 1e-3,
) -> Estimator:
    """Estimator of one-step hypergradients by finite differences of the inner loss's gradient in `meta`.

    `meta_grad = d_meta outer(params+, meta) - ||u|| (d_meta inner(after) - d_meta inner(before)) / (2 epsilon)`

    Args:
      optimizer: a step size (a number or a scalar array), or an optax transformation, as in `one_step`; but params
        whose gradient is and was exactly 0 take no part where the optimiser has no derivative in floating point (Adam).
      epsilon: length of the displacement of `params`; the literature's 0.01 / ||v|| times v is a displacement of 0.01.
      opt_state: the optimiser's real state at `params`; `None` for a fresh one. It is held fixed.
      rtol: relative residual up to which `converged` is True.

    Returns:
      `estimator(problem, params, meta, inner_batch, outer_batch, *, key=None, init=None) -> (meta_grad, info)`, as
      `one_step` has it. `relative_residual` and `min_curvature` are differences as well: J u comes with the same two
      gradients. `num_matvecs` is 0, no second derivatives being taken.

      Cost: three inner gradients and one outer gradient; no forward mode, so that losses with `jax.custom_vjp`
      functions are welcome.

    Raises:
      TypeError, ValueError: an option of the wrong type or out of range; an `opt_state` of another optimiser, or a
        problem with an update field or with params in half precision (from the estimator).

    Reference: Liu, Simonyan, Yang, 2019, DARTS: Differentiable Architecture Search, ICLR, equation 8.
    """
    optimizer = inner_step.as_optimizer("finite_difference", optimizer)
    checks.number("finite_difference", least=0, known=True, rtol=rtol)
    checks.number("finite_difference", above=0, epsilon=epsilon)

    def estimator(problem: BilevelProblem, params, meta, inner_batch, outer_batch, *, key=None, init=None):
        level = problems.make_level("finite_difference estimator", problem, params, meta)
        if problem.inner is None:
            raise ValueError(
                "finite_difference: expected a BilevelProblem(inner=), got one with update_field=: it differences the "
                "inner loss. Use one_step, which takes the same derivative of a field exactly."
            )
        inner_step.check_arguments("finite_difference estimator", level, key, init)
        _check_precision(level.theta, epsilon)
        field = inner_step.field_values(problem, level, level.theta, level.meta, inner_batch)
        point = ("finite_difference", problem, level, optimizer, opt_state, field, outer_batch)
        outer, u = inner_step.look_ahead(*point, limits=False)
        curvature, through = _difference(problem, level, inner_batch, u, epsilon)
        system = base.make_system("finite_difference", lambda _: curvature, outer.v, None, None)
        # The report counts one product of its own, which here was a difference of gradients.
        report = base.report(system, tree_math.cast_like(u, system.b), 0.0, rtol, -1)
        return problems.conclude(level, outer, through, field, u, report)

    return estimator


def _check_precision(theta, epsilon) -> None:
    half = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(theta) if leaf.dtype.itemsize < 4})
    if half:
        raise ValueError(
            f"finite_difference moves the params by {epsilon} in all, which {half[0]} rounds away. Use one_step, which "
            "differentiates exactly, or params in float32 that the model casts itself."
        )


def _difference(problem, level, batch, u, epsilon):
    """`(J u, u^T d_meta grad inner)` by a central difference along u; zeros when u = 0."""
    gradients = jax.grad(problems.inner_loss(problem, level, batch), argnums=(0, 1))
    size = tree_math.norm(u)
    unit = tree_math.scale(1.0 / positive_or_one(size), u)
    after = gradients(tree_math.add_scaled(level.theta, epsilon, unit), level.meta)
    before = gradients(tree_math.add_scaled(level.theta, -epsilon, unit), level.meta)
    return level.reduce(tree_math.scale(size / (2 * epsilon), tree_math.add_scaled(after, -1.0, before)))
