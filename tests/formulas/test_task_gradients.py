"""Products of task gradients against the gradients written out, leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax.formulas.partition import modules_by_path, partition
from auxjax.formulas.task_gradients import gram_matrix, module_products, scale_modules, squared_norms, task_gradients

K = 4
INPUTS = jax.random.normal(jax.random.key(1), (7, 3))
TARGETS = jax.random.normal(jax.random.key(2), (7, K + 1))
PARAMS = {
    "trunk": {"w": jax.random.normal(jax.random.key(3), (3, 5)), "b": jnp.zeros(5)},
    "head": jax.random.normal(jax.random.key(4), (5, K + 1)),
}
TRUNK = {"trunk": True, "head": False}


def losses(params):
    hidden = jnp.tanh(INPUTS @ params["trunk"]["w"] + params["trunk"]["b"][None, :])
    return jnp.mean(jnp.square(hidden @ params["head"] - TARGETS), axis=0)


def rows_of(trunk):
    """All gradients, one `[K + 1, size]` per chosen leaf, by reverse mode."""
    jacobian = jax.jacrev(losses)(PARAMS)
    chosen, _ = partition(jacobian, True if trunk is None else trunk)
    return [np.asarray(leaf).reshape(K + 1, -1) for leaf in chosen]


@pytest.fixture(params=[pytest.param(None, marks=pytest.mark.slow), TRUNK], ids=["all leaves", "trunk"])
def trunk(request):
    return request.param


def test_products_and_combinations(trunk):
    tasks = task_gradients(losses, PARAMS, trunk=trunk)
    rows = np.concatenate(rows_of(trunk), axis=1)
    chosen, _ = partition(PARAMS, True if trunk is None else trunk)
    direction = [jnp.cos(leaf + 1) for leaf in chosen]
    flat = np.concatenate([leaf.ravel() for leaf in direction])
    np.testing.assert_allclose(tasks.products(direction), rows @ flat, rtol=1e-12)
    weights = jnp.array([1.0, -0.5, 0.0, 2.0, 0.3])
    combined = np.concatenate([leaf.ravel() for leaf in tasks.combine(weights)])
    np.testing.assert_allclose(combined, np.asarray(weights) @ rows, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(tasks.losses, losses(PARAMS), rtol=1e-14)
    merged = tasks.merge(direction)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    if trunk is not None:
        np.testing.assert_array_equal(merged["head"], PARAMS["head"])


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_gram_matrix_and_norms_in_chunks(trunk, chunk):
    tasks = task_gradients(losses, PARAMS, trunk=trunk)
    rows = np.concatenate(rows_of(trunk), axis=1)
    gram = jax.jit(lambda: gram_matrix(tasks, chunk=chunk))()
    np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-12)
    np.testing.assert_allclose(gram, gram.T, rtol=1e-14)
    np.testing.assert_allclose(squared_norms(tasks, chunk=chunk), np.sum(rows**2, axis=1), rtol=1e-12)


@pytest.mark.parametrize(
    "module_of",
    [
        lambda path: path,
        pytest.param(lambda path: path.split("/")[0], marks=pytest.mark.slow),
        pytest.param(lambda path: "all", marks=pytest.mark.slow),
    ],
)
def test_per_module(trunk, module_of):
    modules = modules_by_path(PARAMS, module_of, trunk=trunk)
    tasks = task_gradients(losses, PARAMS, trunk=trunk)
    of_leaf = rows_of(trunk)
    rows = [
        np.concatenate([leaf for leaf, index in zip(of_leaf, modules.of_leaf, strict=True) if index == m], axis=1)
        for m in range(len(modules.names))
    ]
    gram = gram_matrix(tasks, modules=modules, chunk=2)
    np.testing.assert_allclose(gram, np.stack([r @ r.T for r in rows]), rtol=1e-12)
    np.testing.assert_allclose(gram.sum(0), gram_matrix(tasks), rtol=1e-12)
    norms = squared_norms(tasks, modules=modules)
    np.testing.assert_allclose(norms, np.stack([np.sum(r**2, axis=1) for r in rows]), rtol=1e-12)
    primary = tasks.combine(jnp.eye(K + 1)[0])
    products = module_products(tasks, primary, modules)
    np.testing.assert_allclose(products, np.stack([r @ r[0] for r in rows]), rtol=1e-11)
    factors = jnp.arange(1.0, len(rows) + 1)
    scaled = tasks.products(scale_modules(primary, factors, modules))
    np.testing.assert_allclose(scaled, np.asarray(factors) @ products, rtol=1e-11)


def test_modules_are_named_in_the_order_of_their_leaves():
    modules = modules_by_path(PARAMS, lambda path: path.split("/")[0])
    assert modules.names == ("head", "trunk")
    assert modules.of_leaf == (0, 1, 1)
    assert modules_by_path(PARAMS, lambda path: path, trunk=TRUNK).names == ("trunk/b", "trunk/w")


@pytest.mark.slow
def test_mean_over_replicas_is_that_of_the_whole_batch():
    def part(params, rows):
        hidden = jnp.tanh(INPUTS[rows] @ params["trunk"]["w"] + params["trunk"]["b"][None, :])
        return jnp.mean(jnp.square(hidden @ params["head"] - TARGETS[rows]), axis=0)

    def on_replica(rows):
        tasks = task_gradients(lambda p: part(p, rows), PARAMS, reduce=lambda tree: jax.lax.pmean(tree, "replica"))
        return tasks.losses, gram_matrix(tasks, chunk=2)

    shards = jnp.stack([jnp.arange(3), jnp.arange(3, 6)])
    found = jax.vmap(on_replica, axis_name="replica")(shards)
    whole = task_gradients(lambda p: part(p, jnp.arange(6)), PARAMS)
    np.testing.assert_allclose(found[0], np.stack([whole.losses] * 2), rtol=1e-12)
    np.testing.assert_allclose(found[1], np.stack([gram_matrix(whole)] * 2), rtol=1e-12)


def test_half_precision_sums_in_single_precision():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    tasks = task_gradients(lambda p: losses(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), p)), params)
    assert squared_norms(tasks).dtype == jnp.float32


@pytest.mark.parametrize(
    ("error", "piece", "call"),
    [
        (ValueError, "my_method.*stack", lambda: task_gradients(lambda p: losses(p)[0], PARAMS, where="my_method")),
        (TypeError, "int", lambda: task_gradients(lambda p: losses(p).astype(int), PARAMS)),
        (ValueError, "at least 1", lambda: gram_matrix(task_gradients(losses, PARAMS), chunk=0)),
        (TypeError, "module's name", lambda: modules_by_path(PARAMS, lambda path: 3)),
        (ValueError, "no leaf", lambda: modules_by_path(PARAMS, lambda path: path, trunk=False)),
    ],
)
def test_mistakes_are_named(error, piece, call):
    with pytest.raises(error, match=piece):
        call()
