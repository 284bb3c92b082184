"""The memory estimate: bytes counted by hand, and a compilation that the first step does not repeat."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.training.memory import estimate_memory
from auxjax.training.parallel import data_mesh, replicate, shard_batch
from tests.helpers.training_problems import LinearTasks, linear_model

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

KEY = jax.random.key(0)


def make(**options):
    """A step on 2 tasks of 8 examples with 3 inputs, and its arguments: 3 params, 64 floats of data."""
    problem = LinearTasks.make(0)
    init, step = auxjax.make_step(linear_model(), auxjax.methods.get("uncertainty"), optax.adam(0.1), **options)
    return init, step, problem.params, problem.batch


def test_bytes_are_those_counted_by_hand():
    init, step, params, batch = make()
    state = init(KEY, params, batch)
    found = estimate_memory(step, state, batch)
    assert found.params == 3 * 8
    assert found.optimizer == 2 * 3 * 8 + 4  # two moments and an int32 count
    assert found.method == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state.method)) > 0
    assert found.model_state == 0
    assert found.data == 2 * 8 * (3 + 1) * 8
    assert found.temporaries > 0
    assert found.total == sum(found[:7])
    assert found.limit is None  # a CPU does not say
    assert estimate_memory(step, jax.eval_shape(init, KEY, params, batch), batch) == found
    assert jnp.isfinite(step(state, batch)[0].params["w"]).all()  # nothing was donated


def test_an_array_that_is_passed_twice_counts_once():
    init, step, params, batch = make()
    state = init(KEY, params, batch)
    other = jax.tree.map(jnp.copy, batch)
    once, twice = estimate_memory(step, state, batch, batch), estimate_memory(step, state, batch, other)
    assert twice.data == 2 * once.data == 1024


def test_model_state_and_what_is_no_array_are_counted():
    def losses(params, batch, key, state):
        del key
        return auxjax.TaskLosses({"y": (params["w"] * batch["x"]) ** 2 * batch["scale"]}, state=state)

    init, step = auxjax.make_step(auxjax.TaskModel(losses, "y"), auxjax.methods.get("stl"), optax.sgd(0.1))
    batch = {"x": np.ones(4), "scale": 2.0, "key": KEY}
    state = init(KEY, {"w": jnp.array(1.0)}, batch, {"mean": jnp.zeros(5, jnp.float32)})
    found = estimate_memory(step, state, batch)
    assert (found.params, found.optimizer, found.method, found.model_state) == (8, 0, 0, 20)
    assert found.data == 32 + 8 + 8


def test_without_donation_the_new_state_needs_a_place():
    found = {}
    for donate in (True, False):
        init, step, params, batch = make(donate=donate)
        found[donate] = estimate_memory(step, init(KEY, params, batch), batch)
    state = sum(found[True][:3])
    assert found[False].outputs - found[True].outputs >= state


def test_on_several_devices_the_bytes_are_those_of_one():
    mesh = data_mesh(4)
    init, step, params, batch = make(mesh=mesh)
    state, split = replicate(init(KEY, params, batch), mesh), shard_batch(batch, mesh)
    found = estimate_memory(step, state, split)
    assert found.params == 24
    assert found.data == 512 // 4


@pytest.mark.parametrize("loop", ["scan", "host"])
def test_the_first_step_finds_the_compilation_done(loop):
    """Counted by what XLA was asked to compile; the host's loop is two programs."""
    problem = LinearTasks.make(0)
    init, step = auxjax.make_step(
        linear_model(),
        auxjax.methods.get("auto_lambda"),
        optax.sgd(0.1),
        inner_steps=2,
        draw_inner=lambda data, key: data,
        loop=loop,
    )
    state = init(KEY, problem.params, problem.batch)
    compiled = []

    def listen(name, seconds, **_):
        if name.endswith("backend_compile_duration"):
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert estimate_memory(step, state, problem.batch, problem.batch).temporaries > 0
        assert len(compiled) == {"scan": 1, "host": 2}[loop]
        jax.block_until_ready(step(state, problem.batch, problem.batch)[0].params)
        assert len(compiled) == {"scan": 1, "host": 2}[loop]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_what_cannot_be_compiled_ahead_is_refused():
    init, _, params, batch = make()
    with pytest.raises(TypeError, match=r"expected the step of make_step .* got function\. Wrap it: jax\.jit\(step\)"):
        estimate_memory(lambda state, batch: state, init(KEY, params, batch), batch)
