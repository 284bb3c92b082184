"""The step: keys, batches, loops, donation, recompilation and its messages."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from tests.helpers.every_method import FEW
from tests.helpers.training_problems import LinearTasks, linear_model

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

KEY = jax.random.key(3)
SIMPLEST = [pytest.param(name, marks=[pytest.mark.slow] * (name != "equal")) for name in FEW]


def draw(data, key):
    """Four of the examples of every task."""
    indices = jax.random.choice(key, 8, (4,), replace=False)
    return jax.tree.map(lambda leaf: leaf[indices], data)


def whole(data, key):
    """Every batch is all there is."""
    del key
    return data


def run(name, num_calls, *, inner_steps=3, traced=None, **options):
    """State and metrics; `traced` takes how often the losses had been traced after each call."""
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    method, model, traces = auxjax.methods.get(name, **FEW[name]), linear_model(), []

    def counted(params, batch, key):
        traces.append(None)
        return linear_model().losses(params, batch, key)

    model = model._replace(losses=counted)
    init, step = auxjax.make_step(
        model, method, optax.adam(0.01), inner_steps=inner_steps, draw_inner=draw, draw_outer=draw, **options
    )
    state = init(KEY, problem.params, problem.batch)
    for _ in range(num_calls):
        state, metrics = step(state, problem.batch, dev.batch)
        if traced is not None:
            traced.append(len(traces))
    return state, metrics


def assert_same(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "jtds")) for name in FEW])
def test_scan_and_host_loops_agree_and_are_traced_once(name):
    traced = {"scan": [], "host": []}
    scanned, metrics = run(name, 2, loop="scan", traced=traced["scan"])
    stepped, others = run(name, 2, loop="host", traced=traced["host"])
    for first, second in traced.values():
        assert 0 < first == second
    assert scanned.step == 6
    assert_same(scanned, stepped, rtol=1e-9, atol=1e-12)
    assert_same(metrics, others, rtol=1e-7, atol=1e-10)


@pytest.mark.slow
def test_several_outer_updates_after_the_inner_ones():
    """In turn: with the params as the inner updates left them, each with batches and keys of its own."""
    scanned, metrics = run("jtds", 2, loop="scan", outer_steps=2)
    stepped, others = run("jtds", 2, loop="host", outer_steps=2)
    assert scanned.step == 6
    assert_same(scanned, stepped, rtol=1e-9, atol=1e-12)
    assert_same(metrics, others, rtol=1e-7, atol=1e-10)
    once, _ = run("jtds", 2, loop="host")

    def count(state):
        return optax.tree.get(state.method.opt_state, "count")

    assert (count(once), count(stepped)) == (2, 4)
    # Without draw_outer: a batch for each of them.
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    init, step = auxjax.make_step(linear_model(), auxjax.methods.get("jtds"), optax.sgd(0.1), outer_steps=2)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), dev.batch)
    state, _ = step(init(KEY, problem.params, problem.batch), problem.batch, stacked)
    assert count(state) == 2


def test_outer_batches_without_an_axis_of_updates_are_refused():
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    init, step = auxjax.make_step(linear_model(), auxjax.methods.get("jtds"), optax.sgd(0.1), outer_steps=2)
    with pytest.raises(ValueError, match=r"outer_batch.* a leading axis of 2"):
        step(init(KEY, problem.params, problem.batch), problem.batch, dev.batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FEW))
def test_jit_equals_no_jit(name):
    with jax.disable_jit():
        plain, _ = run(name, 1, inner_steps=1)
    compiled, _ = run(name, 1, inner_steps=1)
    assert_same(plain, compiled, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SIMPLEST)
def test_vmapped_runs_equal_single_runs(name):
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    init, step = auxjax.make_step(
        linear_model(),
        auxjax.methods.get(name, **FEW[name]),
        optax.adam(0.01),
        inner_steps=2,
        draw_inner=draw,
        draw_outer=draw,
        donate=False,
    )
    states = [init(jax.random.key(seed), problem.params, problem.batch) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together, _ = jax.vmap(step, in_axes=(0, None, None))(stacked, problem.batch, dev.batch)
    for index, state in enumerate(states):
        alone, _ = step(state, problem.batch, dev.batch)
        assert_same(jax.tree.map(lambda leaf, i=index: leaf[i], together), alone, rtol=1e-9, atol=1e-12)


def test_step_can_be_wrapped_in_assert_max_traces():
    problem = LinearTasks.make(0)
    init, step = auxjax.make_step(linear_model(), auxjax.methods.get("equal"), optax.sgd(0.1), donate=False)
    counted = jax.jit(chex.assert_max_traces(lambda state, batch: step(state, batch), n=1))
    state = init(KEY, problem.params, problem.batch)
    for _ in range(3):
        state, _ = counted(state, problem.batch)
    assert state.step == 3


def test_stacked_batches_are_used_one_after_the_other():
    batches = [LinearTasks.make(seed).batch for seed in range(3)]
    params = LinearTasks.make(9).params
    init, step = auxjax.make_step(linear_model(), auxjax.methods.get("stl"), optax.sgd(0.1), inner_steps=3)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    state, _ = step(init(KEY, params, stacked), stacked)
    w = np.asarray(params["w"])
    for batch in batches:
        x, y = np.asarray(batch["x"]["primary"]), np.asarray(batch["y"]["primary"])
        w = w - 0.1 * x.T @ (x @ w - y) / len(y)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-12)


def test_outer_updates_on_the_inner_batch_are_asked_for():
    """Train batch as dev."""
    problem = LinearTasks.make(0, num_tasks=2)
    parts = (linear_model(), auxjax.methods.get("jtds"), optax.sgd(0.1))
    init, step = auxjax.make_step(*parts, donate=False)
    state = init(KEY, problem.params, problem.batch)
    same, _ = step(state, problem.batch, problem.batch)
    without, _ = auxjax.make_step(*parts, donate=False, outer_data="inner")[1](state, problem.batch)
    assert_same(without, same, rtol=1e-12)


def test_users_arrays_survive_donation():
    problem = LinearTasks.make(0)
    init, step = auxjax.make_step(linear_model(), auxjax.methods.get("equal"), optax.adam(0.1))
    key = jax.random.key(0)
    step(init(key, problem.params, problem.batch), problem.batch)
    assert np.all(np.isfinite(problem.params["w"]))
    assert jax.random.uniform(key) < 1


def test_batch_statistics_are_moved_by_inner_steps_and_not_by_outer_steps():
    """A model state that counts how often it was updated."""

    def losses(params, batch, key, state):
        del key
        values = {task: (batch * params["w"] - index) ** 2 for index, task in enumerate(("primary", "other"))}
        return auxjax.TaskLosses(values, features=batch[:, None], state={"count": state["count"] + 1.0})

    model = auxjax.TaskModel(losses, primary="primary")
    for name, options in FEW.items():
        init, step = auxjax.make_step(
            model,
            auxjax.methods.get(name, **options),
            optax.sgd(0.01),
            inner_steps=2,
            draw_inner=lambda data, key: data,
        )
        batch = jnp.array([0.5, 1.5])
        state = init(KEY, {"w": jnp.array(1.0)}, batch, {"count": jnp.array(0.0)})
        state, _ = step(state, batch, batch)
        assert state.model_state["count"] == 2, name


def test_old_style_key_is_refused():
    problem = LinearTasks.make(0)
    init, _ = auxjax.make_step(linear_model(), auxjax.methods.get("stl"), optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"uint32.*jax\.random\.key\(seed\)"):
        init(jax.random.PRNGKey(0), problem.params, problem.batch)


def test_integer_params_are_refused():
    problem = LinearTasks.make(0)
    init, _ = auxjax.make_step(linear_model(), auxjax.methods.get("stl"), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"\['w'\].*int64.*model_state"):
        init(KEY, {"w": jnp.arange(3)}, problem.batch)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inner_steps": 0}, ValueError, "inner_steps=0"),
        ({"outer_steps": 0}, ValueError, "outer_steps=0"),
        ({"loop": "while"}, ValueError, "'scan', 'host' or None"),
        ({"model": lambda: None}, TypeError, "expected auxjax.TaskModel"),
        ({"method": "jtds"}, TypeError, r"auxjax.methods.get\('equal'\)"),
        ({"optimizer": 0.1}, TypeError, "optax transformation"),
    ],
)
def test_impossible_options_are_refused(change, error, message):
    arguments = {"model": linear_model(), "method": auxjax.methods.get("stl"), "optimizer": optax.sgd(0.1), **change}
    with pytest.raises(error, match=message):
        auxjax.make_step(**arguments)


def test_stacks_of_another_length_are_refused():
    problem = LinearTasks.make(0)
    init, step = auxjax.make_step(linear_model(), auxjax.methods.get("equal"), optax.sgd(0.1), inner_steps=3)
    with pytest.raises(ValueError, match=r"inner_batch\['x'\].* wants a leading axis of 3"):
        init(jax.random.key(0), problem.params, problem.batch)
    three, two = (jax.tree.map(lambda leaf, n=n: jnp.stack([leaf] * n), problem.batch) for n in (3, 2))
    state = init(jax.random.key(0), problem.params, three)
    with pytest.raises(ValueError, match=r"has shape \(2, 8, 3\)"):
        step(state, two)
