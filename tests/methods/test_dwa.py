"""Dynamic weight average against its formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import auxjax
from tests.helpers.training_problems import LinearTasks, linear_model, numpy_gradients, numpy_means, state_of

KEY = jax.random.key(0)
TASKS = ("primary", "aux0", "aux1")


@pytest.mark.parametrize("masked", [False, True])
def test_weights_follow_the_windows(masked):
    problem = LinearTasks.make(0, num_tasks=3, masked=masked)
    method = auxjax.methods.get("dwa", window=2, temperature=1.5)
    context, state = state_of(linear_model(masked=masked), problem, method=method)
    w, weights, history = np.asarray(problem.params["w"]), np.ones(3), []
    for update in range(8):
        state, metrics = method.inner(context, state, problem.batch, KEY)
        np.testing.assert_allclose([metrics[f"weight/{task}"] for task in TASKS], weights, rtol=1e-12)
        history.append(numpy_means(problem.batch, w))
        w = w - 0.1 * weights @ numpy_gradients(problem.batch, w)
        if update % 2 and update >= 3:
            ratios = np.mean(history[-2:], axis=0) / np.mean(history[-4:-2], axis=0)
            weights = 3 * np.exp(ratios / 1.5) / np.exp(ratios / 1.5).sum()
    assert np.ptp(weights) > 1e-3


def test_high_temperatures_are_equal_weights():
    problem = LinearTasks.make(0, num_tasks=3)
    method = auxjax.methods.get("dwa", window=1, temperature=1e9)
    context, state = state_of(linear_model(), problem, method=method)
    for _ in range(4):
        state, metrics = method.inner(context, state, problem.batch, KEY)
    np.testing.assert_allclose([metrics[f"weight/{task}"] for task in TASKS], np.ones(3), rtol=1e-8)


def test_a_task_without_labels_has_the_ratio_one():
    problem = LinearTasks.make(0, num_tasks=3, masked=True)
    problem.batch["mask"]["aux0"] = jnp.zeros(8, bool)
    method = auxjax.methods.get("dwa", window=1)
    context, state = state_of(linear_model(masked=True), problem, method=method)
    for _ in range(4):
        state, _ = method.inner(context, state, problem.batch, KEY)
    aux0, aux1, _ = state.method.ratios
    assert aux0 == 1.0
    assert aux1 != 1.0


@pytest.mark.parametrize(
    ("options", "error", "piece"),
    [
        ({"window": 0}, ValueError, "window=0.*whole number >= 1"),
        ({"window": 1.5}, TypeError, "window=1.5.*whole number >= 1"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0.*> 0"),
    ],
)
def test_mistakes_are_named(options, error, piece):
    with pytest.raises(error, match=piece):
        auxjax.methods.get("dwa", **options)


def test_a_window_without_labels_leaves_the_ratio_as_it_is():
    problem = LinearTasks.make(0, num_tasks=3, masked=True)
    method = auxjax.methods.get("dwa", window=1)
    context, state = state_of(linear_model(masked=True), problem, method=method)
    for _ in range(4):
        state, _ = method.inner(context, state, problem.batch, KEY)
    problem.batch["mask"]["aux0"] = jnp.zeros(8, bool)
    new, _ = method.inner(context, state, problem.batch, KEY)
    assert new.method.ratios[0] == state.method.ratios[0] != 1.0


def test_a_loss_that_is_not_finite_is_left_out_of_its_window():
    problem = LinearTasks.make(0, num_tasks=3)
    bad = {**problem.batch, "y": {**problem.batch["y"], "aux0": problem.batch["y"]["aux0"].at[1].set(jnp.nan)}}
    method = auxjax.methods.get("dwa", window=2)
    context, first = state_of(linear_model(), problem, method=method)
    means = numpy_means(problem.batch, np.asarray(problem.params["w"]))
    state = first
    for batch, skipped in ((bad, 1), (problem.batch, 0)):
        state, metrics = method.inner(context, state._replace(params=first.params), batch, KEY)
        assert metrics["skipped"] == skipped
    np.testing.assert_allclose(state.method.last, means[[1, 2, 0]], rtol=1e-12)  # in order of the names
