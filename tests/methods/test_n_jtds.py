"""N-JTDS: hypergradient of single examples' weights, and which rows of the table an update touches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax import dense, implicit
from tests.helpers.training_problems import LinearTasks, linear_model, numpy_gradients, numpy_means, state_of

KEY = jax.random.key(0)
IDS = np.array([3, 11, 0, 7, 19, 5, 8, 2])
OPTIONS = {"num_examples": 20, "ids": lambda batch: batch["id"], "hypergradient": implicit(dense())}


def with_ids(seed, *, masked=False, num_tasks=2):
    problem = LinearTasks.make(seed, num_tasks=num_tasks, masked=masked)
    return problem._replace(batch={**problem.batch, "id": jnp.array(IDS)})


def softplus(x):
    return np.log1p(np.exp(x))


def solve(batch, rows):
    """The minimiser of the weighted loss."""
    left, right = 0.0, 0.0
    for task, values in rows.items():
        x, y, weights = np.asarray(batch["x"][task]), np.asarray(batch["y"][task]), softplus(values)
        left, right = left + x.T @ (weights[:, None] * x) / 8, right + x.T @ (weights * y) / 8
    return np.linalg.solve(left, right)


def test_the_hypergradient_is_that_of_the_solved_lower_level():
    problem, dev = with_ids(0), LinearTasks.make(1)
    method = auxjax.methods.get("n_jtds", outer_optimizer=optax.sgd(1.0), spread=0.5, **OPTIONS)
    context, state = state_of(linear_model(), problem, method=method)
    rows = {task: np.asarray(column)[IDS] for task, column in state.method.meta.items()}
    state = state._replace(params={"w": jnp.array(solve(problem.batch, rows))})
    new, _ = method.outer(context, state, problem.batch, dev.batch, KEY)
    for task, values in rows.items():
        for place in range(8):
            change = np.zeros(8)
            change[place] = 1e-6
            up, down = (
                numpy_means(dev.batch, solve(problem.batch, {**rows, task: values + sign * change}))[0]
                for sign in (1, -1)
            )
            found = float(state.method.meta[task][IDS[place]] - new.method.meta[task][IDS[place]])
            np.testing.assert_allclose(found, (up - down) / 2e-6, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [optax.sgd(1.0, momentum=0.9), optax.adam(0.1), optax.adamw(0.1)])
def test_rows_outside_of_the_batch_stay_as_they_are(optimizer, ordinary_promotion):
    """Of the table and of the optimiser's state, weight decay included."""
    problem, dev = with_ids(0), LinearTasks.make(1)
    method = auxjax.methods.get("n_jtds", outer_optimizer=optimizer, spread=1.0, **OPTIONS)
    context, state = state_of(linear_model(), problem, method=method)
    outside, touched = np.setdiff1d(np.arange(20), IDS), 0
    new, _ = method.outer(context, state, problem.batch, dev.batch, KEY)
    for before, after in zip(jax.tree.leaves(state.method), jax.tree.leaves(new.method), strict=True):
        if before.shape == (20,):
            np.testing.assert_array_equal(before[outside], after[outside])
            assert np.all(before[IDS] != after[IDS])
            touched += 1
    assert touched >= 4  # two columns, and at least as many in the optimiser's state


def test_the_whole_batch_is_the_ordinary_optimiser():
    """With every example in the batch, lazy rows are no different from the optimiser on the table."""
    problem, dev = LinearTasks.make(0), LinearTasks.make(1)
    problem = problem._replace(batch={**problem.batch, "id": jnp.arange(8)})
    optimizer = optax.sgd(0.5, momentum=0.9)
    options = {**OPTIONS, "num_examples": 8}
    method = auxjax.methods.get("n_jtds", outer_optimizer=optimizer, **options)
    plain = auxjax.methods.get("n_jtds", outer_optimizer=optax.sgd(1.0), **options)
    context, state = state_of(linear_model(), problem, method=method)
    table, opt_state = state.method.meta, optimizer.init(state.method.meta)
    for _ in range(3):
        _, single = state_of(linear_model(), problem, method=plain)
        single = single._replace(method=single.method._replace(meta=table))
        stepped, _ = plain.outer(context, single, problem.batch, dev.batch, KEY)
        gradient = jax.tree.map(lambda a, b: a - b, table, stepped.method.meta)
        updates, opt_state = optimizer.update(gradient, opt_state, table)
        table = optax.apply_updates(table, updates)
        state, _ = method.outer(context, state, problem.batch, dev.batch, KEY)
        for task, column in table.items():
            np.testing.assert_allclose(state.method.meta[task], column, rtol=1e-9)


