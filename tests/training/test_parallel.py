"""Four devices train as one does, whatever the method: sharded under jit, or as replicas under pmap."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.interface import TrainState
from auxjax.training.parallel import data_mesh, place_state, shard_batch
from auxjax.training.replicas import first_replica, make_pmapped_step, split_over_replicas
from tests.helpers.every_method import EVERY_COSTLY, NUM_EXAMPLES, OPTIONS, with_state
from tests.helpers.four_devices import KEY, STEPS, make, problems, train
from tests.helpers.training_problems import LinearTasks, linear_model

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def without_keys(tree):
    """PRNG keys as the numbers they hold, which can be compared."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.device_get(jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree))


@pytest.mark.parametrize("name", EVERY_COSTLY)
def test_four_devices_train_as_one(name):
    one, metrics = train(name, "one")
    assert one.step == STEPS
    for how in ("sharded", "pmapped"):
        four, others = train(name, how)
        chex.assert_trees_all_close(without_keys(four), without_keys(one), rtol=1e-10, atol=1e-12)
        if how == "sharded":  # a metric of a pmapped step is a mean over parts of the batch
            chex.assert_trees_all_close(jax.device_get(others), jax.device_get(metrics), rtol=1e-7, atol=1e-9)


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


def test_statistics_of_the_model_are_the_same_on_every_replica():
    """Means over the batch, as BatchNorm's: of the whole under sharding, the parts' averaged under pmap."""
    problem, dev = problems()
    start = {"mean": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)}
    parts = with_state(linear_model()), auxjax.methods.get("jtds"), optax.adam(0.01)
    init, step = auxjax.make_step(*parts)
    one, _ = step(init(KEY, problem.params, problem.batch, start), problem.batch, dev.batch)
    init, step = make_pmapped_step(*parts)
    inner, outer = (split_over_replicas(batch, 4) for batch in (problem.batch, dev.batch))
    four, _ = step(init(KEY, problem.params, inner, start), inner, outer)
    for replica in range(4):
        found = jax.tree.map(lambda leaf, r=replica: leaf[r], four.model_state)
        chex.assert_trees_all_close(found, one.model_state, rtol=1e-12)


@pytest.mark.slow
def test_several_updates_per_call_on_batches_of_their_own():
    problem, dev = problems()
    stack = lambda batch: jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf] * 2), batch)  # noqa: E731
    inner, outer = stack(problem.batch), stack(dev.batch)
    parts = linear_model(), auxjax.methods.get("maoal"), optax.adam(0.01)
    counts = {"inner_steps": 4, "outer_steps": 4}
    init, step = auxjax.make_step(*parts, **counts)
    one, _ = step(init(KEY, problem.params, inner), inner, outer)
    init, step = make_pmapped_step(*parts, **counts)
    split = [split_over_replicas(batch, 4, stacked=True) for batch in (inner, outer)]
    four, _ = step(init(KEY, problem.params, split[0]), *split)
    chex.assert_trees_all_close(without_keys(first_replica(four)), without_keys(one), rtol=1e-10, atol=1e-12)


def test_replicas_draw_differently_and_share_the_noise_of_the_updates():
    """Langevin's noise is one for all, so they stay together although each draws its own batch."""

    def draw(data, key):
        return {**data, "drawn": jax.random.uniform(key, (1,))}

    def losses(params, batch, key):
        drawn = batch["drawn"] + 0.0 * params["w"].sum()
        return auxjax.TaskLosses({"primary": drawn, "square": drawn**2})

    sampling = auxjax.methods.get("arml", form="two_stage", step_size=0.01, temperature=0.1)
    model = auxjax.TaskModel(losses, "primary")
    init, step = make_pmapped_step(model, sampling, optax.sgd(0.01), draw_inner=draw, draw_outer=draw)
    data = split_over_replicas({"x": jnp.zeros(8)}, 4)
    start = {"w": jnp.zeros(3)}
    state, metrics = step(init(KEY, start, data), data, data)
    spread = metrics["loss/square"] - metrics["loss/primary"] ** 2  # of what the replicas drew
    assert np.all(spread > 1e-4)
    assert np.all(state.params["w"] != 0)
    for replica in range(1, 4):
        np.testing.assert_array_equal(state.params["w"][replica], state.params["w"][0])


