"""Divisors that are never zero, so that neither a quotient nor its derivative is NaN where it is not used."""

import jax
import jax.numpy as jnp


def positive_or_one(x: jax.Array) -> jax.Array:
    """`x` where it is positive, and 1 elsewhere (NaN included)."""
    return jnp.where(x > 0, x, jnp.ones_like(x))


def inverse_or_zero(x: jax.Array) -> jax.Array:
    """`1 / x` where `x` is positive, and 0 elsewhere (NaN and infinity included)."""
    return jnp.where(x > 0, 1.0 / positive_or_one(x), jnp.zeros_like(x))
