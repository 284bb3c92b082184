"""The identity in place of the inverse: x = scale b.

The cheapest answer to A x = b, known as T1-T2: the inverse Hessian of a hypergradient is replaced with a multiple of
the identity. What it costs in accuracy stands in the residual.

Not for: anything that should know the curvature.
"""

from auxjax._internal import checks, tree_math
from auxjax.interface import Key, PyTree
from auxjax.solvers import base


def identity(*, scale: float = 1.0, rtol: float = 1e-3) -> base.Solver:
    """Solver that leaves the right-hand side as it is.

    `x = scale b`

    Args:
      scale: multiple of `b`; one over the curvature is the right size, and `neumann(0, step)` is the same.
      rtol: relative residual up to which `converged` is True.

    Returns:
      `solve(matvec, b, *, init=None, key=None) -> (x, SolveInfo)`; `init` and `key` are checked and not used.
      Cost: one matrix-vector product, for the residual only.

    Raises:
      TypeError, ValueError: an option is not a finite number, or negative.

    Reference: Luketina, Berglund, Greff, Raiko, 2016, Scalable Gradient-Based Tuning of Continuous Regularization
    Hyperparameters, ICML (T1-T2).
    """
    checks.number("identity", least=0, known=True, scale=scale, rtol=rtol)

    def solve(matvec: base.Matvec, b: PyTree, *, init: PyTree = None, key: Key | None = None):
        system = base.make_system("identity", matvec, b, init, key)
        x = tree_math.scale(scale, system.b)
        return system.restore(x), base.report(system, x, 0.0, rtol, 0)

    return solve
