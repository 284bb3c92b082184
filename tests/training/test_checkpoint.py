"""Checkpoints: bit for bit, typed keys included, and clear when they do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.training.checkpoint import open_checkpoints, restore, save
from tests.helpers.every_method import FEW
from tests.helpers.training_problems import LinearTasks, linear_model

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def steps(state, step, batch, count):
    for _ in range(count):
        state, _ = step(state, batch, batch)
    return state


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "jtds")) for name in FEW])
def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path, name):
    problem = LinearTasks.make(0, num_tasks=3)
    init, step = auxjax.make_step(linear_model(), auxjax.methods.get(name, **FEW[name]), optax.adam(0.01), donate=False)
    start = init(jax.random.key(0), problem.params, problem.batch)
    whole = steps(start, step, problem.batch, 6)
    with open_checkpoints(tmp_path / "c") as manager:
        assert restore(manager, start) is None
        save(manager, 3, steps(start, step, problem.batch, 3), {"best": 0.1 + 0.2})
    with open_checkpoints(tmp_path / "c") as manager:
        found = restore(manager, init(jax.random.key(1), problem.params, problem.batch))
    assert found.step == 3
    assert found.note == {"best": 0.1 + 0.2}
    assert type(found.tree) is auxjax.TrainState
    again = steps(found.tree, step, problem.batch, 3)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_only_the_newest_are_kept(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as manager:
        for number in range(5):
            save(manager, number, {"x": jnp.full(3, float(number))})
        assert manager.all_steps() == [3, 4]
        assert restore(manager, {"x": jnp.zeros(3)}).tree["x"][0] == 4


@pytest.mark.parametrize("other", [{"y": jnp.zeros(3)}, {"x": jnp.zeros(4)}, {"x": jnp.zeros(3), "y": jnp.zeros(1)}])
def test_another_runs_checkpoint_is_refused(tmp_path, other):
    with open_checkpoints(tmp_path) as manager:
        save(manager, 1, {"x": jnp.zeros(3)})
    with open_checkpoints(tmp_path) as manager, pytest.raises(ValueError, match="Use the settings it was made with"):
        restore(manager, other)
