import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax._internal import tree_math


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norm_neither_underflows_nor_overflows(scale):
    tree = {"a": jnp.asarray([3.0 * scale], jnp.float32), "b": jnp.asarray(4.0 * scale, jnp.float32)}
    np.testing.assert_allclose(tree_math.norm(tree), np.float32(5.0 * scale), rtol=1e-6)


def test_norm_has_its_derivative_and_none_at_zero():
    x = jnp.asarray([3.0, -4.0])
    np.testing.assert_allclose(jax.grad(tree_math.norm)(x), x / 5, rtol=1e-14)
    np.testing.assert_array_equal(jax.grad(tree_math.norm)(jnp.zeros(2)), jnp.zeros(2))


def test_norm_of_what_is_not_finite_is_not_finite():
    for value in (jnp.nan, jnp.inf):
        assert not jnp.isfinite(tree_math.norm(jnp.asarray([1.0, value])))
        assert not tree_math.all_finite({"a": jnp.ones(2), "b": jnp.asarray([1.0, value])})


def test_half_precision_is_summed_in_single_precision():
    ones = jnp.ones(1000, jnp.bfloat16)
    assert tree_math.vdot(ones, ones) == 1000
    assert tree_math.vdot(ones, ones).dtype == jnp.float32


def test_trees_of_mixed_precision():
    x = {"a": jnp.ones(2, jnp.float32), "b": jnp.full((2, 2), 2.0)}
    assert tree_math.vdot(x, x).dtype == jnp.float64
    np.testing.assert_allclose(tree_math.vdot(x, x), 18.0)
    moved = tree_math.add_scaled(x, jnp.float64(0.5), x)
    assert moved["a"].dtype == jnp.float32
    np.testing.assert_allclose(moved["b"], 3.0)
    combined = tree_math.combine(jnp.asarray([1.0, -2.0, 0.5]), [x, x, x])
    np.testing.assert_allclose(combined["a"], -0.5)
    chosen = tree_math.select(jnp.asarray(True), moved, x)
    np.testing.assert_allclose(chosen["a"], 1.5)
