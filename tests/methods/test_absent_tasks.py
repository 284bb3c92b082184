"""A batch without one of the tasks: what a method has learned of the task stays, momentum and statistics too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.methods.shared import absent_tasks
from tests.helpers.every_method import NUM_EXAMPLES, OPTIONS, every
from tests.helpers.training_problems import LinearTasks, linear_model

pytestmark = pytest.mark.usefixtures("ordinary_promotion")
KEY = jax.random.key(0)
BY_NAME = ("adaloss", "dwa", "uncertainty")  # their arrays have the tasks in the order of the names, primary last
NAMES = ("aux0", "aux1", "primary")
IDS = {"ids": lambda batch: {task: jnp.arange(NUM_EXAMPLES) for task in batch["x"]}}
MOMENTUM = {
    "arml": {"outer_optimizer": optax.adam(0.05)},
    "ol_aux": {"outer_optimizer": optax.adam(0.05)},
    "fixed_weights": IDS | {"weights": {"aux0": 0.5, "aux1": jnp.full(NUM_EXAMPLES, 0.1)}},
    "n_jtds": OPTIONS["n_jtds"] | IDS,
}


def method_of(name):
    return auxjax.methods.get(name, **{**OPTIONS.get(name, {}), **MOMENTUM.get(name, {})})


def without(batch, task):
    return {part: {name: rows for name, rows in of.items() if name != task} for part, of in batch.items()}


def of_task(name, state):
    """What the method's state has of aux1: leaves of its name, and its place in arrays with an entry per task."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.method):
        where = jax.tree_util.keystr(path)
        if "aux1" in where:
            found[where] = leaf
        elif (
            "aux0" in where
            or "primary" in where
            or "hypergradient" in where
            or jnp.ndim(leaf) == 0
            or (name == "arml" and where in (".fast", ".slow"))
        ):
            continue
        elif leaf.shape[-1] in (2, 3):
            place = NAMES.index("aux1") if name in BY_NAME else -1
            found[where] = leaf[..., place]
    return found


@pytest.mark.parametrize("name", auxjax.methods.names())
def test_a_batch_may_lack_an_auxiliary_task(name):
    """Nothing but shapes is computed: whatever a method would say to a missing task, it says while it is traced."""
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    model, method = linear_model(), method_of(name)
    init, step = auxjax.make_step(model, method, optax.adam(0.05), donate=False)
    state = jax.eval_shape(init, KEY, problem.params, problem.batch)
    part = without(problem.batch, "aux1")
    after, metrics = jax.eval_shape(step, state, part, dev.batch)
    assert jax.tree.map(jnp.shape, after.method) == jax.tree.map(jnp.shape, state.method)
    assert {"loss/aux1", "weight/aux1", "labelled/aux1"} <= set(metrics)
    weights = jax.eval_shape(lambda s: auxjax.task_weights(model, method, s, part, key=KEY), state)
    assert set(weights) >= {"primary", "aux0", "aux1"}


LEARNED = ("arml", "auto_lambda", "auxilearn", "auxinash", "gradnorm", "jtds", "maoal", "n_jtds", "ol_aux")
STATISTICS = ("adaloss", "dwa", "uncertainty")


