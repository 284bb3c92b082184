"""Averaged params: the formula, every method, replicas and shards alike, a teacher, checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.training.checkpoint import open_checkpoints, restore, save
from auxjax.training.parallel import data_mesh
from auxjax.training.replicas import first_replica, make_pmapped_step, split_over_replicas
from auxjax.training.sweep import make_sweep, run_of

DATA = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)))
KEY = jax.random.key(1)
START = jnp.array([1.0, -1.0, 0.5])


def losses(params, batch, key):
    out = batch @ params
    return auxjax.TaskLosses({"main": (out - 1.0) ** 2, "other": (out + 1.0) ** 2})


MODEL = auxjax.TaskModel(losses, primary="main")


def train(steps=6, *, method="equal", average=None, model=MODEL, **options):
    init, step = auxjax.make_step(
        model, auxjax.methods.get(method), optax.sgd(0.05), average=average, donate=False, **options
    )
    state, path = init(KEY, START, DATA), []
    for _ in range(steps):
        state, _ = step(state, DATA, DATA)
        path.append(state)
    return path


def by_hand(path, decay, warm_up):
    mean = np.asarray(START, np.float64)
    for t, state in enumerate(path, start=1):
        d = min(decay, 1 - 1 / t) if warm_up else decay
        mean = d * mean + (1 - d) * np.asarray(state.params)
    return mean


@pytest.mark.parametrize("warm_up", [True, False])
def test_the_formula_with_and_without_warm_up(warm_up):
    path = train(average=auxjax.Average(0.6, warm_up))
    np.testing.assert_allclose(path[-1].averaged, by_hand(path, 0.6, warm_up), rtol=1e-12)


def test_warm_up_starts_with_the_plain_mean():
    path = train(3, average=auxjax.Average(0.999))
    np.testing.assert_allclose(path[-1].averaged, np.mean([state.params for state in path], axis=0), rtol=1e-12)


@pytest.mark.parametrize("method", ["ol_aux", "dwa", "cosine_similarity"])
def test_methods_train_as_without_and_average_what_they_trained(method):
    path, plain = train(3, method=method, average=auxjax.Average(0.6)), train(3, method=method)
    np.testing.assert_array_equal(path[-1].params, plain[-1].params)
    np.testing.assert_allclose(path[-1].averaged, by_hand(path, 0.6, True), rtol=1e-10)
    assert plain[-1].averaged == ()


def test_half_precision_params_have_a_mean_in_float32():
    init, step = auxjax.make_step(
        MODEL, auxjax.methods.get("equal"), optax.sgd(0.05), average=auxjax.Average(0.9), donate=False
    )
    state, _ = step(init(KEY, START.astype(jnp.bfloat16), DATA.astype(jnp.bfloat16)), DATA.astype(jnp.bfloat16))
    assert state.params.dtype == jnp.bfloat16
    assert state.averaged.dtype == jnp.float32


def test_four_devices_have_the_mean_of_one():
    alone = train(average=auxjax.Average(0.6))[-1].averaged
    sharded = train(average=auxjax.Average(0.6), mesh=data_mesh(4))[-1].averaged
    np.testing.assert_allclose(sharded, alone, rtol=1e-12)
    assert sharded.sharding.is_fully_replicated
    init, step = make_pmapped_step(
        MODEL, auxjax.methods.get("equal"), optax.sgd(0.05), average=auxjax.Average(0.6), num_devices=4
    )
    parts = split_over_replicas(DATA, 4)
    state = init(KEY, START, parts)
    for _ in range(6):
        state, _ = step(state, parts)
    np.testing.assert_allclose(first_replica(state.averaged), alone, rtol=1e-12)


def test_runs_of_a_sweep_have_means_of_their_own():
    def make(point):
        return MODEL, auxjax.methods.get("equal", auxiliary_weight=point), optax.sgd(0.05)

    points = jnp.array([1.0, 0.5])
    init, step = make_sweep(make, points, average=auxjax.Average(0.6))
    state = init(jnp.stack([KEY, KEY]), jnp.stack([START, START]), DATA)
    for _ in range(6):
        state, _ = step(state, DATA)
    np.testing.assert_allclose(run_of(state.averaged, 0), train(average=auxjax.Average(0.6))[-1].averaged, rtol=1e-10)
    assert np.abs(run_of(state.averaged, 1) - run_of(state.averaged, 0)).max() > 1e-3


def teaching(params, batch, key, *, averaged, step):
    """The auxiliary task is to agree with the averaged params, from the second update on."""
    out = batch @ params
    teacher = batch @ averaged
    return auxjax.TaskLosses({"main": (out - 1.0) ** 2, "other": jnp.where(step > 0, (out - teacher) ** 2, 0.0)})


@pytest.mark.parametrize("transform", [lambda model: model, auxjax.remat, lambda model: auxjax.accumulate(model, 2)])
def test_a_loss_that_names_them_sees_the_mean_before_the_update_and_the_step(transform):
    model = transform(auxjax.TaskModel(teaching, primary="main"))
    path = train(4, average=auxjax.Average(0.6), model=model)
    x, params, mean = np.asarray(DATA), np.asarray(START), np.asarray(START)
    for t, state in enumerate(path, start=1):
        gradient = 2 * x.T @ (x @ params - 1.0) / 8
        if t > 1:
            gradient = gradient + 2 * x.T @ (x @ params - x @ mean) / 8
        params = params - 0.05 * gradient
        d = min(0.6, 1 - 1 / t)
        mean = d * mean + (1 - d) * params
        np.testing.assert_allclose(state.params, params, rtol=1e-10)
        np.testing.assert_allclose(state.averaged, mean, rtol=1e-10)


def test_without_an_average_the_teacher_is_none():
    seen = []

    def watched(params, batch, key, *, averaged, state):
        seen.append((averaged, state))
        return losses(params, batch, key)

    train(1, model=auxjax.TaskModel(watched, primary="main"))
    assert set(seen) == {(None, None)}


def test_they_are_saved_and_resumed_to_the_bit(tmp_path):
    path = train(average=auxjax.Average(0.6))
    init, step = auxjax.make_step(
        MODEL, auxjax.methods.get("equal"), optax.sgd(0.05), average=auxjax.Average(0.6), donate=False
    )
    with open_checkpoints(tmp_path) as manager:
        save(manager, 3, path[2])
        manager.wait_until_finished()
        state = restore(manager, init(KEY, START, DATA)).tree
    for _ in range(3):
        state, _ = step(state, DATA, DATA)
    np.testing.assert_array_equal(state.averaged, path[-1].averaged)


def test_a_draw_that_names_them_gets_the_step_and_the_key_of_the_run():
    def draw(data, key, *, step, run_key):
        order = jax.random.permutation(jax.random.fold_in(run_key, step // 2), 8)  # epochs of two batches
        return data[jax.lax.dynamic_slice_in_dim(order, 4 * (step % 2), 4)]

    def recording(params, batch, key):
        return auxjax.TaskLosses({"main": batch @ params})  # the gradient is the mean of the batch

    init, step = auxjax.make_step(
        auxjax.TaskModel(recording, primary="main"),
        auxjax.methods.get("stl"),
        optax.sgd(1.0),
        draw_inner=draw,
        donate=False,
    )
    state = init(KEY, START, DATA)
    for _ in range(2):
        state, _ = step(state, DATA)
    np.testing.assert_allclose(state.params, START - 2 * DATA.mean(axis=0), rtol=1e-12)  # every example once


@pytest.mark.parametrize(
    ("average", "error", "message"),
    [
        (0.999, TypeError, r"expected auxjax.Average\(decay=0.999\), got float"),
        (auxjax.Average(1.0), ValueError, r"Average\(decay=1.0\): expected a number in \[0, 1\)"),
    ],
)
def test_mistakes(average, error, message):
    with pytest.raises(error, match=message):
        train(1, average=average)


def test_model_state_that_the_losses_do_not_name_is_an_error():
    init, _ = auxjax.make_step(MODEL, auxjax.methods.get("equal"), optax.sgd(0.05))
    with pytest.raises(ValueError, match="argument of the name `state`"):
        init(KEY, START, DATA, {"mean": jnp.zeros(())})
