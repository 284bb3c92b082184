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


def _trained(weights, ids=None, at=None):
    """Params after one update on `LinearTasks`, whose batch then says where its examples stand."""
    problem = LinearTasks.make(0, num_tasks=3)
    method = auxjax.methods.get("fixed_weights", weights=weights, ids=ids)
    context, state = state_of(linear_model(), problem, method=method)
    return method.inner(context, state._replace(step=np.int32(3)), problem.batch, KEY)[0].params["w"]


def test_schedules_and_tables_are_numbers_where_they_agree():
    count = LinearTasks.make(0, num_tasks=3).batch["y"]["primary"].shape[0]
    places = np.arange(count)[::-1].copy()
    by_number = _trained({"aux1": 0.6})
    np.testing.assert_allclose(_trained({"aux1": lambda step: 0.2 * step}), by_number, rtol=1e-12)
    np.testing.assert_allclose(_trained({"aux1": np.full(count, 0.6)}, lambda batch: places), by_number, rtol=1e-12)


def test_a_table_weighs_each_example():
    problem = LinearTasks.make(0, num_tasks=3)
    count = problem.batch["y"]["primary"].shape[0]
    table = np.linspace(0.0, 2.0, count)
    places = np.arange(count)[::-1].copy()
    method = auxjax.methods.get("fixed_weights", weights={"primary": table}, ids=lambda batch: {"primary": places})
    context, state = state_of(linear_model(), problem, method=method)
    found = method.weights(context, state, problem.batch, KEY)
    np.testing.assert_array_equal(found["primary"], table[::-1])
    other = state._replace(method={"primary": 0 * state.method["primary"] + 1})
    plain = method.inner(context, other, problem.batch, KEY)[0].params["w"]
    np.testing.assert_allclose(plain, _trained({}), rtol=1e-12)


def test_tables_without_ids_are_refused():
    with pytest.raises(ValueError, match="expected ids="):
        auxjax.methods.get("fixed_weights", weights={"aux0": np.ones(3)})
    with pytest.raises(ValueError, match=r"got an array of shape \[2, 2\]"):
        auxjax.methods.get("fixed_weights", weights={"aux0": np.ones((2, 2))}, ids=lambda batch: 0)
    with pytest.raises(ValueError, match="gives task 'aux0' int32"):
        state_of(
            linear_model(),
            LinearTasks.make(0),
            method=auxjax.methods.get(
                "fixed_weights", weights={"aux0": np.ones(3)}, ids=lambda batch: np.zeros(1, np.int32)
            ),
        )
