"""One update of the lower level's own optimiser, as a pure function: what look-ahead and unrolling differentiate.

    theta+, state+ = theta + U(g, state, theta), ...      g = field(theta, meta, batch)

U is a plain step, `U = -step_size g`, or any optax transformation with its real state.

Not for: training. Nothing is kept; callers that need the new params must recompute the step, with the optimiser itself.
"""

import math

import jax
import jax.core
import jax.numpy as jnp
import optax

from auxjax._internal import checks, optimizers, tree_math
from auxjax._internal.finite_slopes import finite_slopes
from auxjax.hypergrad import problem as problems


def as_optimizer(where: str, optimizer) -> optax.GradientTransformation:
    """An optax transformation: the given one, or a plain gradient step of the given size.

    Raises:
      TypeError: neither a number nor an optax transformation.
      ValueError: a step size that is not positive or not a scalar.
    """
    if callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None)):
        return optimizer
    if isinstance(optimizer, bool) or not (isinstance(optimizer, int | float) or hasattr(optimizer, "dtype")):
        raise TypeError(
            f"{where}(optimizer=): expected a step size or an optax transformation, got {type(optimizer).__name__}."
        )
    if jnp.shape(optimizer) != ():
        raise ValueError(
            f"{where}(optimizer=): expected one step size and got an array of shape {jnp.shape(optimizer)}."
        )
    if not checks.is_traced(optimizer) and not (math.isfinite(optimizer) and optimizer > 0):
        raise ValueError(f"{where}(optimizer={optimizer}): expected a finite step size > 0.")

    def update(updates, state, params=None):
        del params
        return tree_math.scale(-jnp.asarray(optimizer), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def start(where: str, optimizer: optax.GradientTransformation, opt_state, theta):
    """The variables and the state that the first step starts from: `(theta, opt_state)`, strongly typed.

    Raises:
      TypeError: an optimiser that needs more than gradients.
      ValueError: an `opt_state` that is not like `optimizer.init(params)`.
    """
    theta = _typed_like(theta, theta)
    if opt_state is None:
        opt_state = optimizer.init(theta)
    else:
        checks.like(f"{where}(opt_state=)", opt_state, jax.eval_shape(optimizer.init, theta), "optimizer.init(params)")
        opt_state = jax.tree.map(jnp.asarray, opt_state)
    optimizers.check_needs_gradients_alone(f"{where}(optimizer=)", optimizer, opt_state, theta)
    return theta, _typed_like(opt_state, opt_state)


def advance(optimizer: optax.GradientTransformation, theta, opt_state, gradients):
    """The variables and the state after one step; dtypes stay, so that the step can be scanned.

    Differentiable also where a gradient is and was 0, behind a dead unit or of a class that is absent, so that Adam's
    v = 0: the derivative of its update is rate / eps there.
    """
    updates, new_state = finite_slopes(optimizer.update)(gradients, opt_state, theta)
    return optax.apply_updates(theta, updates), _typed_like(new_state, opt_state)


def field_values(problem: problems.BilevelProblem, level: problems.Level, theta, meta, batch):
    """The lower level's field at any `theta` and `meta`, before any reduction."""
    if problem.inner is not None:
        return jax.grad(problems.inner_loss(problem, level, batch))(theta, meta)
    return problems.update_field(problem, level, batch)(theta, meta)


def look_ahead(where, problem, level, optimizer, opt_state, field, outer_batch, *, limits=True):
    """One step ahead: the outer gradients there, and the solution u that stands for the step.

    `u = -(dU/dg)^T v`, v the outer gradient in `params` at `theta + U(g)`; `u = step_size v` for a plain step

    Args:
      field: the lower level's field at `level.theta`, not reduced yet.
      limits: what an entry of u is whose gradient is 0, or has a square that is, and at which the optimiser has a root
        without a derivative (Adam's, where v = 0). True: the limit, for Adam v rate / eps. False: 0, as the optimiser
        does not move that param; for estimators that displace the params along u, where an entry 1 / eps times larger
        than the others, on which the inner loss does not even depend, would leave nothing of them.

    Returns:
      `(outer, u)`: the `OuterValue` at the new variables, and u.

    Raises:
      TypeError, ValueError: as `start`; an optimiser that accumulates gradients.
    """
    theta, opt_state = start(where, optimizer, opt_state, level.theta)
    if optimizers.accumulates(opt_state):
        raise ValueError(
            f"{where}(optimizer=): this one adds up gradients over several updates and moves nothing in between, so "
            "that a step ahead has no derivative. Give the transformation that is inside (of optax.MultiSteps)."
        )
    field = level.reduce(field)

    def step(update):
        return jax.vjp(lambda g: optax.apply_updates(theta, update(g, opt_state, theta)[0]), field)

    ahead, pull = step(finite_slopes(optimizer.update))
    outer = problems.outer_gradients(problem, level._replace(theta=ahead), outer_batch)
    u = tree_math.scale(-1.0, pull(outer.v)[0])
    if limits:
        return outer, u

    def without_dead(entry, plain, g, v):
        # 1e4: what averages of squares multiply a new one with, 1 - b2, is above 1e-4.
        dead = (jnp.square(g) <= 1e4 * float(jnp.finfo(g.dtype).tiny)) & jnp.isfinite(v)
        return jnp.where(dead & ~jnp.isfinite(plain), jnp.zeros_like(entry), entry)

    return outer, jax.tree.map(without_dead, u, step(optimizer.update)[1](outer.v)[0], field, outer.v)


def check_arguments(where: str, level: problems.Level, key, init) -> None:
    """Checks the arguments that every estimator takes, for those that use neither.

    Raises:
      TypeError: an old-style `key`.
      ValueError: an `init` that is not like `params`.
    """
    if key is not None:
        checks.key(where, key)
    if init is not None:
        checks.like(f"{where}(init=)", problems.floating_part(f"{where}(init=)", init, level), level.theta, "params")


def _typed_like(tree, like):
    def cast(leaf, old):
        old = jnp.asarray(old)
        return leaf if jnp.issubdtype(old.dtype, jax.dtypes.extended) else jax.lax.convert_element_type(leaf, old.dtype)

    return jax.tree.map(cast, tree, like)
