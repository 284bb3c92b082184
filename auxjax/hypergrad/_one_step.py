"""One-step look-ahead: the hypergradient of the outer loss after a single update of the lower level.

    params+(meta) = params + U(field(params, meta))
    d/d meta outer(params+(meta), meta) = d_meta outer(params+, meta) - u^T d_meta field(params, meta)

with `u = -(dU/dg)^T d_params outer(params+, meta)`; for a plain step u = step_size * v. It is what MAXL and WAMAL
follow, DARTS at second order, and, up to the point at which v is taken, T1-T2. As an approximation of the implicit
hypergradient it replaces the inverse Hessian with a multiple of the identity.

Not for: knowing the curvature. The residual in `HypergradInfo` says how far the identity is from the inverse.
"""

import optax

from auxjax._internal import checks, linear_maps, tree_math
from auxjax.hypergrad import inner_step
from auxjax.hypergrad import problem as problems
from auxjax.hypergrad._implicit import linearise
from auxjax.hypergrad.problem import BilevelProblem, Estimator
from auxjax.interface import PyTree, Scalar
from auxjax.solvers import base


def one_step(
    optimizer: optax.GradientTransformation | Scalar,
    *,
    opt_state: PyTree = None,
    rtol: float = 1e-3,
    products: str | None = None,
) -> Estimator:
    """Estimator of hypergradients through one update of the lower level.

    `meta_grad = d/d meta outer(params + U(field(params, meta)), meta)`, exactly

    Args:
      optimizer: a step size (a number or a scalar array), or an optax transformation, whose update is differentiated
        in the gradient; where a gradient is exactly 0, at its limit (for Adam, whose root has none, rate / eps).
      opt_state: the optimiser's real state at `params`, so that the look-ahead is the step that training would take;
        `None` for a fresh one. It is held fixed. To look ahead from the state of a training step, call the factory
        inside that step.
      rtol: relative residual up to which `converged` is True.
      products: "forward", or "reverse" for losses with `jax.custom_vjp` operations, see `BilevelProblem`. `None` for
        what the problem says.

    Returns:
      `estimator(problem, params, meta, inner_batch, outer_batch, *, key=None, init=None) -> (meta_grad, info)`.

      `meta_grad` is a pytree like `meta`, the whole derivative with its true sign and scale, direct part included.
      `info` is a `HypergradInfo`: `solution` is u, `relative_residual` is `||v - J^T u|| / ||v||` with v the outer
      gradient at params+ and J at `params`, where `inner_grad_norm` is measured as well. It judges the estimate as an
      approximation of the implicit hypergradient; as the derivative of the look-ahead it is exact. `key` and `init`
      are checked and not used. Leaves of `params` that are not floating are held fixed, and the optimiser does not
      see them.

      Cost: one inner and one outer gradient, one forward-mode pass for the mixed derivative (a reverse pass for an
      update field), and one matrix-vector product for the residual, which jit drops when nobody reads it.

    Raises:
      TypeError, ValueError: an option of the wrong type or out of range; an `opt_state` of another optimiser (from the
        estimator).

    Reference: Luketina, Berglund, Greff, Raiko, 2016, Scalable Gradient-Based Tuning of Continuous Regularization
    Hyperparameters, ICML; Liu, Simonyan, Yang, 2019, DARTS, ICLR, equation 7; Liu, Davison, Johns, 2019,
    Self-Supervised Generalisation with Meta Auxiliary Learning, NeurIPS.
    """
    optimizer = inner_step.as_optimizer("one_step", optimizer)
    checks.number("one_step", least=0, known=True, rtol=rtol)
    linear_maps.check("one_step", products, None)

    def estimator(problem: BilevelProblem, params, meta, inner_batch, outer_batch, *, key=None, init=None):
        problem = problems.with_products(problem, products)
        level = problems.make_level("one_step estimator", problem, params, meta)
        inner_step.check_arguments("one_step estimator", level, key, init)
        field, matvec, mixed = linearise(problem, level, inner_batch)
        outer, u = inner_step.look_ahead("one_step", problem, level, optimizer, opt_state, field, outer_batch)
        system = base.make_system("one_step", matvec, outer.v, None, None)
        report = base.report(system, tree_math.cast_like(u, system.b), 0.0, rtol, 0)
        return problems.conclude(level, outer, mixed(u), field, u, report)

    return estimator