@pytest.mark.parametrize("name", [p for p in every(("arml", "ol_aux")) if p.values[0] in LEARNED + STATISTICS])
def test_what_is_learned_of_an_absent_task_stays(name):
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    init, step = auxjax.make_step(linear_model(), method_of(name), optax.sgd(0.05), donate=False)
    state = init(KEY, problem.params, problem.batch)
    for _ in range(3):
        state, _ = step(state, problem.batch, dev.batch)
    after, metrics = step(state, without(problem.batch, "aux1"), dev.batch)
    before, now = of_task(name, state), of_task(name, after)
    assert before
    for where, leaf in before.items():
        np.testing.assert_array_equal(now[where], leaf, err_msg=where)
    assert metrics["loss/aux1"] == metrics["labelled/aux1"] == 0
    masked = jax.tree.map(lambda leaf: leaf, problem.batch) | {"mask": {}}
    masked["mask"] = {task: jnp.full(NUM_EXAMPLES, task != "aux1") for task in NAMES}
    again, _ = auxjax.make_step(linear_model(masked=True), method_of(name), optax.sgd(0.05), donate=False)[1](
        state, masked, {**dev.batch, "mask": dict.fromkeys(NAMES, jnp.ones(NUM_EXAMPLES, bool))}
    )
    for a, b in zip(jax.tree.leaves(after._replace(key=0)), jax.tree.leaves(again._replace(key=0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_arml_shares_what_the_absent_task_leaves_of_the_total():
    problem = LinearTasks.make(0, num_tasks=4)
    model, method = linear_model(), auxjax.methods.get("arml")
    init, step = auxjax.make_step(model, method, optax.sgd(0.05), donate=False)
    state = init(KEY, problem.params, problem.batch)
    state = state._replace(method=state.method._replace(weights=jnp.array([1.8, 0.3, 0.9])))
    part = without(problem.batch, "aux0")
    weights = auxjax.task_weights(model, method, state, part, key=KEY)
    assert [float(weights[f"aux{k}"][0]) for k in range(3)] == [1.8, 0.3, 0.9]
    after = step(state, part)[0].method.weights
    assert after[0] == 1.8
    np.testing.assert_allclose(jnp.sum(after), 3.0, rtol=1e-12)


def test_arml_ends_sampling_with_weights_of_its_total_whatever_is_absent(ordinary_promotion):
    """The means that become the weights follow a weight that stays, too: their sum is the total's at any time."""
    problem = LinearTasks.make(0, num_tasks=3)
    options = {"form": "two_stage", "step_size": 0.0, "temperature": 0.0, "outer_optimizer": optax.sgd(0.3)}
    method = auxjax.methods.get("arml", **options, min_updates=1, max_updates=40)
    init, step = auxjax.make_step(linear_model(), method, optax.sgd(0.05), donate=False)
    state = init(KEY, problem.params, problem.batch)
    for number in range(42):
        state, metrics = step(state, problem.batch if number < 5 else without(problem.batch, "aux1"))
        np.testing.assert_allclose(jnp.sum(state.method.weights), 2.0, rtol=1e-12)
        np.testing.assert_allclose(jnp.sum(state.method.slow), 2.0, rtol=1e-12)
    assert not metrics["sampling"]


def test_projecting_the_rest_is_projecting_it_alone():
    weights, kept = jnp.array([0.9, -0.4, 0.3, 0.8]), jnp.array([0.2, 0.5, 0.1, 0.2])
    seen = jnp.array([True, False, True, True])
    found = absent_tasks.project_seen(weights, kept, seen, 1.0)
    alone = auxjax.project_simplex(weights[seen], 0.5)
    np.testing.assert_allclose(found, jnp.array([alone[0], 0.5, alone[1], alone[2]]), rtol=1e-14)
    np.testing.assert_array_equal(absent_tasks.project_seen(weights, kept, jnp.zeros(4, bool), 1.0), kept)


def test_a_task_that_init_has_not_seen_is_named():
    problem = LinearTasks.make(0, num_tasks=3)
    init, step = auxjax.make_step(linear_model(), auxjax.methods.get("arml"), optax.sgd(0.05), donate=False)
    state = init(KEY, problem.params, without(problem.batch, "aux1"))
    with pytest.raises(ValueError, match="task 'aux1', which the batch given to init did not have"):
        step(state, problem.batch)
    init, step = auxjax.make_step(linear_model(), auxjax.methods.get("equal"), optax.sgd(0.05), donate=False)
    _, metrics = step(init(KEY, problem.params, without(problem.batch, "aux1")), problem.batch)
    assert metrics["weight/aux1"] == 1  # a method that has learned nothing of any task takes all


def test_a_batch_without_the_primary_task_is_refused_by_name():
    problem = LinearTasks.make(0, num_tasks=3)

    def losses(params, batch, key):
        return auxjax.TaskLosses({task: (x @ params["w"]) ** 2 for task, x in batch["x"].items()})

    model = auxjax.TaskModel(losses, primary="primary")
    init, step = auxjax.make_step(model, auxjax.methods.get("equal"), optax.sgd(0.05), donate=False)
    state = init(KEY, problem.params, problem.batch)
    with pytest.raises(ValueError, match=r"TaskModel\.primary is 'primary'"):
        step(state, without(problem.batch, "primary"))
