"""MAOAL: its field in NumPy, and its hypergradient against differences of the re-solved lower level."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax import dense, finite_difference, implicit
from auxjax.hypergrad import BilevelProblem
from auxjax.methods.shared import outer_level
from auxjax.solvers import gmres
from tests.helpers.training_problems import (
    LinearTasks,
    labelled,
    network_gradients,
    network_problem,
    numpy_gradients,
    numpy_hessians,
    numpy_means,
    order,
    state_of,
)

KEY = jax.random.key(0)
SPLIT = (slice(0, 2), slice(2, 5))  # of the five parameters over the modules a and b


def split_model(*, masked=False):
    """Linear regression whose five parameters are two leaves."""

    def losses(params, batch, key):
        del key
        w = jnp.concatenate([params["a"]["w"], params["b"]["w"]])
        values = {task: 0.5 * (batch["x"][task] @ w - batch["y"][task]) ** 2 for task in batch["x"]}
        return auxjax.TaskLosses(values, masks=batch.get("mask"))

    return auxjax.TaskModel(losses, primary="primary")


def split_problem(seed, *, masked=False):
    problem = LinearTasks.make(seed, num_tasks=3, num_examples=20, dim=5, masked=masked)
    w = problem.params["w"]
    return problem._replace(params={"a": {"w": w[SPLIT[0]]}, "b": {"w": w[SPLIT[1]]}})


def joined(params):
    return np.concatenate([params["a"]["w"], params["b"]["w"]])


def matrices(batch, importance, scale):
    """`(A, c)` of the field `A theta - c`, module by module."""
    hessians = numpy_hessians(batch)
    constants = -numpy_gradients(batch, np.zeros(5))
    a, c = np.array(hessians[0]), np.array(constants[0])
    for m, rows in enumerate(SPLIT):
        a[rows] += scale * np.tensordot(importance[m], hessians[1:, rows], 1)
        c[rows] += scale * np.tensordot(importance[m], constants[1:, rows], 1)
    return a, c


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("reduction", "scale"), [("mean", 0.35), ("sum", 0.7)])
def test_an_inner_update_is_the_field(reduction, scale, masked):
    problem, model = split_problem(0, masked=masked), split_model(masked=masked)
    method = auxjax.methods.get("maoal", auxiliary_weight=0.7, reduction=reduction)
    context, state = state_of(model, problem, method=method, optimizer=optax.sgd(1.0))
    raw = np.array([[0.5, -0.3], [1.5, 2.0]])
    state = state._replace(method=state.method._replace(meta=jnp.array(raw)))
    new, metrics = method.inner(context, state, problem.batch, KEY)
    a, c = matrices(problem.batch, np.maximum(raw, 0), scale)
    theta = joined(problem.params)
    np.testing.assert_allclose(theta - joined(new.params), a @ theta - c, rtol=1e-11)
    np.testing.assert_allclose(metrics["weight/aux0"], scale * 1.0, rtol=1e-12)  # the mean of 0.5 and 1.5


def test_heads_are_outside_of_the_modules():
    problem, model = network_problem(0, num_tasks=3)
    method = auxjax.methods.get("maoal", auxiliary_weight=0.6, reduction="sum")
    context, state = state_of(model, problem, method=method, optimizer=optax.sgd(1.0))
    raw = np.array([[0.0, 0.0], [1.0, 2.0]])
    assert state.method.meta.shape == raw.shape  # trunk_0 and trunk_1
    state = state._replace(method=state.method._replace(meta=jnp.array(raw)))
    new, _ = method.inner(context, state, problem.batch, KEY)
    gradients = network_gradients(model, problem)
    weights = {"trunk_0": [1, 0, 0], "trunk_1": [1, 0.6, 1.2], "heads": [1, 0.6, 0.6]}
    for (path, after), before in zip(
        jax.tree_util.tree_leaves_with_path(new.params), jax.tree.leaves(state.params), strict=True
    ):
        name = jax.tree_util.keystr(path)
        row = next(np.array(row, float) for module, row in weights.items() if module in name)
        np.testing.assert_allclose(before - after, np.tensordot(row, gradients[name], 1), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("constraint", ["relu", pytest.param("softplus", marks=pytest.mark.slow), "projection"])
@pytest.mark.parametrize("solver", ["dense", pytest.param("gmres", marks=pytest.mark.slow)])
def test_the_hypergradient_is_that_of_the_solved_lower_level(constraint, solver):
    """With J^T: the field of two modules is not a gradient."""
    problem, dev, scale = split_problem(0), split_problem(1), 0.5
    made = {"dense": dense(), "gmres": gmres(rtol=1e-13, max_steps=50)}[solver]
    method = auxjax.methods.get(
        "maoal", constraint=constraint, hypergradient=implicit(made), outer_optimizer=optax.sgd(1.0)
    )
    context, state = state_of(split_model(), problem, method=method)
    raw = np.array([[0.4, 1.2], [0.8, 0.3]])
    squash = {"relu": lambda x: np.maximum(x, 0), "softplus": lambda x: np.log1p(np.exp(x)), "projection": np.array}

    def outer(raw):
        theta = np.linalg.solve(*matrices(problem.batch, squash[constraint](raw), scale))
        return numpy_means(dev.batch, theta)[0], theta

    theta = outer(raw)[1]
    params = {"a": {"w": jnp.array(theta[SPLIT[0]])}, "b": {"w": jnp.array(theta[SPLIT[1]])}}
    state = state._replace(params=params, method=state.method._replace(meta=jnp.array(raw)))
    new, metrics = method.outer(context, state, problem.batch, dev.batch, KEY)
    found, delta = np.zeros((2, 2)), 1e-6
    for index in np.ndindex(2, 2):
        step = np.zeros((2, 2))
        step[index] = delta
        found[index] = (outer(raw + step)[0] - outer(raw - step)[0]) / (2 * delta)
    np.testing.assert_allclose(raw - np.asarray(new.method.meta), found, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(metrics["outer_loss"], outer(raw)[0], rtol=1e-10)
    assert metrics["hypergradient/relative_residual"] < 1e-10


def test_the_wrong_transpose_would_be_seen():
    problem, dev = split_problem(0), split_problem(1)
    a, c = matrices(problem.batch, np.array([[0.4, 1.2], [0.8, 0.3]]), 0.5)
    v = numpy_gradients(dev.batch, np.linalg.solve(a, c))[0]
    right, wrong = np.linalg.solve(a.T, v), np.linalg.solve(a, v)
    assert np.linalg.norm(right - wrong) > 0.01 * np.linalg.norm(right)


def test_one_module_is_a_weight_per_task():
    """The hypergradient is that of `BilevelProblem(inner=)` with scalar weights."""
    problem, dev = split_problem(0), split_problem(1)
    method = auxjax.methods.get(
        "maoal",
        module_of=lambda path: "all",
        reduction="sum",
        hypergradient=implicit(dense()),
        outer_optimizer=optax.sgd(1.0),
    )
    context, state = state_of(split_model(), problem, method=method)
    new, _ = method.outer(context, state, problem.batch, dev.batch, KEY)

    def inner(params, weights, batch):
        means = {task: jnp.mean(value) for task, value in split_model().losses(params, batch, KEY).values.items()}
        return means["primary"] + weights[0] * means["aux0"] + weights[1] * means["aux1"]

    scalar = BilevelProblem(inner=inner, outer=outer_level.primary_loss(context, None, KEY))
    gradient, _ = implicit(dense())(scalar, state.params, jnp.ones(2), problem.batch, dev.batch)
    np.testing.assert_allclose(1.0 - np.asarray(new.method.meta)[0], gradient, rtol=1e-9)


@pytest.mark.parametrize("constraint", ["relu", "softplus", "projection"])
def test_which_entries_come_back_from_zero(constraint):
    problem, dev = split_problem(0), split_problem(1)
    method = auxjax.methods.get(
        "maoal", constraint=constraint, hypergradient=implicit(dense()), outer_optimizer=optax.sgd(100.0)
    )
    context, state = state_of(split_model(), problem, method=method)
    start = jnp.full((2, 2), -3.0 if constraint == "softplus" else 0.0)
    state = state._replace(method=state.method._replace(meta=start))
    new, metrics = method.outer(context, state, problem.batch, dev.batch, KEY)
    moved = np.asarray(new.method.meta != start)
    if constraint == "relu":
        assert not moved.any()
        assert metrics["dead"] == 1.0
    else:
        assert moved.any()
    if constraint == "projection":
        assert np.asarray(new.method.meta).min() >= 0


@pytest.mark.slow
def test_every_leaf_may_be_a_module(ordinary_promotion):
    problem, model = network_problem(0, num_tasks=2)
    method = auxjax.methods.get("maoal", module_of=lambda path: path)
    context, state = state_of(model, problem, method=method)
    assert state.method.meta.shape == (3, 1)
    new, metrics = method.outer(context, state, problem.batch, problem.batch, KEY)
    assert "importance/trunk_0/b/aux0" in metrics
    assert np.all(np.isfinite(new.method.meta))


def test_a_loss_difference_cannot_be_taken_of_a_field():
    problem = split_problem(0)
    method = auxjax.methods.get("maoal", hypergradient=finite_difference(0.1))
    context, state = state_of(split_model(), problem, method=method)
    with pytest.raises(ValueError, match="one_step"):
        method.outer(context, state, problem.batch, problem.batch, KEY)


@pytest.mark.parametrize("options", [{"constraint": "abs"}, {"reduction": "max"}, {"auxiliary_weight": -1.0}])
def test_mistakes_are_named(options):
    with pytest.raises(ValueError, match="maoal"):
        auxjax.methods.get("maoal", **options)


def test_masks_count_labelled_examples_only():
    batch = split_problem(0, masked=True).batch
    assert any(labelled(batch, task).sum() < 20 for task in order(batch))
