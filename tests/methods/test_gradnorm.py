"""GradNorm against its formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from tests.helpers.training_problems import LinearTasks, linear_model, numpy_gradients, numpy_means, state_of

KEY = jax.random.key(0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weigh_primary", [True, False])
def test_updates_are_the_formulas(weigh_primary, masked):
    problem = LinearTasks.make(0, num_tasks=4, masked=masked)
    method = auxjax.methods.get(
        "gradnorm", outer_optimizer=optax.sgd(0.05), asymmetry=0.8, weigh_primary=weigh_primary, chunk=3
    )
    context, state = state_of(linear_model(masked=masked), problem, method=method)
    part = slice(0 if weigh_primary else 1, None)
    w, weights = np.asarray(problem.params["w"]), np.ones(4)
    first = numpy_means(problem.batch, w)
    for _ in range(3):
        state, _ = method.inner(context, state, problem.batch, KEY)
        w = w - 0.1 * weights @ numpy_gradients(problem.batch, w)
        state, metrics = method.outer(context, state, problem.batch, None, KEY)
        norms = np.linalg.norm(numpy_gradients(problem.batch, w), axis=1)[part]
        progress = (numpy_means(problem.batch, w) / first)[part]
        target = np.mean(weights[part] * norms) * (progress / progress.mean()) ** 0.8
        gap = weights[part] * norms - target
        moved = np.maximum(weights[part] - 0.05 * norms * np.sign(gap), 1e-3)
        weights[part] = moved * len(moved) / moved.sum()
        np.testing.assert_allclose(state.method.weights, weights, rtol=1e-10)
        np.testing.assert_allclose(metrics["gradnorm_loss"], np.abs(gap).sum(), rtol=1e-10)
    assert np.ptp(weights) > 0.01


def test_without_asymmetry_it_ends_with_equal_gradient_norms():
    problem = LinearTasks.make(0, num_tasks=3)
    method = auxjax.methods.get("gradnorm", outer_optimizer=optax.sgd(1e-3), asymmetry=0.0)
    context, state = state_of(linear_model(), problem, method=method)
    norms = np.linalg.norm(numpy_gradients(problem.batch, np.asarray(problem.params["w"])), axis=1)
    state = jax.lax.fori_loop(0, 5000, lambda _, s: method.outer(context, s, problem.batch, None, KEY)[0], state)
    scaled = np.asarray(state.method.weights) * norms
    np.testing.assert_allclose(scaled / scaled.mean(), np.ones(3), atol=0.02)


def test_norms_can_be_taken_in_one_layer():
    problem = LinearTasks.make(0, num_tasks=2)
    params = {"w": problem.params["w"], "unused": problem.params["w"]}
    method = auxjax.methods.get("gradnorm", layer=lambda path: path == "unused", outer_optimizer=optax.sgd(0.1))
    context, state = state_of(linear_model(), problem._replace(params=params), method=method)
    state, metrics = method.outer(context, state, problem.batch, None, KEY)
    assert metrics["gradient_norm/primary"] == 0.0
    np.testing.assert_array_equal(state.method.weights, [1.0, 1.0])


@pytest.mark.parametrize("options", [{"asymmetry": -1.0}, {"smallest": 1.0}])
def test_mistakes_are_named(options):
    with pytest.raises(ValueError, match="gradnorm"):
        auxjax.methods.get("gradnorm", **options)


@pytest.mark.slow
def test_a_task_without_labels_keeps_its_weight_and_the_others_balance_among_themselves(ordinary_promotion):
    problem = LinearTasks.make(0, num_tasks=3, masked=True)
    problem.batch["mask"]["aux1"] = jnp.zeros(8, bool)
    method = auxjax.methods.get("gradnorm", outer_optimizer=optax.adam(0.1))
    context, state = state_of(linear_model(masked=True), problem, method=method)
    for _ in range(5):
        state, _ = method.outer(context, state, problem.batch, None, KEY)
    alone = LinearTasks(
        {name: {t: part[t] for t in ("primary", "aux0")} for name, part in problem.batch.items()}, problem.params
    )
    pair_context, pair = state_of(linear_model(masked=True), alone, method=method)
    for _ in range(5):
        pair, _ = method.outer(pair_context, pair, alone.batch, None, KEY)
    np.testing.assert_allclose(state.method.weights[2], 1.0)
    np.testing.assert_allclose(state.method.weights[:2], pair.method.weights, rtol=1e-12)
    assert abs(float(pair.method.weights[0]) - 1.0) > 0.1
