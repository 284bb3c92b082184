"""Roots and quotients whose derivatives are finite at 0, and which are what they were elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from auxjax._internal.finite_slopes import finite_slopes

FUNCTIONS = {
    "root": lambda x: 3.0 * x / (jnp.sqrt(x**2) + 0.5),
    "inverse root": lambda x: jnp.where(x > 0, jax.lax.rsqrt(x), x),
    "quotient": lambda x: jnp.where(jnp.abs(x) > 1e-3, 1.0 / x, x),
    "inside jit": jax.jit(lambda x: x / (jnp.sqrt(x**2) + 0.5)),
    "inside a branch": lambda x: jax.lax.cond(x < 1, lambda y: y / (jnp.sqrt(y**2) + 0.5), jnp.sin, x),
    "constants and literals": lambda x: jnp.sqrt(x**2 * jnp.array(2.0)) * x + 2.0 / (x + 1.0),
}
LIMITS = {"root": 6.0, "inverse root": 1.0, "quotient": 1.0, "inside jit": 2.0, "inside a branch": 2.0}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_the_function_and_its_derivatives(name):
    function, finite = FUNCTIONS[name], finite_slopes(FUNCTIONS[name])

    def derivatives(f):
        return jax.jit(lambda x: [jax.grad(f)(x), jax.jacfwd(f)(x), jax.grad(jax.grad(f))(x)])

    found, expected = derivatives(finite), derivatives(function)
    for x in (0.7, 2.0):
        np.testing.assert_array_equal(finite(x), function(x))
        np.testing.assert_allclose(found(x), expected(x), rtol=1e-14)


@pytest.mark.parametrize("name", LIMITS)
def test_is_finite_at_zero_and_the_limit_where_there_is_one(name):
    finite = finite_slopes(FUNCTIONS[name])
    assert finite(0.0) == FUNCTIONS[name](jnp.array(0.0))
    for derivative in (jax.grad, jax.jacfwd, lambda f: jax.jit(jax.grad(f))):
        assert derivative(finite)(0.0) == LIMITS[name]


def test_what_is_not_a_number_stays_so():
    assert np.isnan(jax.grad(finite_slopes(jnp.sqrt))(-1.0))
    assert np.isnan(jax.grad(finite_slopes(lambda x: 1.0 / x))(jnp.nan))


def test_pytrees_vmap_and_half_precision():
    def norms(tree):
        return {"length": jnp.sqrt(jnp.sum(tree["a"] ** 2)), "count": tree["n"] // 2}

    tree = {"a": jnp.zeros((3, 2), jnp.bfloat16), "n": jnp.arange(3)}
    found = jax.vmap(finite_slopes(norms))(tree)
    np.testing.assert_array_equal(found["count"], [0, 0, 1])
    slopes = jax.vmap(jax.grad(lambda a: finite_slopes(norms)({"a": a, "n": jnp.array(1)})["length"]))(tree["a"])
    np.testing.assert_array_equal(slopes, np.zeros((3, 2)))
    assert slopes.dtype == jnp.bfloat16


@pytest.mark.parametrize("clip", [optax.clip_by_global_norm(1.0), optax.adaptive_grad_clip(1.0)])
def test_clipping_a_gradient_of_zero_is_the_identity(clip):
    params = jnp.ones((2, 3))
    update = finite_slopes(clip.update)
    slopes = jax.jacrev(lambda g: update(g, clip.init(params), params)[0])(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(slopes.reshape(6, 6), np.eye(6))
