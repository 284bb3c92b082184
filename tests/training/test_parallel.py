"""Sharded over four devices, a step gives what it gives on one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.training.parallel import data_mesh, replicate, shard_batch
from tests.problems_training import LinearTasks, linear_model
from tests.training.test_step import METHODS, draw

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def train(name, mesh):
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    init, step = auxjax.make_step(
        linear_model(),
        auxjax.methods.get(name, **METHODS[name]),
        optax.adam(0.01),
        inner_steps=4,
        draw_inner=draw,
        draw_outer=draw,
        mesh=mesh,
    )
    data, dev_data, params = problem.batch, dev.batch, problem.params
    if mesh is not None:
        data, dev_data, params = replicate((data, dev_data, params), mesh)
    state = init(jax.random.key(0), params, data)
    if mesh is not None:
        state = replicate(state, mesh)
    for _ in range(5):
        state, metrics = step(state, data, dev_data)
    return state, metrics


@pytest.mark.parametrize("name", list(METHODS))
def test_four_devices_give_the_params_of_one(name):
    one, metrics = train(name, None)
    four, others = train(name, data_mesh(4))
    assert one.step == 20
    assert len(four.params["w"].sharding.device_set) == 4
    np.testing.assert_allclose(one.params["w"], four.params["w"], rtol=1e-10, atol=1e-12)
    for key in metrics:
        np.testing.assert_allclose(metrics[key], others[key], rtol=1e-7, atol=1e-9, err_msg=key)


def test_a_batch_is_split_over_the_devices():
    mesh = data_mesh()
    placed = shard_batch({"x": jnp.arange(8.0), "scalar": jnp.array(1.0)}, mesh)
    assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(2,)}
    assert placed["scalar"].sharding.is_fully_replicated
    traced = jax.jit(lambda x: shard_batch(x, mesh) * 1.0)(jnp.arange(8.0))
    assert {shard.data.shape for shard in traced.addressable_shards} == {(2,)}


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match=r"\['x'\] has 6 examples, which 4 devices"):
        shard_batch({"x": jnp.zeros(6)}, data_mesh(4))


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match="this process sees 4 devices"):
        data_mesh(5)
