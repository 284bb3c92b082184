"""Inner and outer optimisers beyond gradients alone: those that ask for the loss, and those that wait for more."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from tests.helpers.every_method import every, method_of
from tests.helpers.training_problems import LinearTasks, linear_model, numpy_gradients, numpy_means

pytestmark = pytest.mark.usefixtures("ordinary_promotion")
KEY = jax.random.key(0)
LOOK_AHEAD = ("auto_lambda", "maxl", "wamal")
WITH_LOSS = optax.chain(
    optax.polyak_sgd(1.0),
    optax.contrib.reduce_on_plateau(),
    optax.scale_by_backtracking_linesearch(max_backtracking_steps=5),
)


def problems():
    return LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)


@pytest.mark.parametrize("name", every(("equal", "arml", "maoal")))
def test_the_loss_goes_to_the_optimiser(name):
    """Shapes alone: it is there, or refused by name before any training."""
    problem, dev = problems()
    init, step = auxjax.make_step(linear_model(), method_of(name), WITH_LOSS)
    if name in LOOK_AHEAD:
        with pytest.raises(TypeError, match=rf"{name} looks a step ahead: make_step\(optimizer=\): .* gradients alone"):
            jax.eval_shape(init, KEY, problem.params, problem.batch)
        return
    state = jax.eval_shape(init, KEY, problem.params, problem.batch)
    jax.eval_shape(step, state, problem.batch, dev.batch)


@pytest.mark.parametrize("accumulated", [False, True])
def test_the_value_is_the_weighted_loss(accumulated):
    """Polyak's step, (L - 0) / ||g||^2 along the gradient; through MultiSteps, too, which hands it on."""
    problem, _ = problems()
    optimizer = optax.polyak_sgd(1e9)
    optimizer = optax.MultiSteps(optimizer, 1) if accumulated else optimizer
    method = auxjax.methods.get("equal", auxiliary_weight=0.3)
    init, step = auxjax.make_step(linear_model(), method, optimizer)
    weights, w = np.array([1.0, 0.3, 0.3]), np.asarray(problem.params["w"])
    loss, gradient = weights @ numpy_means(problem.batch, w), weights @ numpy_gradients(problem.batch, w)
    state, _ = step(init(KEY, problem.params, problem.batch), problem.batch)
    np.testing.assert_allclose(state.params["w"], w - loss / (gradient @ gradient) * gradient, rtol=1e-6)


def test_a_line_search_sees_the_loss_as_a_function():
    """It halves a step that is far too long until the weighted loss falls."""
    problem, _ = problems()
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=20, decrease_factor=0.5)
    optimizer = optax.chain(optax.sgd(64.0), search)
    init, step = auxjax.make_step(linear_model(), auxjax.methods.get("equal"), optimizer)
    before = numpy_means(problem.batch, np.asarray(problem.params["w"])).sum()
    state, _ = step(init(KEY, problem.params, problem.batch), problem.batch)
    assert numpy_means(problem.batch, np.asarray(state.params["w"])).sum() < before


def test_the_outer_optimiser_gets_the_outer_loss():
    """One that adds it to every outer variable shows it."""

    def update(updates, state, params=None, *, value, **extras):
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), updates), state

    problem, dev = problems()
    shows = optax.GradientTransformationExtraArgs(optax.identity().init, update)
    init, step = auxjax.make_step(
        linear_model(), auxjax.methods.get("auto_lambda", outer_optimizer=shows), optax.sgd(0.05), donate=False
    )
    start = init(KEY, problem.params, problem.batch)
    state, metrics = step(start, problem.batch, dev.batch)
    for old, new in zip(*map(jax.tree.leaves, (start.method.meta, state.method.meta)), strict=True):
        np.testing.assert_allclose(new - old, np.broadcast_to(metrics["outer_loss"], np.shape(old)), rtol=1e-12)


@pytest.mark.parametrize("form", ["exact", "finite_difference"])
def test_the_look_ahead_is_that_of_the_optimiser_inside_of_multi_steps(form):
    problem, dev = problems()
    found = []
    for optimizer in (optax.sgd(0.1), optax.MultiSteps(optax.sgd(0.1), 4)):
        method = auxjax.methods.get("auto_lambda", outer_optimizer=optax.sgd(1.0), form=form)
        state = auxjax.make_step(linear_model(), method, optimizer)[0](KEY, problem.params, problem.batch)
        context = auxjax.interface.Context(linear_model(), auxjax._internal.optimizers.with_extras(optimizer))
        state = state._replace(params=problem.params)
        found.append(
            jax.jit(lambda s, c=context, m=method: m.outer(c, s, problem.batch, dev.batch, KEY)[0].method)(state)
        )
    plain, accumulated = (np.array(jax.tree.leaves(state.meta)) for state in found)
    np.testing.assert_allclose(accumulated, plain, rtol=1e-12)
    assert np.all(np.abs(plain - 0.1) > 1e-4)


@pytest.mark.parametrize("name", [*LOOK_AHEAD, "rl_aux"])
def test_an_optimiser_that_waits_inside_of_another_is_refused(name):
    problem, _ = problems()
    for waiting in (optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(), optax.apply_every(2)):
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), waiting)
        init, _ = auxjax.make_step(linear_model(), method_of(name), optimizer)
        with pytest.raises(ValueError, match=f"{name}: .*Expected optax.MultiSteps around"):
            jax.eval_shape(init, KEY, problem.params, problem.batch)


def test_estimators_refuse_an_optimiser_that_waits():
    problem = auxjax.BilevelProblem(inner=lambda w, m, b: m * jnp.sum(w**2), outer=lambda w, m, b: jnp.sum(w))
    point = (problem, jnp.ones(3), jnp.ones(()), None, None)
    for factory in (auxjax.one_step, auxjax.finite_difference):
        with pytest.raises(ValueError, match=f"{factory.__name__}.*has no derivative.*optax.MultiSteps"):
            factory(optax.MultiSteps(optax.sgd(0.1), 2))(*point)
        with pytest.raises(TypeError, match=rf"{factory.__name__}\(optimizer=\): expected .* gradients alone"):
            factory(optax.polyak_sgd(1.0))(*point)
