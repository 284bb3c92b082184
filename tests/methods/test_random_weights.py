"""Random weights: their distribution, and that they are drawn when they should be."""

import jax
import numpy as np
import pytest

import auxjax
from tests.helpers.training_problems import LinearTasks, linear_model, numpy_gradients, state_of

KEY = jax.random.key(0)
TASKS = ("primary", "aux0", "aux1")


@pytest.mark.parametrize("distribution", ["normal", "dirichlet"])
@pytest.mark.parametrize("weigh_primary", [True, False])
def test_weights_sum_to_the_number_of_tasks_and_train(distribution, weigh_primary):
    problem = LinearTasks.make(0, num_tasks=3)
    method = auxjax.methods.get("random_weights", distribution=distribution, weigh_primary=weigh_primary)
    context, state = state_of(linear_model(), problem, method=method)
    new, metrics = method.inner(context, state, problem.batch, KEY)
    weights = np.array([metrics[f"weight/{task}"] for task in TASKS])
    np.testing.assert_allclose(weights.sum(), 3.0, rtol=1e-12)
    assert np.all(weights > 0)
    if not weigh_primary:
        assert weights[0] == 1.0
    w = np.asarray(problem.params["w"])
    np.testing.assert_allclose(new.params["w"], w - 0.1 * weights @ numpy_gradients(problem.batch, w), rtol=1e-12)


@pytest.mark.parametrize("distribution", ["normal", "dirichlet"])
def test_mean_and_variance(distribution):
    """Dirichlet(1, 1, 1) times 3: mean 1 and variance 9 * 2 / (9 * 4) = 1/2. The softmax has mean 1 by symmetry."""
    problem = LinearTasks.make(0, num_tasks=3)
    method = auxjax.methods.get("random_weights", distribution=distribution)
    context, _ = state_of(linear_model(), problem)
    _, state = state_of(linear_model(), problem)
    drawn = jax.vmap(lambda key: method.init(context, state, problem.batch, key))(jax.random.split(KEY, 4000))
    for weights in drawn.values():
        np.testing.assert_allclose(weights.mean(), 1.0, atol=4 * np.std(weights) / np.sqrt(4000))
        if distribution == "dirichlet":
            np.testing.assert_allclose(weights.var(), 0.5, rtol=0.1)


@pytest.mark.parametrize("redraw", [True, False])
def test_drawn_once_or_anew(redraw):
    problem = LinearTasks.make(0, num_tasks=3)
    method = auxjax.methods.get("random_weights", redraw=redraw)
    context, state = state_of(linear_model(), problem, method=method)
    found = []
    for index in range(2):
        state, metrics = method.inner(context, state, problem.batch, jax.random.fold_in(KEY, index))
        found.append(metrics["weight/aux0"])
    assert (found[0] == found[1]) == (not redraw)


def test_without_auxiliary_tasks_the_primary_one_has_weight_one():
    problem = LinearTasks.make(0, num_tasks=1)
    for weigh_primary in (True, False):
        method = auxjax.methods.get("random_weights", weigh_primary=weigh_primary)
        context, state = state_of(linear_model(), problem, method=method)
        _, metrics = method.inner(context, state, problem.batch, KEY)
        assert metrics["weight/primary"] == 1.0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'normal' or 'dirichlet'"):
        auxjax.methods.get("random_weights", distribution="uniform")
