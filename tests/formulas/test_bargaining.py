"""Bargaining weights: the equation they solve, their derivative, and cases with a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax.formulas.bargaining import bargaining_weights


def problem(seed, count=4, rank=6):
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(count, rank)) + 0.5
    return jnp.array(gradients @ gradients.T), jnp.array(rng.dirichlet(np.ones(count)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_solves_the_equation(seed, scale):
    gram, powers = problem(seed)
    weights = bargaining_weights(scale * gram, powers, damping=0.0)
    assert np.all(weights > 0)
    np.testing.assert_allclose(scale * gram @ weights, powers / weights, rtol=1e-9)
    np.testing.assert_allclose(weights @ (scale * gram) @ weights, 1.0, rtol=1e-10)  # an update of length 1


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_derivative_is_the_implicit_one(seed):
    gram, powers = problem(seed)
    jacobian = jax.jacrev(lambda p: bargaining_weights(gram, p))(powers)
    numeric = [
        (bargaining_weights(gram, powers + d) - bargaining_weights(gram, powers - d)) / 2e-6
        for d in 1e-6 * jnp.eye(len(powers))
    ]
    np.testing.assert_allclose(jacobian, np.array(numeric).T, rtol=1e-5, atol=1e-7)
    weights = bargaining_weights(gram, powers, damping=0.0)
    wanted = np.linalg.solve(gram + np.diag(powers / weights**2), np.diag(1 / weights))
    np.testing.assert_allclose(jacobian, wanted, rtol=1e-4)
    in_gram = jax.jvp(lambda g: bargaining_weights(g, powers), (gram,), (gram,))[1]
    np.testing.assert_allclose(in_gram, -weights / 2, rtol=1e-4)  # a scales as G^(-1/2)


def test_orthogonal_gradients():
    lengths, powers = jnp.array([1.0, 10.0, 0.1]), jnp.array([0.2, 0.3, 0.5])
    weights = bargaining_weights(jnp.diag(lengths**2), powers, damping=0.0)
    np.testing.assert_allclose(weights, jnp.sqrt(powers) / lengths, rtol=1e-12)


def test_gradients_that_oppose_each_other_exactly_leave_finite_weights():
    gram = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    weights = bargaining_weights(gram, jnp.array([0.5, 0.5]))
    assert np.all(np.isfinite(weights))
    np.testing.assert_allclose(weights[0], weights[1], rtol=1e-6)


def test_a_task_without_a_gradient_has_weight_zero():
    gram = jnp.array([[4.0, 0.0], [0.0, 0.0]])
    weights = bargaining_weights(gram, jnp.array([0.25, 0.75]), damping=0.0)
    np.testing.assert_allclose(weights, [0.25, 0.0], rtol=1e-12)


def test_single_precision_jit_and_vmap(single_precision):
    grams, powers = zip(*(problem(seed) for seed in range(3)), strict=True)
    grams, powers = (jnp.stack([jnp.asarray(a, jnp.float32) for a in part]) for part in (grams, powers))
    found = jax.jit(jax.vmap(bargaining_weights))(grams, powers)
    for gram, power, weights in zip(grams, powers, found, strict=True):
        np.testing.assert_allclose(gram @ weights, power / weights, rtol=2e-3)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"powers\[3\]"):
        bargaining_weights(jnp.eye(2), jnp.ones(3))


def test_weights_grow_as_the_root_of_the_powers():
    gram, powers = problem(0)
    np.testing.assert_allclose(bargaining_weights(gram, 4 * powers), 2 * bargaining_weights(gram, powers), rtol=1e-10)


def test_gradients_that_oppose_each_other_exactly_in_single_precision(single_precision):
    """The rounding of the Gram matrix must not decide: permuting the tasks permutes weights and keeps the update."""
    rng = np.random.default_rng(1)
    solve = jax.jit(bargaining_weights)
    powers = jnp.full(4, 0.25)
    for _ in range(30):
        gradients = rng.normal(size=(4, 9)).astype(np.float32)
        gradients[3] = -gradients[:3].sum(axis=0)
        places = rng.permutation(4)
        moved = gradients[places]
        weights, others = (np.asarray(solve(jnp.array(g @ g.T), powers)) for g in (gradients, moved))
        np.testing.assert_allclose(others, weights[places], rtol=1e-2)
        lengths = np.linalg.norm(gradients, axis=1)
        assert np.max(weights * lengths) < 1 / np.sqrt(1.2e-4)
