"""Auto-Lambda against differences of the look-ahead with the real optimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.training.step import make_updates
from tests.helpers.training_problems import LinearTasks, linear_model, numpy_gradients, numpy_means, state_of

KEY = jax.random.key(0)
TASKS = ("primary", "aux0", "aux1")


def look_ahead(optimizer, state, problem, dev, weights):
    """The primary loss on `dev` after one update, by NumPy gradients and the optimiser itself."""
    gradient = jnp.array(weights @ numpy_gradients(problem.batch, np.asarray(state.params["w"])))
    updates, _ = optimizer.update({"w": gradient}, state.opt_state, state.params)
    return numpy_means(dev.batch, np.asarray(optax.apply_updates(state.params, updates)["w"]))[0]


@pytest.mark.parametrize("form", ["finite_difference", "exact"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_is_that_of_the_look_ahead(form, masked):
    """Momentum and weight decay are part of it, and so is the optimiser's state after some updates."""
    problem, dev = (LinearTasks.make(seed, num_tasks=3, masked=masked) for seed in (0, 1))
    optimizer = optax.chain(optax.add_decayed_weights(0.02), optax.sgd(0.1, momentum=0.9))
    method = auxjax.methods.get("auto_lambda", form=form, outer_optimizer=optax.sgd(1.0))
    context, state = state_of(linear_model(masked=masked), problem, method=method, optimizer=optimizer)
    for _ in range(3):
        state, _ = method.inner(context, state, problem.batch, KEY)
    new, metrics = method.outer(context, state, problem.batch, dev.batch, KEY)
    found = np.array([state.method.meta[task] - new.method.meta[task] for task in TASKS])
    wanted, delta = np.zeros(3), 1e-5
    for k, step in enumerate(np.eye(3) * delta):
        up, down = (look_ahead(optimizer, state, problem, dev, np.full(3, 0.1) + s * step) for s in (1, -1))
        wanted[k] = (up - down) / (2 * delta)
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-10)
    assert metrics["outer_loss"] > 0


@pytest.mark.parametrize("form", [pytest.param("finite_difference", marks=pytest.mark.slow), "exact"])
@pytest.mark.parametrize("size", [0.0, pytest.param(1e-200, marks=pytest.mark.slow)])
def test_params_without_a_gradient_do_no_harm_under_adam(form, size, ordinary_promotion):
    """Adam's root has no derivative there, nor where the gradient's square is 0 in floating point. The others' part is
    that of the problem without such params."""
    gradients = []
    for dead in (False, True):
        problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
        if dead:
            for batch in (problem.batch, dev.batch):
                column = {task: jnp.full((len(x), 1), size, x.dtype) for task, x in batch["x"].items()}
                batch["x"] = {task: jnp.concatenate([x, column[task]], axis=1) for task, x in batch["x"].items()}
            problem = problem._replace(params={"w": jnp.pad(problem.params["w"], (0, 1))})
        method = auxjax.methods.get("auto_lambda", form=form, outer_optimizer=optax.sgd(1.0))
        context, state = state_of(linear_model(), problem, method=method, optimizer=optax.adam(0.1))
        new, _ = jax.jit(method.outer, static_argnums=0)(context, state, problem.batch, dev.batch, KEY)
        gradients.append([state.method.meta[task] - new.method.meta[task] for task in TASKS])
    assert np.all(np.isfinite(gradients))
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_the_primary_task_starts_at_the_same_weight():
    problem = LinearTasks.make(0, num_tasks=3)
    method = auxjax.methods.get("auto_lambda")
    context, state = state_of(linear_model(), problem, method=method)
    new, metrics = method.inner(context, state, problem.batch, KEY)
    w = np.asarray(problem.params["w"])
    wanted = w - 0.1 * np.full(3, 0.1) @ numpy_gradients(problem.batch, w)
    np.testing.assert_allclose(new.params["w"], wanted, rtol=1e-12)
    np.testing.assert_allclose(metrics["weight/primary"], 0.1, rtol=1e-12)


@pytest.mark.parametrize("options", [{"form": "unrolled"}, {"epsilon": 0.0}, {"initial": float("nan")}])
def test_mistakes_are_named(options):
    with pytest.raises(ValueError, match="auto_lambda"):
        auxjax.methods.get("auto_lambda", **options)


def test_the_outer_update_can_come_first_and_looks_ahead_along_the_step_that_is_then_taken():
    """The public code's order: weights are differentiated through the step from the same params, on the same batch."""
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    method = auxjax.methods.get("auto_lambda", form="exact", outer_optimizer=optax.sgd(0.5))
    updates = make_updates(linear_model(), method, optax.sgd(0.1))
    state = updates.init(KEY, problem.params, problem.batch)
    new, _ = updates.outer(state, problem.batch, dev.batch, 0)
    new, _ = updates.inner(new, problem.batch, 0)
    w = np.asarray(problem.params["w"])
    gradients = numpy_gradients(problem.batch, w)
    ahead = w - 0.1 * np.full(3, 0.1) @ gradients
    weights = 0.1 + 0.5 * 0.1 * gradients @ numpy_gradients(dev.batch, ahead)[0]
    np.testing.assert_allclose([new.method.meta[task] for task in TASKS], weights, rtol=1e-12)
    np.testing.assert_allclose(new.params["w"], w - 0.1 * weights @ gradients, rtol=1e-12)
