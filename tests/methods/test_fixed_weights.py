"""Weights by hand."""

import jax
import numpy as np
import pytest

import auxjax
from tests.helpers.training_problems import LinearTasks, linear_model, numpy_gradients, state_of

KEY = jax.random.key(0)


def test_an_update_is_the_weighted_sum():
    problem = LinearTasks.make(0, num_tasks=3)
    method = auxjax.methods.get("fixed_weights", weights={"aux1": 0.4, "primary": 2.0})
    context, state = state_of(linear_model(), problem, method=method)
    new, metrics = method.inner(context, state, problem.batch, KEY)
    w = np.asarray(problem.params["w"])
    gradient = np.array([2.0, 0.0, 0.4]) @ numpy_gradients(problem.batch, w)
    np.testing.assert_allclose(new.params["w"], w - 0.1 * gradient, rtol=1e-12)
    assert metrics["weight/aux0"] == 0.0


def test_zero_weights_are_single_task_training():
    problem = LinearTasks.make(0, num_tasks=3)
    found = []
    for name, options in (("fixed_weights", {"weights": {}}), ("stl", {})):
        method = auxjax.methods.get(name, **options)
        context, state = state_of(linear_model(), problem, method=method)
        found.append(method.inner(context, state, problem.batch, KEY)[0].params["w"])
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize(
    ("error", "weights", "piece"),
    [
        (TypeError, 0.5, "expected {task: weight}"),
        (ValueError, {"aux0": float("nan")}, "finite"),
        (ValueError, {"depth": 1.0}, "names 'depth'"),
    ],
)
def test_mistakes_are_named(error, weights, piece):
    with pytest.raises(error, match=piece):
        state_of(linear_model(), LinearTasks.make(0), method=auxjax.methods.get("fixed_weights", weights=weights))
