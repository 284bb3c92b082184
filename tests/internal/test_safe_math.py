"""Divisors are never zero."""

import jax
import jax.numpy as jnp
import numpy as np

from auxjax._internal.safe_math import inverse_or_zero, positive_or_one


def test_what_is_not_positive_becomes_one():
    x = jnp.array([2.0, 0.0, -1.0, jnp.nan, jnp.inf])
    np.testing.assert_array_equal(positive_or_one(x), [2.0, 1.0, 1.0, 1.0, np.inf])


def test_what_has_no_inverse_becomes_zero():
    x = jnp.array([2.0, 0.0, -1.0, jnp.nan, jnp.inf])
    np.testing.assert_array_equal(inverse_or_zero(x), [0.5, 0.0, 0.0, 0.0, 0.0])


def test_a_quotient_that_is_not_used_has_no_nan_in_its_derivative():
    slope = jax.grad(inverse_or_zero)
    assert slope(0.0) == 0.0
    assert slope(2.0) == -0.25
