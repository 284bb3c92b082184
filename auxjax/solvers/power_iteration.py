"""The largest curvature, followed from one outer step to the next by a few products each.

    w <- A w / ||A w||,    bound = ||A w||            A symmetric: bound -> max |eigenvalue|, from below

From one outer step to the next A changes little, so that one product a step keeps up what would take tens from a random
start. `neumann(T, step_size=1 / estimate.bound)` then has the step of its fastest safe convergence: any step below
2 / lambda_max converges, so an estimate up to half too small does no harm.

Not for: matrices whose largest eigenvalues are complex, on which the vector turns and the bound wavers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from auxjax._internal import checks, tree_math
from auxjax._internal.safe_math import inverse_or_zero
from auxjax.interface import Key, PyTree
from auxjax.solvers import base


class PowerEstimate(NamedTuple):
    """Estimate of the largest eigenvalue in size.

    Attributes:
      vector: pytree of unit length, the estimate of its eigenvector.
      bound: scalar, `||A vector||` of the vector before the last product; 0 for the zero matrix.
    """

    vector: Any
    bound: jax.Array


def power_iteration(num_steps: int = 1, *, first_steps: int = 10) -> base.Preparation:
    """A few steps of the power iteration as `prepare` of `amortise`.

    Args:
      num_steps: products per call that resumes from an earlier estimate.
      first_steps: products of the first call, which starts from the right-hand side.

    Returns:
      `prepare(matvec, b, previous, key) -> PowerEstimate`, with `previous` a `PowerEstimate` or `None`. Without
      derivatives. Where a product is not finite, or the vector is zero, it starts again from b.

    Raises:
      TypeError, ValueError: a number of steps that is not a positive integer.
    """
    checks.count("power_iteration", 1, num_steps=num_steps, first_steps=first_steps)

    def prepare(matvec: base.Matvec, b: PyTree, previous: PyTree, key: Key | None):
        system = base.make_system("power_iteration", matvec, b, None, key)
        vector = _unit(system.b)
        if previous is not None:
            usable = tree_math.all_finite(previous.vector) & (tree_math.norm(previous.vector) > 0)
            vector = tree_math.select(usable, tree_math.cast_like(previous.vector, system.b), vector)
        size = jnp.zeros_like(system.norm)
        for _ in range(first_steps if previous is None else num_steps):
            product = system.matvec(vector)
            size = tree_math.norm(product)
            usable = jnp.isfinite(size) & (size > 0)
            vector = tree_math.select(usable, _unit(product), vector)
            size = jnp.where(jnp.isfinite(size), size, jnp.zeros_like(size))
        return jax.lax.stop_gradient(PowerEstimate(vector, size))

    return prepare


def _unit(tree):
    return tree_math.scale(inverse_or_zero(tree_math.norm(tree)), tree)