@pytest.mark.parametrize("name", ["equal", "arml", pytest.param("jtds", marks=pytest.mark.slow), "uncertainty"])
def test_labels_that_one_replica_has_alone_count_as_on_one_device(name):
    """All labels of a task in the first of four parts, other ones unequal: means are those of the whole batch."""
    found = []
    for how in ("one", "pmapped"):
        problem, dev = (LinearTasks.make(seed, num_tasks=3) for seed in (0, 1))
        for data in (problem, dev):
            labelled = {"primary": 7, "aux0": 2, "aux1": 5}
            data.batch["mask"] = {task: jnp.arange(NUM_EXAMPLES) < count for task, count in labelled.items()}
        parts = linear_model(masked=True), auxjax.methods.get(name), optax.adam(0.01)
        init, step = auxjax.make_step(*parts) if how == "one" else make_pmapped_step(*parts)
        place = (lambda batch: batch) if how == "one" else lambda batch: split_over_replicas(batch, 4)
        inner, outer = place(problem.batch), place(dev.batch)
        state = init(KEY, problem.params, inner)
        for _ in range(3):
            state, metrics = step(state, inner, outer)
        found.append((state, metrics) if how == "one" else first_replica((state, metrics)))
    chex.assert_trees_all_close(*map(without_keys, found), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("wamal", OPTIONS["wamal"] | {"normalise": True}), ("jtds", {"jacobian": "exact"})]
)
def test_options_that_make_a_method_look_at_the_whole_batch(name, options):
    """Means of the batch, which a mean over replicas would not give, or which must be differentiated."""
    problem, dev = problems()
    method = auxjax.methods.get(name, **options)
    parts = linear_model(), method, optax.adam(0.01)
    init, step = auxjax.make_step(*parts)
    state = init(KEY, problem.params, problem.batch)
    init, pmapped = make_pmapped_step(*parts)
    inner, outer = (split_over_replicas(batch, 4) for batch in (problem.batch, dev.batch))
    four = init(KEY, problem.params, inner)
    for _ in range(3):
        state, _ = step(state, problem.batch, dev.batch)
        four, _ = pmapped(four, inner, outer)
    chex.assert_trees_all_close(without_keys(first_replica(four)), without_keys(state), rtol=1e-10, atol=1e-12)


def test_an_optimiser_that_holds_one_array_twice_trains_on_a_mesh():
    """A donated state must not: L-BFGS keeps the params beside their copy."""
    problem, _ = problems()
    init, step = auxjax.make_step(
        linear_model(), auxjax.methods.get("equal"), optax.lbfgs(0.1, linesearch=None), mesh=data_mesh(4)
    )
    batch = shard_batch(problem.batch, data_mesh(4))
    _, metrics = step(init(KEY, problem.params, batch), batch)
    assert np.isfinite(metrics["loss/primary"])


def test_large_states_that_no_forward_pass_needs_are_split():
    """A weight per training example and its moments lie on the devices in parts, and train as if they did not."""
    problem, dev = problems()
    found = []
    for split_above in (8, None):
        init, step, place = make("n_jtds", "sharded", split_above=split_above)
        inner, outer = place(problem.batch), place(dev.batch)
        state = init(KEY, problem.params, inner)
        for at in (0, 1):
            whole = jax.tree.leaves((state.params, state.key, state.step))
            assert all(leaf.sharding.is_fully_replicated for leaf in whole), at
            tables = [leaf for leaf in jax.tree.leaves(state.method) if leaf.shape == (NUM_EXAMPLES,)]
            shapes = {leaf.addressable_shards[0].data.shape for leaf in tables}
            assert shapes == {(NUM_EXAMPLES // 4 if split_above else NUM_EXAMPLES,)}, at
            state, _ = step(state, inner, outer)
        found.append(without_keys(state))
    chex.assert_trees_all_close(*found, rtol=1e-12)


def test_the_first_axis_that_can_be_shared_is_split():
    state = TrainState(0, 0, jnp.zeros((8, 8)), {"moment": jnp.zeros((3, 8)), "odd": jnp.zeros((5, 7))}, None, ())
    placed = place_state(state, data_mesh(4), split_above=8)
    assert placed.params.sharding.is_fully_replicated
    assert placed.opt_state["moment"].addressable_shards[0].data.shape == (3, 2)
    assert placed.opt_state["odd"].sharding.is_fully_replicated


def test_parts_for_other_replicas_are_refused():
    problem, _ = problems()
    init, step = make_pmapped_step(linear_model(), auxjax.methods.get("equal"), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"init\(batch=\): .* split_over_replicas\(batch, 4\)"):
        init(KEY, problem.params, problem.batch)
    inner = split_over_replicas(problem.batch, 4)
    with pytest.raises(ValueError, match=r"step\(outer_batch=\)"):
        step(init(KEY, problem.params, inner), inner, problem.batch)
    with pytest.raises(ValueError, match="6 examples, which 4 replicas"):
        split_over_replicas({"x": jnp.zeros(6)}, 4)
    with pytest.raises(ValueError, match="this process has 4 devices"):
        make_pmapped_step(linear_model(), auxjax.methods.get("equal"), optax.sgd(0.1), num_devices=5)
    with pytest.raises(ValueError, match=r"make_pmapped_step\(mesh=\)"):
        make_pmapped_step(linear_model(), auxjax.methods.get("equal"), optax.sgd(0.1), mesh=data_mesh(4))
    with pytest.raises(ValueError, match="Give one"):
        auxjax.make_step(
            linear_model(), auxjax.methods.get("equal"), optax.sgd(0.1), mesh=data_mesh(4), axis_name="data"
        )


def test_replicas_share_the_work_where_an_outer_batch_has_the_primary_task_alone():
    """Nothing is gathered: the tasks that it lacks, it lacks on all of them."""
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    alone = {part: {"primary": of["primary"]} for part, of in dev.batch.items()}
    parts = linear_model(), auxjax.methods.get("auto_lambda"), optax.sgd(0.1)
    _, step = auxjax.make_step(*parts, axis_name="replica", donate=False)
    state = auxjax.make_step(*parts)[0](KEY, problem.params, problem.batch)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), state)
    batches = [split_over_replicas(batch, 2) for batch in (problem.batch, alone)]
    program = str(jax.make_jaxpr(jax.pmap(step, axis_name="replica", devices=jax.devices()[:2]))(state, *batches))
    assert "psum" in program
    assert "all_gather" not in program
