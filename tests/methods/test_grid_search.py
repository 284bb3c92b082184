"""Grid search against the same runs one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from tests.helpers.training_problems import LinearTasks, linear_model, numpy_means, state_of

KEY = jax.random.key(0)


def test_every_candidate_is_a_run_of_its_own_and_the_best_one_is_kept(ordinary_promotion):
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    method = auxjax.methods.get("grid_search", values=(0.0, 0.5, 2.0))
    optimizer = optax.adam(0.05)
    init, step = auxjax.make_step(linear_model(), method, optimizer, donate=False)
    state = init(KEY, problem.params, problem.batch)
    for _ in range(30):
        state, _ = step(state, problem.batch, dev.batch)
    grid = state.method.weights
    assert len(grid["primary"]) == 9
    finals, scores = [], []
    for candidate in range(9):
        weights = {task: float(grid[task][candidate]) for task in ("aux0", "aux1")}
        alone_init, alone_step = auxjax.make_step(
            linear_model(), auxjax.methods.get("fixed_weights", weights=weights), optimizer, donate=False
        )
        alone, score = alone_init(KEY, problem.params, problem.batch), 0.0
        for _ in range(30):
            alone, _ = alone_step(alone, problem.batch)
            score = 0.9 * score + 0.1 * numpy_means(dev.batch, np.asarray(alone.params["w"]))[0]
        finals.append(np.asarray(alone.params["w"]))
        scores.append(score)
    np.testing.assert_allclose(state.method.params["w"], finals, rtol=1e-10)
    np.testing.assert_allclose(state.method.losses, scores, rtol=1e-10)
    best = int(np.argmin(scores))
    assert state.method.selected == best
    np.testing.assert_allclose(state.params["w"], finals[best], rtol=1e-10)
    weights = auxjax.task_weights(linear_model(), method, state, problem.batch, key=KEY)
    np.testing.assert_array_equal(weights["aux0"], np.full(8, grid["aux0"][best]))


def test_a_candidate_that_diverges_is_not_selected():
    problem, dev = LinearTasks.make(0, num_tasks=2), LinearTasks.make(1, num_tasks=2)
    method = auxjax.methods.get("grid_search", candidates=[{"aux0": 1e200}, {"aux0": 0.1}])
    init, step = auxjax.make_step(linear_model(), method, optax.sgd(0.1), donate=False)
    state = init(KEY, problem.params, problem.batch)
    for _ in range(5):
        state, _ = step(state, problem.batch, dev.batch)
    assert state.method.selected == 1
    assert np.all(np.isfinite(state.params["w"]))


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        ({"values": ()}, "empty grid"),
        ({"candidates": []}, "empty grid"),
        ({"values": (float("nan"),)}, "weight=nan.*finite number"),
        ({"values": (0.0, 1.0), "limit": 3}, "2 values for 2 tasks are 4 candidates"),
        ({"candidates": [{"aux0": 1.0}] * 4, "limit": 3}, "4 candidates"),
        ({"candidates": [{"depth": 1.0}]}, "names 'depth'"),
    ],
)
def test_mistakes_are_named(options, piece):
    with pytest.raises(ValueError, match=piece):
        state_of(linear_model(), LinearTasks.make(0, num_tasks=3), method=auxjax.methods.get("grid_search", **options))


def test_outer_batches_that_are_not_finite_are_left_out_of_the_means():
    """For one candidate or for all: means are those of the other batches, and no candidate is kept out for ever."""
    problem = LinearTasks.make(0, num_tasks=2)
    method = auxjax.methods.get("grid_search", candidates=[{"aux0": 0.0}, {"aux0": 1.0}])
    context, state = state_of(linear_model(), problem, method=method)
    params = {"w": jnp.stack([problem.params["w"], problem.params["w"] + 1.0])}
    state = state._replace(method=state.method._replace(params=params))
    outer = jax.jit(lambda state, batch: method.outer(context, state, None, batch, KEY))
    good = LinearTasks.make(1, num_tasks=2).batch
    bad = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), good)
    first, _ = outer(state, good)
    skipped, metrics = outer(first, bad)
    assert metrics["skipped"] == 2
    jax.tree.map(np.testing.assert_array_equal, skipped.method, first.method)
    better = int(first.method.selected)
    broken = {"w": params["w"].at[better].set(jnp.inf)}
    away, metrics = outer(first._replace(method=first.method._replace(params=broken)), good)
    assert metrics["skipped"] == 1
    assert away.method.selected == 1 - better
    back, _ = outer(away._replace(method=away.method._replace(params=params)), good)
    assert back.method.selected == better
    losses = [numpy_means(good, np.asarray(w))[0] for w in params["w"]]
    np.testing.assert_allclose(back.method.losses / back.method.counts, losses, rtol=1e-12)