def test_an_inner_update_uses_the_rows_of_its_examples():
    problem = with_ids(0, masked=True)
    method = auxjax.methods.get("n_jtds", spread=1.0, **OPTIONS)
    context, state = state_of(linear_model(masked=True), problem, method=method)
    new, metrics = method.inner(context, state, problem.batch, KEY)
    w, gradient = np.asarray(problem.params["w"]), 0.0
    for task, column in state.method.meta.items():
        x, y = np.asarray(problem.batch["x"][task]), np.asarray(problem.batch["y"][task])
        mask, weights = np.asarray(problem.batch["mask"][task]), softplus(np.asarray(column)[IDS])
        gradient = gradient + x.T @ (mask * weights * (x @ w - y)) / mask.sum()
        np.testing.assert_allclose(metrics[f"weight/{task}"], weights[mask].mean(), rtol=1e-12)
    np.testing.assert_allclose(new.params["w"], w - 0.1 * gradient, rtol=1e-11)


def test_weights_are_one_at_the_start():
    problem = with_ids(0)
    method = auxjax.methods.get("n_jtds", **OPTIONS)
    context, state = state_of(linear_model(), problem, method=method)
    new, _ = method.inner(context, state, problem.batch, KEY)
    w = np.asarray(problem.params["w"])
    np.testing.assert_allclose(new.params["w"], w - 0.1 * numpy_gradients(_plain(problem.batch), w).sum(0), rtol=1e-12)


def _plain(batch):
    return {name: batch[name] for name in ("x", "y")}


def test_tasks_may_have_examples_of_their_own():
    problem = with_ids(0)
    sizes, ids = {"primary": 20, "aux0": 9}, {"primary": jnp.array(IDS), "aux0": jnp.arange(8)}
    method = auxjax.methods.get("n_jtds", num_examples=sizes, ids=lambda batch: ids, hypergradient=implicit(dense()))
    _, state = state_of(linear_model(), problem, method=method)
    assert {task: column.shape for task, column in state.method.meta.items()} == {"primary": (20,), "aux0": (9,)}


def test_an_id_outside_of_the_table_shows():
    problem = with_ids(0)
    problem.batch["id"] = problem.batch["id"].at[2].set(20)
    method = auxjax.methods.get("n_jtds", **OPTIONS)
    context, state = state_of(linear_model(), problem, method=method)
    _, metrics = method.inner(context, state, problem.batch, KEY)
    assert np.isnan(metrics["weight/primary"])


@pytest.mark.parametrize(
    ("error", "options", "piece"),
    [
        (TypeError, {"ids": "id"}, "function"),
        (ValueError, {"num_examples": 0}, "whole number >= 1"),
        (ValueError, {"activation": "relu"}, "'softplus' or 'sigmoid'"),
        (ValueError, {"spread": -1.0}, r"spread=-1\.0.*>= 0"),
        (ValueError, {"ids": lambda batch: batch["id"][:3]}, r"expected int\[8\]"),
        (ValueError, {"ids": lambda batch: batch["y"]["primary"]}, "float64"),
    ],
)
def test_mistakes_are_named(error, options, piece):
    with pytest.raises(error, match=piece):
        state_of(linear_model(), with_ids(0), method=auxjax.methods.get("n_jtds", **{**OPTIONS, **options}))


def test_a_negative_id_is_no_example():
    """Not the table's last row: the weight is NaN, and an outer update writes nothing there."""
    problem, dev = LinearTasks.make(0), LinearTasks.make(1)
    ids = jnp.arange(8, dtype=jnp.int32).at[0].set(-1)
    method = auxjax.methods.get("n_jtds", num_examples=9, ids=lambda batch: ids, outer_optimizer=optax.sgd(0.1))
    context, state = state_of(linear_model(), problem, method=method)
    weights = method.weights(context, state, problem.batch, KEY)["aux0"]
    assert np.array_equal(np.isnan(weights), ids < 0)
    new, _ = method.outer(context, state, problem.batch, dev.batch, KEY)
    assert new.method.meta["aux0"][8] == state.method.meta["aux0"][8]


@pytest.mark.parametrize(
    "options",
    [
        {"num_examples": {"primary": 8}, "ids": lambda batch: jnp.arange(8)},
        {"num_examples": 8, "ids": lambda batch: {"primary": jnp.arange(8)}},
    ],
)
def test_a_task_left_out_is_named(options):
    with pytest.raises(ValueError, match="for task 'aux0'"):
        state_of(linear_model(), LinearTasks.make(0), method=auxjax.methods.get("n_jtds", **options))
