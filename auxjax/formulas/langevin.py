"""Langevin dynamics: gradient descent with the noise that makes it sample from exp(-loss / temperature).

    theta <- theta - step * grad L(theta) + sqrt(2 * step * temperature) * noise,      noise ~ N(0, I)

For a small step its stationary distribution is proportional to exp(-L / temperature): the posterior, when L is the
negative log-joint of *all* the data. With L a mean over n examples, that takes `temperature = 1 / n`. ARML draws its
parameters so, because its objective is an expectation over the posterior of the weighted joint loss.

`langevin_step` is the update itself. `add_langevin_noise` is its noise alone, as an optax transformation that is
chained after any optimiser:

    optimizer = optax.chain(optax.sgd(step), add_langevin_noise(step, temperature, key))

`optax.noisy_sgd` is another thing: it adds its noise to the gradient, before the learning rate, so what arrives has
standard deviation step * sigma instead of sqrt(2 * step * temperature), and it decays by its own law: as the step gets
small it tends to plain gradient descent, and samples from nothing in particular.

Both draw in at least float32. Integer and boolean leaves have no gradient and pass unchanged.
"""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype


class LangevinState(NamedTuple):
    """State of `add_langevin_noise`.

    Attributes:
      count: int32 scalar, the number of updates made so far.
      key: the typed PRNG key that was given; the noise of update `count` comes from `fold_in(key, count)`.
    """

    count: jax.Array
    key: jax.Array


def langevin_step(params, grads, *, key, step_size, temperature=1.0):
    """One step of unadjusted Langevin dynamics.

    `params - step_size * grads + sqrt(2 * step_size * temperature) * noise`, noise standard normal, independent for
    every element of every leaf. On a quadratic loss with Hessian H the chain's stationary covariance is
    `temperature * (H - step_size * H^2 / 2)^-1`, which tends to that of the posterior as the step gets small.

    Args:
      params: pytree of arrays.
      grads: pytree like `params`, the gradient of the loss.
      key: one typed PRNG key, a fresh one for every step.
      step_size: scalar >= 0.
      temperature: scalar >= 0; 0 is gradient descent.

    Returns:
      A pytree like `params`, with the same dtypes; leaves that are not floating point are returned as they came.

    Raises:
      TypeError: `key` is not a typed key, or a leaf is complex.
      ValueError: `step_size` or `temperature` is a negative Python number, or `grads` is not like `params`.

    Cost: one pass over the parameters; no gradient is computed here.
    Reference: Roberts and Tweedie (1996), section 1.4.1; as used in Shi et al., ARML (NeurIPS 2020), section 3.2.
    """
    where = "langevin_step"
    checks.key(where, key)
    _check_options(where, step_size=step_size, temperature=temperature)
    if jax.tree.structure(params) != jax.tree.structure(grads):
        raise ValueError(
            f"{where}(grads) has another structure than params: {jax.tree.structure(grads)} against "
            f"{jax.tree.structure(params)}. Pass the gradient with respect to these params."
        )

    def move(param, grad, leaf_key):
        if not _is_floating(where, param):
            return param
        if jnp.shape(grad) != jnp.shape(param):
            raise ValueError(f"{where}(grads) has a leaf of shape {jnp.shape(grad)}; expected {jnp.shape(param)}.")
        dtype = accumulation_dtype(param)
        moved = jnp.asarray(param, dtype) - jnp.asarray(step_size, dtype) * jnp.asarray(grad, dtype)
        noise = jax.random.normal(leaf_key, jnp.shape(param), dtype)
        return (moved + _noise_scale(step_size, temperature, dtype) * noise).astype(jnp.result_type(param))

    return jax.tree.map(move, params, grads, _key_per_leaf(key, params))


def add_langevin_noise(step_size, temperature, key) -> optax.GradientTransformationExtraArgs:
    """Adds the noise of Langevin dynamics to updates that are already scaled by the learning rate.

    `updates + langevin_scale * sqrt(2 * step_size * temperature) * noise`. Chain it last; `step_size` must be the
    learning rate of what comes before, or the pair does not sample at this temperature.

    The noise of update number `count` is drawn with `fold_in(key, count)` and depends on nothing else: a run resumed
    from a saved state goes on exactly as if it had not been stopped. Under data parallelism every replica must hold
    the same key, or the replicas drift apart.

    Args:
      step_size: scalar >= 0, or an optax schedule (a function of the count, the first update having count 0).
      temperature: scalar >= 0, or an optax schedule.
      key: one typed PRNG key.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `LangevinState`. Its `update` takes the extra argument
      `langevin_scale` (default 1.0), a number or traced scalar that multiplies the noise: 0 or False switches it off
      without recompiling. A scale of 0 leaves the updates unchanged but the count goes on.

    Raises:
      TypeError: `key` is not a typed key, or (in `update`) a leaf is complex.
      ValueError: `step_size` or `temperature` is a negative Python number.

    Cost: one normal draw per parameter and step.
    Reference: as `langevin_step`.
    """
    where = "add_langevin_noise"
    checks.key(where, key)
    _check_options(where, step_size=step_size, temperature=temperature)

    def init(params) -> LangevinState:
        del params
        return LangevinState(count=jnp.zeros((), jnp.int32), key=key)

    def update(updates, state, params=None, *, langevin_scale=1.0, **extra_args):
        del params, extra_args
        step, heat = (value(state.count) if callable(value) else value for value in (step_size, temperature))

        def add(value, leaf_key):
            if not _is_floating(where, value):
                return value
            dtype = accumulation_dtype(value)
            scale = jnp.asarray(langevin_scale).astype(dtype) * _noise_scale(step, heat, dtype)
            noise = jax.random.normal(leaf_key, jnp.shape(value), dtype)
            return (jnp.asarray(value, dtype) + scale * noise).astype(jnp.result_type(value))

        noisy = jax.tree.map(add, updates, _key_per_leaf(jax.random.fold_in(state.key, state.count), updates))
        return noisy, LangevinState(count=jnp.asarray(optax.safe_increment(state.count)), key=state.key)

    return optax.GradientTransformationExtraArgs(init, update)


def _noise_scale(step_size, temperature, dtype) -> jax.Array:
    """`sqrt(2 * step_size * temperature)`, with derivative 0 instead of NaN where it is 0."""
    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    variance = 2 * jnp.asarray(step_size).astype(dtype) * jnp.asarray(temperature).astype(dtype)
    # `variance == 0`, not `<= 0`: a negative value that only shows at run time must become NaN, and not pass as 0.
    still = variance == zero
    return jnp.where(still, zero, jnp.sqrt(jnp.where(still, one, variance)))


def _key_per_leaf(key, tree):
    """A pytree like `tree` with an independent key for each leaf."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [jax.random.fold_in(key, i) for i in range(len(leaves))])


def _is_floating(where: str, leaf) -> bool:
    if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
        raise TypeError(f"{where} got a complex leaf; expected real ones. Keep real and imaginary parts as two leaves.")
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _check_options(where: str, **options) -> None:
    # Not schedules, nor arrays.
    known: dict[str, Any] = {name: value for name, value in options.items() if isinstance(value, numbers.Real)}
    checks.number(where, least=0, **known)
