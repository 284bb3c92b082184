"""The default optimisers of outer variables: what N updates do that agree, what they do that do not, and any scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.methods.shared import default_optimizers
from tests.helpers.every_method import NUM_EXAMPLES
from tests.helpers.training_problems import LinearTasks, linear_model, state_of

KEY = jax.random.key(0)
WITH_PLAN = [name for name in auxjax.methods.names() if "outer_updates" in auxjax.methods.info(name).options]
MORE = {"n_jtds": {"num_examples": NUM_EXAMPLES, "ids": lambda batch: jnp.arange(len(batch["y"]["primary"]))}}
MAKERS = [getattr(default_optimizers, f"of_{kind}") for kind in ("logits", "shares", "weights", "network")]


def moved(optimizer, start, gradients):
    """Where a variable ends."""

    def step(carried, gradient):
        x, state = carried
        updates, state = optimizer.update(gradient, state, x)
        return (optax.apply_updates(x, updates), state), None

    start = jnp.asarray(start, gradients.dtype)
    return np.asarray(jax.lax.scan(step, (start, optimizer.init(start)), gradients)[0][0])


@pytest.mark.parametrize("planned", [100, 900])
@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_updates_that_agree_cross_the_range(planned, scale):
    enough = jnp.full((round(planned**0.5) + 14,), scale)
    assert 0.004 < jax.nn.sigmoid(moved(default_optimizers.of_logits(planned), 0.0, enough)) < 0.01
    assert jax.nn.sigmoid(moved(default_optimizers.of_logits(planned), 0.0, enough[:-5])) > 0.01
    assert 3 < moved(default_optimizers.of_shares(planned), 0.25, -enough) / 0.25 < 3.5
    gradients = jnp.full((planned,), scale)
    assert moved(default_optimizers.of_network(planned), 0.5, -gradients) == pytest.approx(1.5, abs=0.2)
    for start in (0.1, 1.0):
        optimizer = default_optimizers.of_weights(planned)
        assert 6 < moved(optimizer, start, -gradients) / start < 11
        assert moved(optimizer, start, gradients) < 0


@pytest.mark.parametrize("make", MAKERS)
def test_a_gradient_may_be_tiny_in_single_precision_and_none_moves_nothing(make):
    tiny = moved(make(100), 1.0, jnp.full((20,), -1e-18, jnp.float32))
    np.testing.assert_allclose(tiny, moved(make(100), 1.0, jnp.full((20,), -1.0, jnp.float32)), rtol=1e-4)
    assert moved(make(100), 1.0, jnp.zeros(100)) == 1.0


@pytest.mark.usefixtures("ordinary_promotion")
@pytest.mark.parametrize("make", MAKERS)
def test_updates_that_do_not_agree_leave_a_variable_near_its_start(make):
    """By less than 0.4 of what 23 that agree move it; Adam, at a rate at which these go as far, ends further off."""
    start, count = 1.0, 100
    gradients = jax.random.normal(KEY, (count, 500))
    reach = moved(make(100), start, -jnp.ones(23)) - start
    ends = moved(make(100), np.full(500, start), gradients) - start
    adam = moved(optax.adam(float(reach) / 23), np.full(500, start), gradients) - start
    assert np.sqrt(np.mean(ends**2)) < 0.4 * reach
    assert np.mean(adam**2) > np.mean(ends**2)


def test_an_entry_that_is_updated_now_and_then_moves_as_one_that_always_is():
    """As a row of a table: the state of the others stays as it is meanwhile."""
    gradients = jax.random.normal(KEY, (12,)) + 0.5
    optimizer = default_optimizers.of_logits(100)
    x, state = jnp.zeros(2), optimizer.init(jnp.zeros(2))
    for place, gradient in enumerate(gradients):
        updates, new = optimizer.update(jnp.full(2, gradient), state, x)
        seen = jnp.array([True, place % 3 == 0])
        x = jnp.where(seen, x + updates, x)
        state = jax.tree.map(lambda new, old, seen=seen: jnp.where(seen, new, old), new, state)
    assert float(x[1]) == pytest.approx(float(moved(optimizer, 0.0, gradients[::3])), rel=1e-12)
    assert float(x[0]) == pytest.approx(float(moved(optimizer, 0.0, gradients)), rel=1e-12)


def test_shares_whose_gradients_all_agree_are_told_apart_by_their_sizes():
    gradients = jnp.tile(jnp.array([1.0, 1.0, 3.0]), (100, 1))
    optimizer, x = default_optimizers.of_shares(100), jnp.ones(3)
    state = optimizer.init(x)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, x)
        x = auxjax.formulas.simplex.project_simplex(x + updates, 3.0)
    np.testing.assert_allclose(x, [1.5, 1.5, 0.0], atol=1e-9)


@pytest.mark.usefixtures("ordinary_promotion")
def test_agreement_is_the_square_of_adams_step_with_its_sign():
    gradients = jax.random.normal(KEY, (40,)) + 0.5
    agreement, adam = default_optimizers.scale_by_agreement(), optax.scale_by_adam(b1=0.9, b2=0.99, eps=0.0)
    states = agreement.init(jnp.float64(0.0)), adam.init(jnp.float64(0.0))
    for gradient in gradients:
        (own, mine), (step, its) = agreement.update(gradient, states[0]), adam.update(gradient, states[1])
        states = mine, its
        step = float(step) * (1 - 0.9 ** int(its.count))  # the mean is not corrected
        assert float(own) == pytest.approx(step * abs(step), rel=1e-12)


def test_a_weight_that_starts_at_zero_moves():
    assert moved(default_optimizers.of_weights(100), 0.0, -jnp.ones(20)) > 0.5


@functools.cache
def losses_times(scale):
    plain = linear_model()

    def losses(params, batch, key):
        out = plain.losses(params, batch, key)
        return out._replace(values={task: scale * value for task, value in out.values.items()})

    return plain._replace(losses=losses)


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=[pytest.mark.slow] * (one not in ("arml", "auto_lambda", "jtds"))) for one in WITH_PLAN],
)
def test_learned_weights_do_not_depend_on_the_scale_of_the_losses(name):
    problem = LinearTasks.make(3, num_tasks=3, num_examples=NUM_EXAMPLES)
    found, least = [], {"arml": 1e-3, "auxinash": 1e-4}.get(name, 0.01)
    for scale in (1.0, 8.0):
        # The same steps of the params at either scale. What AuxiNash descends has no scale.
        optimizer = optax.sgd(0.01 if name == "auxinash" else 0.01 / scale)
        method = auxjax.methods.get(name, **MORE.get(name, {}))
        init, step = auxjax.make_step(
            losses_times(scale), method, optimizer, inner_steps=2, draw_inner=lambda data, key: data, donate=False
        )
        state = init(KEY, problem.params, problem.batch)
        start = state.method
        for _ in range(3):
            state, _ = step(state, problem.batch, problem.batch)
        moves = jax.tree.map(lambda new, old: np.asarray(new - old), _variables(state.method), _variables(start))
        assert max(np.abs(move).max() for move in jax.tree.leaves(moves)) > least
        found.append(moves)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9), *found)


def _variables(state):
    """The outer variables of a method's state."""
    state = getattr(state, "outer", state)
    return state.meta if hasattr(state, "meta") else state.weights


@pytest.mark.parametrize("name", WITH_PLAN)
def test_a_plan_goes_with_the_default_optimizer_alone(name):
    more = MORE.get(name, {})
    auxjax.methods.get(name, outer_updates=300, **more)
    with pytest.raises(
        ValueError, match=rf"{name}\(outer_updates=300, outer_optimizer=...\).*Leave one of the two out"
    ):
        auxjax.methods.get(name, outer_updates=300, outer_optimizer=optax.adam(0.1), **more)
    with pytest.raises(ValueError, match="outer_updates=0"):
        auxjax.methods.get(name, outer_updates=0, **more)


def test_more_planned_updates_make_shorter_steps():
    problem = LinearTasks.make(3, num_tasks=3)
    moves = []
    for planned in (100, 400):
        method = auxjax.methods.get("auxilearn", outer_updates=planned)
        context, state = state_of(linear_model(), problem, method=method)
        state, _ = method.outer(context, state, problem.batch, problem.batch, KEY)
        moves.append(float(state.method.meta["aux0"]) - 1.0)
    assert moves[0] == pytest.approx(2 * moves[1], rel=1e-9)
