"""Frozen leaves are constants: for every method a run is that of a model which closes over them."""

import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.training.checkpoint import open_checkpoints, restore, save
from auxjax.training.folds import fold_of, fold_rows
from tests.helpers.every_method import every, method_of
from tests.helpers.training_problems import LinearTasks, linear_model

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

KEY = jax.random.key(0)
INNER, OUTER = (LinearTasks.make(seed, num_tasks=3) for seed in (0, 1))
FROZEN = {"scale": jnp.array([0.5, 2.0, 1.5]), "table": {"counts": jnp.arange(3, dtype=jnp.int8)}}
PARAMS = {**INNER.params, **FROZEN}


def effective(params):
    counts = params["table"]["counts"].astype(params["w"].dtype)
    return {"w": params["w"] * params["scale"] + 0.1 * counts}


LINEAR = linear_model()
MODEL = LINEAR._replace(
    losses=lambda params, batch, key: LINEAR.losses(effective(params), batch, key),
    feature_loss=lambda params, *rest: LINEAR.feature_loss(effective(params), *rest),
    trunk=lambda path: path in ("w", "scale"),
    trainable=lambda path: path == "w",
)
CONSTANT = MODEL._replace(
    losses=lambda params, batch, key: MODEL.losses({**params, **FROZEN}, batch, key),
    feature_loss=lambda params, *rest: MODEL.feature_loss({**params, **FROZEN}, *rest),
    trunk=None,
    trainable=None,
)


def train(model, params, method, optimizer=None, steps=2, **options):
    optimizer = optax.adamw(0.05, weight_decay=0.1) if optimizer is None else optimizer
    init, step = auxjax.make_step(model, method, optimizer, **options)
    state, metrics = init(KEY, params, INNER.batch), {}
    for _ in range(steps):
        state, metrics = step(state, INNER.batch, OUTER.batch)
    return state, metrics


@pytest.mark.parametrize("name", every(("arml",)))
def test_a_frozen_leaf_is_a_constant_to_every_method(name):
    state, metrics = train(MODEL, PARAMS, method_of(name))
    alone, others = train(CONSTANT, INNER.params, method_of(name))
    chex.assert_trees_all_equal({name: state.params[name] for name in FROZEN}, FROZEN)
    np.testing.assert_allclose(state.params["w"], alone.params["w"], rtol=1e-10)
    assert set(metrics) == set(others)
    found, expected = jax.tree.leaves((state.method, state.opt_state)), jax.tree.leaves((alone.method, alone.opt_state))
    assert [leaf.shape for leaf in found] == [leaf.shape for leaf in expected]  # and no moments for frozen leaves
    for leaf, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-8, atol=1e-12)
    weights = auxjax.task_weights(MODEL, method_of(name), state, INNER.batch, key=KEY)
    others = auxjax.task_weights(CONSTANT, method_of(name), alone, INNER.batch, key=KEY)
    chex.assert_trees_all_close(weights, others, rtol=1e-8)


def test_bools_say_the_same_as_a_predicate():
    bools = {"w": True, "scale": False, "table": False}
    state, _ = train(MODEL._replace(trainable=bools, trunk={"w": True, "scale": True, "table": False}), PARAMS, ARML)
    same, _ = train(MODEL, PARAMS, ARML)
    chex.assert_trees_all_equal(state.params, same.params)


ARML = auxjax.methods.get("arml")


def test_the_average_is_of_the_trained_leaves_and_a_teacher_sees_all():
    seen = []

    def losses(params, batch, key, *, averaged):
        seen.append(jax.tree.map(lambda leaf: leaf.dtype, averaged))
        return MODEL.losses(params, batch, key)

    state, _ = train(MODEL._replace(losses=losses), PARAMS, ARML, average=auxjax.Average(0.5))
    chex.assert_trees_all_equal({name: state.averaged[name] for name in FROZEN}, FROZEN)
    assert not np.allclose(state.averaged["w"], state.params["w"])
    assert seen[-1] == jax.tree.map(lambda leaf: leaf.dtype, PARAMS)


def test_a_run_with_frozen_leaves_is_saved_and_resumed():
    state, _ = train(MODEL, PARAMS, ARML, donate=False)
    fresh, _ = train(MODEL, PARAMS, ARML, steps=0)
    with tempfile.TemporaryDirectory() as folder, open_checkpoints(folder) as manager:
        save(manager, 2, state)
        found = restore(manager, fresh)
    assert found is not None
    chex.assert_trees_all_equal(found.tree._replace(key=0), state._replace(key=0))


@pytest.mark.slow
def test_copies_in_folds_have_frozen_leaves():
    rows = fold_rows(8, 2)

    def draw(part):
        return lambda data, key, *, fold: jax.tree.map(lambda leaf: leaf[part[fold]], data)

    options = {"folds": 2, "draw_inner": draw(rows.train), "draw_outer": draw(rows.held_out)}
    state, _ = train(MODEL, PARAMS, auxjax.methods.get("jtds"), **options)
    alone, _ = train(CONSTANT, INNER.params, auxjax.methods.get("jtds"), **options)
    chex.assert_trees_all_equal({name: fold_of(state, 1).params[name] for name in FROZEN}, FROZEN)
    np.testing.assert_allclose(state.params["w"], alone.params["w"], rtol=1e-10)


@pytest.mark.slow
def test_weights_are_learned_without_frozen_leaves():
    def draw(data, key, fold):
        return data

    found = []
    for model, params in ((MODEL, PARAMS), (CONSTANT, INNER.params)):
        draws = {"draw_inner": draw, "draw_held_out": draw}
        options = {"rounds": 2, "folds": 2, "updates": 2}
        start = lambda key, params=params: (params, None)  # noqa: E731
        found.append(auxjax.learn_weights(model, optax.sgd(0.05), start, INNER.batch, KEY, **draws, **options).history)
    np.testing.assert_allclose(*found, rtol=1e-8)


@pytest.mark.slow
def test_frozen_leaves_of_any_dtype_are_averaged_and_learned_beside():
    """A key and complex numbers, as nobody could train them."""
    frozen = {"rng": jax.random.key(3), "phase": jnp.ones(3, complex)}

    def losses(params, batch, key):
        return LINEAR.losses({"w": params["w"] * jnp.real(params["phase"])}, batch, key)

    model = LINEAR._replace(losses=losses, feature_loss=None, trainable=lambda path: path == "w")
    params = {**INNER.params, **frozen}
    state, _ = train(model, params, auxjax.methods.get("equal"), average=auxjax.Average(0.9))
    assert state.averaged["rng"] == frozen["rng"]
    assert not np.array_equal(state.averaged["w"], state.params["w"])
    rounds = {"rounds": 1, "folds": 2, "updates": 2, "draw_inner": take_all, "draw_held_out": take_all}
    learned = auxjax.learn_weights(model, optax.sgd(0.05), lambda key: (params, None), INNER.batch, KEY, **rounds)
    assert np.isfinite(learned.history).all()


def take_all(data, key, fold):
    return data
