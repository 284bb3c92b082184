"""AuxiNash: its weights, and its hypergradient through the weights to the powers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax import dense, implicit
from tests.helpers.training_problems import (
    LinearTasks,
    linear_model,
    numpy_gradients,
    numpy_hessians,
    numpy_means,
    state_of,
)

KEY = jax.random.key(0)


def equal_within(gram, weights, powers):
    np.testing.assert_allclose(gram @ weights, powers / weights, rtol=1e-4)


@pytest.mark.parametrize("refresh", ["inner", "outer"])
@pytest.mark.parametrize("masked", [False, True])
def test_an_inner_update_has_unit_length(refresh, masked):
    problem = LinearTasks.make(0, num_tasks=3, masked=masked)
    method = auxjax.methods.get("auxinash", refresh=refresh)
    context, state = state_of(linear_model(masked=masked), problem, method=method)
    w = np.asarray(problem.params["w"])
    rows = numpy_gradients(problem.batch, w)
    new, metrics = method.inner(context, state, problem.batch, KEY)
    weights = np.array([metrics[f"weight/{task}"] for task in ("primary", "aux0", "aux1")])
    equal_within(rows @ rows.T, weights, np.full(3, 1 / 3))
    np.testing.assert_allclose(w - np.asarray(new.params["w"]), 0.1 * weights @ rows, rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(weights @ rows), 1.0, rtol=1e-4)


@pytest.mark.slow
def test_outer_refresh_keeps_the_weights_in_between():
    problem = LinearTasks.make(0, num_tasks=3)
    method = auxjax.methods.get("auxinash", refresh="outer")
    context, state = state_of(linear_model(), problem, method=method)
    one, _ = method.inner(context, state, problem.batch, KEY)
    two, _ = method.inner(context, one, problem.batch, KEY)
    np.testing.assert_array_equal(one.method.weights, two.method.weights)
    after, _ = method.outer(context, two, problem.batch, problem.batch, KEY)
    rows = numpy_gradients(problem.batch, np.asarray(two.params["w"]))
    equal_within(rows @ rows.T, np.asarray(after.method.weights), np.asarray(after.method.outer.meta))


def test_the_hypergradient_is_the_chain_rule_in_numpy():
    """-v^T H^-1 (sum_k da_k/dp g_k), H the Hessian of the joint loss with the weights held fixed."""
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    method = auxjax.methods.get("auxinash", hypergradient=implicit(dense()), outer_optimizer=optax.sgd(1e-3))
    context, state = state_of(linear_model(), problem, method=method)
    new, metrics = method.outer(context, state, problem.batch, dev.batch, KEY)
    w, powers, a = np.asarray(problem.params["w"]), np.full(3, 1 / 3), np.asarray(state.method.weights)
    rows = numpy_gradients(problem.batch, w)
    da = np.linalg.solve(rows @ rows.T + np.diag(powers / a**2), np.diag(1 / a))
    hessian = np.tensordot(a, numpy_hessians(problem.batch), 1)
    u = np.linalg.solve(hessian, numpy_gradients(dev.batch, w)[0])
    gradient = -(u @ rows.T) @ da
    moved = powers - 1e-3 * gradient
    moved = moved - (moved.sum() - 1) / 3  # the projection, inside of the simplex
    assert moved.min() > 0.01
    np.testing.assert_allclose(new.method.outer.meta, moved, rtol=1e-5)
    np.testing.assert_allclose(metrics["outer_loss"], numpy_means(dev.batch, w)[0], rtol=1e-12)


def test_powers_stay_on_the_simplex_and_above_the_bound():
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    method = auxjax.methods.get(
        "auxinash", hypergradient=implicit(dense()), outer_optimizer=optax.sgd(100.0), smallest=0.05
    )
    context, state = state_of(linear_model(), problem, method=method)
    new, _ = method.outer(context, state, problem.batch, dev.batch, KEY)
    powers = np.asarray(new.method.outer.meta)
    np.testing.assert_allclose(powers.sum(), 1.0, rtol=1e-12)
    np.testing.assert_allclose(np.sort(powers), [0.05, 0.05, 0.9], rtol=1e-9)


@pytest.mark.parametrize("options", [{"refresh": "never"}, {"smallest": 0.0}])
def test_mistakes_are_named(options):
    with pytest.raises(ValueError, match="auxinash"):
        auxjax.methods.get("auxinash", **options)


def test_a_bound_that_leaves_no_room_is_named():
    method = auxjax.methods.get("auxinash", smallest=0.5)
    with pytest.raises(ValueError, match="3 tasks cannot"):
        state_of(linear_model(), LinearTasks.make(0, num_tasks=3), method=method)


def test_jit_changes_nothing():
    problem = LinearTasks.make(0, num_tasks=3)
    method = auxjax.methods.get("auxinash")
    context, state = state_of(linear_model(), problem, method=method)
    plain, _ = method.inner(context, state, problem.batch, KEY)
    compiled, _ = jax.jit(lambda s: method.inner(context, s, problem.batch, KEY))(state)
    np.testing.assert_allclose(plain.params["w"], jnp.asarray(compiled.params["w"]), rtol=1e-10)


def test_outer_refresh_keeps_the_weight_of_a_task_without_a_label():
    problem = LinearTasks.make(0, num_tasks=3, masked=True)
    method = auxjax.methods.get("auxinash", refresh="outer")
    context, state = state_of(linear_model(masked=True), problem, method=method)
    kept = np.array(state.method.weights)
    problem.batch["mask"]["primary"] = jnp.zeros(8, bool)
    new, _ = method.outer(context, state, problem.batch, LinearTasks.make(1, num_tasks=3, masked=True).batch, KEY)
    assert new.method.weights[0] == kept[0] > 0
    assert np.all(new.method.weights[1:] != kept[1:])
    _, fresh = state_of(linear_model(masked=True), problem, method=method)
    np.testing.assert_allclose(fresh.method.weights[0], np.mean(fresh.method.weights[1:]), rtol=1e-12)
