"""OL_AUX against its formula in NumPy, and against the decrease of the primary loss that it follows."""

import jax
import numpy as np
import optax
import pytest

import auxjax
from tests.helpers.training_problems import LinearTasks, linear_model, numpy_gradients, numpy_means, state_of

KEY = jax.random.key(0)


def products(batch, w):
    rows = numpy_gradients(batch, w)
    return rows[1:] @ rows[0]


@pytest.mark.parametrize("masked", [False, True])
def test_n_step_form_adds_up_the_products_of_all_inner_updates(masked):
    problem = LinearTasks.make(0, num_tasks=3, masked=masked)
    method = auxjax.methods.get("ol_aux", outer_optimizer=optax.sgd(0.2))
    context, state = state_of(linear_model(masked=masked), problem, method=method)
    w, weights = np.asarray(problem.params["w"]), np.ones(2)
    for _ in range(2):
        total = np.zeros(2)
        for _ in range(3):
            state, _ = method.inner(context, state, problem.batch, KEY)
            total += products(problem.batch, w)
            w = w - 0.1 * np.array([1.0, *weights]) @ numpy_gradients(problem.batch, w)
        state, metrics = method.outer(context, state, problem.batch, None, KEY)
        weights = weights + 0.2 * total
        np.testing.assert_allclose(state.method.weights, weights, rtol=1e-12)
        np.testing.assert_allclose(
            [metrics["gradient_product/aux0"], metrics["gradient_product/aux1"]], total, rtol=1e-11
        )
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-12)


@pytest.mark.parametrize("clamp", [False, True])
def test_one_step_form(clamp):
    problem = LinearTasks.make(6, num_tasks=4)
    method = auxjax.methods.get("ol_aux", form="one_step", outer_optimizer=optax.sgd(20.0), clamp=clamp)
    context, state = state_of(linear_model(), problem, method=method)
    state, _ = method.outer(context, state, problem.batch, None, KEY)
    wanted = 1 + 20.0 * products(problem.batch, np.asarray(problem.params["w"]))
    assert wanted.min() < 0 < wanted.max()
    np.testing.assert_allclose(state.method.weights, np.maximum(wanted, 0) if clamp else wanted, rtol=1e-12)


def test_it_climbs_the_decrease_of_the_primary_loss():
    """The products are the derivative in w of -L_0(theta - eta g(w)) / eta as eta goes to 0."""
    problem, eta, delta = LinearTasks.make(0, num_tasks=3), 1e-5, 1e-3
    w = np.asarray(problem.params["w"])
    rows = numpy_gradients(problem.batch, w)

    def decrease(weights):
        return -numpy_means(problem.batch, w - eta * np.array([1.0, *weights]) @ rows)[0] / eta

    slopes = [(decrease(np.ones(2) + delta * e) - decrease(np.ones(2) - delta * e)) / (2 * delta) for e in np.eye(2)]
    np.testing.assert_allclose(products(problem.batch, w), slopes, rtol=1e-3)


@pytest.mark.parametrize("options", [{"form": "two_step"}, {"initial": float("inf")}])
def test_mistakes_are_named(options):
    with pytest.raises(ValueError, match="ol_aux"):
        auxjax.methods.get("ol_aux", **options)
