"""Gradients of exactly 0 under optimisers with roots: derivatives of their updates are finite, and the limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from auxjax import BilevelProblem, OptimizerPoint, dense, finite_difference, implicit, one_step, unrolled
from auxjax.hypergrad import optimizer_field, optimizer_fixed_point
from tests.helpers.look_ahead import Point, run

RATE, EPS = 0.1, 0.05
V = jnp.array([1.0, -2.0])
ADAM = optax.adam(RATE, eps=EPS)
OPTIMIZERS = {
    "adam, clipped": optax.chain(optax.clip_by_global_norm(1.0), ADAM),
    "rmsprop": optax.chain(optax.scale_by_rms(0.0, eps=EPS, eps_in_sqrt=False), optax.scale(-RATE)),
    "a branch": optax.apply_if_finite(ADAM, 3),
}
ESTIMATORS = {
    "one step": lambda optimizer: (1, one_step(optimizer)),
    "unrolled": lambda optimizer: (3, unrolled(3, optimizer)),
    "forward": lambda optimizer: (2, unrolled(2, optimizer, mode="forward")),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "adam, clipped")) for kind in OPTIMIZERS]
)
def test_the_derivative_at_zero_is_rate_over_eps(kind, name, ordinary_promotion):
    """inner = m w: each of T updates is -rate m / (|m| + eps)."""
    problem = BilevelProblem(inner=lambda w, m, batch: jnp.sum(m * w), outer=lambda w, m, batch: jnp.sum(w * V))
    steps, estimator = ESTIMATORS[name](OPTIMIZERS[kind])
    grad, info = run(estimator, Point(problem, jnp.ones(2), jnp.zeros(2), None, None))
    np.testing.assert_allclose(grad, -steps * RATE / EPS * V, rtol=1e-12)
    assert np.all(np.isfinite(info.solution))


@pytest.mark.parametrize("size", [0.0, pytest.param(1e-200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*ESTIMATORS, "finite difference"])
def test_a_param_that_nothing_reaches_changes_nothing(name, size, ordinary_promotion):
    """Its gradient is 0, or has a square that is 0 in floating point; the outer loss sees it all the same."""
    x, y = np.random.default_rng(0).normal(size=(2, 4, 3))

    def problem(dead):
        inputs = jnp.concatenate([x, jnp.full((4, dead), size)], axis=1)

        def fit(w, targets):
            return jnp.mean((inputs @ w - targets) ** 2)

        return BilevelProblem(
            inner=lambda w, m, batch: fit(w, y[:, 0]) + jnp.exp(m) * fit(w, y[:, 1]),
            outer=lambda w, m, batch: fit(w, y[:, 2]) + 0.1 * jnp.sum(w**2),
        )

    made = {**ESTIMATORS, "finite difference": lambda optimizer: (1, finite_difference(optimizer, epsilon=1e-4))}
    estimator = made[name](ADAM)[1]
    grads = [run(estimator, Point(problem(dead), jnp.ones(3 + dead), jnp.array(0.3), None, None))[0] for dead in (0, 1)]
    np.testing.assert_allclose(grads[1], grads[0], rtol=1e-7)


def resting():
    """Two params at rest at meta: the hypergradient is v whatever multiplies the field."""
    inner = lambda w, m, batch: jnp.sum(jnp.array([1.0, 4.0]) * (w - m) ** 2) / 2  # noqa: E731
    return BilevelProblem(inner=inner, outer=lambda w, m, batch: jnp.sum(w * V)), jnp.array([0.3, 0.7])


def test_the_field_of_an_optimiser_at_a_gradient_of_zero(ordinary_promotion):
    """The preconditioner rate / eps cancels, and u is that of the inner loss over it."""
    problem, at = resting()
    grad, info = run(implicit(dense()), Point(optimizer_field(problem, ADAM), at, at, None, None))
    np.testing.assert_allclose(grad, V, rtol=1e-12)
    np.testing.assert_allclose(info.solution, EPS / RATE * V / np.array([1.0, 4.0]), rtol=1e-12)


def test_params_and_state_of_an_optimiser_at_a_gradient_of_zero(ordinary_promotion):
    """Second moments of 0 are variables, too: they have no effect where the first moments are 0."""
    problem, at = resting()
    optimizer = optax.chain(optax.scale_by_adam(0.8, 0.9, eps=EPS), optax.scale(-RATE))
    state = jax.tree.map(jnp.asarray, optimizer.init(at))
    state = (state[0]._replace(count=jnp.asarray(1000, jnp.int32)), *state[1:])
    point = Point(optimizer_fixed_point(problem, optimizer), OptimizerPoint(at, state), at, None, None)
    grad, _ = run(implicit(dense()), point)
    np.testing.assert_allclose(grad, V, rtol=1e-9)
