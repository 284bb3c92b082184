"""Uncertainty weighting against its formulas in NumPy, and against the variances it should find."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from tests.helpers.training_problems import LinearTasks, linear_model, numpy_gradients, numpy_means, state_of

KEY = jax.random.key(0)
TASKS = ("primary", "aux0", "aux1")


def by_name(state):
    """The log variances of a state in which every task has one."""
    found = state.method.log_variances
    return dict(zip(sorted(TASKS[: len(found)]), found, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("options", "factors", "start"),
    [
        ({}, (1.0, 1.0, 1.0), 0.0),
        ({"regression": ("primary", "aux1")}, (0.5, 1.0, 0.5), 0.0),
        ({"form": "public_code"}, (0.5, 0.5, 0.5), -0.5),
    ],
)
def test_two_updates_are_the_formulas(options, factors, start, masked):
    problem = LinearTasks.make(0, num_tasks=3, masked=masked)
    model = linear_model(masked=masked)
    method = auxjax.methods.get("uncertainty", optimizer=optax.sgd(0.3), **options)
    context, state = state_of(model, problem, method=method, optimizer=optax.sgd(0.1))
    w, s, factors = np.asarray(problem.params["w"]), np.full(3, start), np.array(factors)
    for _ in range(2):
        state, metrics = method.inner(context, state, problem.batch, KEY)
        weights = factors * np.exp(-s)
        w, s = (
            w - 0.1 * weights @ numpy_gradients(problem.batch, w),
            s - 0.3 * (0.5 - weights * numpy_means(problem.batch, w)),
        )
        np.testing.assert_allclose([metrics[f"weight/{task}"] for task in TASKS], weights, rtol=1e-12)
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-12)
        np.testing.assert_allclose([by_name(state)[task] for task in TASKS], s, rtol=1e-12)


def test_the_variances_are_the_residual_ones():
    """At the joint minimum every sigma^2 of a regression is its mean squared error, twice the loss here."""
    problem = LinearTasks.make(0, num_tasks=2)
    method = auxjax.methods.get("uncertainty", optimizer=optax.sgd(0.1), regression=("primary", "aux0"))
    init, step = auxjax.make_step(linear_model(), method, optax.sgd(0.1), donate=False)
    state = init(KEY, problem.params, problem.batch)
    state, _ = jax.lax.scan(lambda s, _: step(s, problem.batch), state, None, length=3000)
    means = numpy_means(problem.batch, np.asarray(state.params["w"]))
    variances = np.exp([by_name(state)[task] for task in ("primary", "aux0")])
    np.testing.assert_allclose(variances, means, rtol=1e-6)  # exp(-s) L / 2 + s / 2 is least where exp(s) = L


def test_a_task_without_labels_keeps_its_variance():
    problem = LinearTasks.make(0, num_tasks=3, masked=True)
    problem.batch["mask"]["aux0"] = np.zeros(8, bool)
    method = auxjax.methods.get("uncertainty", optimizer=optax.sgd(0.3))
    context, state = state_of(linear_model(masked=True), problem, method=method)
    state, _ = method.inner(context, state, problem.batch, KEY)
    assert by_name(state)["aux0"] == 0.0
    assert by_name(state)["aux1"] != 0.0


def test_a_bound_stops_losses_below_zero():
    problem = LinearTasks.make(0, num_tasks=2)

    def losses(params, batch, key):
        out = linear_model().losses(params, batch, key)
        return out._replace(values={**out.values, "aux0": out.values["aux0"] - 100.0})

    method = auxjax.methods.get("uncertainty", optimizer=optax.sgd(0.1), smallest=-3.0)
    init, step = auxjax.make_step(auxjax.TaskModel(losses, "primary"), method, optax.sgd(0.0), donate=False)
    state = init(KEY, problem.params, problem.batch)
    for _ in range(5):
        state, _ = step(state, problem.batch)
    assert by_name(state)["aux0"] == -3.0


def test_the_primary_task_can_be_left_out():
    problem = LinearTasks.make(0, num_tasks=3)
    method = auxjax.methods.get("uncertainty", weigh_primary=False, optimizer=optax.sgd(0.3))
    context, state = state_of(linear_model(), problem, method=method)
    state, metrics = method.inner(context, state, problem.batch, KEY)
    assert state.method.log_variances.shape == (2,)
    assert metrics["weight/primary"] == 1.0


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        ({"form": "code"}, "'paper' or 'public_code'"),
        ({"regression": "primary"}, r"\('primary',\)"),
        ({"initial": -20.0}, "smallest <= initial"),
        ({"regression": ("depth",)}, "names 'depth'"),
    ],
)
def test_mistakes_are_named(options, piece):
    with pytest.raises(ValueError, match=piece):
        state_of(linear_model(), LinearTasks.make(0), method=auxjax.methods.get("uncertainty", **options))


def test_momentum_does_not_move_what_has_no_label(ordinary_promotion):
    problem = LinearTasks.make(0, num_tasks=3, masked=True)
    method = auxjax.methods.get("uncertainty", optimizer=optax.adam(0.1))
    context, state = state_of(linear_model(masked=True), problem, method=method)
    for _ in range(3):
        state, _ = method.inner(context, state, problem.batch, KEY)
    problem.batch["mask"]["aux0"] = jnp.zeros(8, bool)
    new, _ = method.inner(context, state, problem.batch, KEY)
    assert by_name(new)["aux0"] == by_name(state)["aux0"] != 0.0
    assert by_name(new)["aux1"] != by_name(state)["aux1"]
