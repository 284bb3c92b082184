"""JTDS against NumPy, finite differences of the re-solved inner problem, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax import amortise, cg, dense, implicit, normal_cg, single_loop
from auxjax.methods._jtds import TaskSchedule, standardised
from auxjax.solvers import nystrom_preparation
from tests.helpers.training_problems import LinearTasks, linear_model, state_of

KEY = jax.random.key(0)
TASKS = ("primary", "aux0", "aux1")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def random_schedule(seed, dim=3):
    """A schedule with every factor in play."""
    rng = np.random.default_rng(seed)
    return {
        task: TaskSchedule(*(jnp.array(v) for v in (rng.normal(), 0.5 * rng.normal(size=dim), *rng.normal(size=2))))
        for task in TASKS
    }


def oracle_weights(problem, schedule, w, squash, *, standardise):
    """The formula of the module's docstring, example by example."""
    found = {}
    for task in TASKS:
        x, y = np.asarray(problem.batch["x"][task]), np.asarray(problem.batch["y"][task])
        mask = np.asarray(problem.batch.get("mask", {}).get(task, np.ones(len(y), bool)))
        losses = 0.5 * (x @ w - y) ** 2
        if standardise:
            losses = (losses - losses[mask].mean()) / losses[mask].std()
        part = schedule[task]
        filtered = sigmoid(float(part.slope) * losses + float(part.offset))
        found[task] = squash(float(part.importance)) * squash(x @ np.asarray(part.prototype)) * filtered
    return found


@pytest.mark.parametrize(("activation", "squash"), [("sigmoid", sigmoid), ("softplus", softplus)])
@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_weights_are_the_product_of_three_factors(activation, squash, standardise, masked):
    problem = LinearTasks.make(0, num_tasks=3, masked=masked)
    method = auxjax.methods.get("jtds", activation=activation, standardise=standardise)
    context, state = state_of(linear_model(masked=masked), problem, method=method)
    state = state._replace(method=state.method._replace(meta=random_schedule(1)))
    weights = method.weights(context, state, problem.batch, KEY)
    expected = oracle_weights(
        problem, state.method.meta, np.asarray(state.params["w"]), squash, standardise=standardise
    )
    for task in TASKS:
        labelled = np.asarray(problem.batch["mask"][task]) if masked else slice(None)
        np.testing.assert_allclose(weights[task][labelled], expected[task][labelled], rtol=1e-9)


def test_inner_update_is_the_weighted_gradient_with_the_weights_held_fixed():
    problem = LinearTasks.make(2, num_tasks=3)
    method = auxjax.methods.get("jtds")
    context, state = state_of(linear_model(), problem, method=method)
    state = state._replace(method=state.method._replace(meta=random_schedule(3)))
    new, metrics = method.inner(context, state, problem.batch, KEY)
    w = np.asarray(state.params["w"])
    weights = oracle_weights(problem, state.method.meta, w, sigmoid, standardise=True)
    gradient = np.zeros(3)
    for task in TASKS:
        x, y = np.asarray(problem.batch["x"][task]), np.asarray(problem.batch["y"][task])
        gradient += x.T @ (weights[task] * (x @ w - y)) / len(y)
        np.testing.assert_allclose(metrics[f"weight/{task}"], weights[task].mean(), rtol=1e-9)
    np.testing.assert_allclose(new.params["w"], w - 0.1 * gradient, rtol=1e-9)


def hypergradient(problem, dev, schedule, w, **options):
    """The method's own outer gradient, read off an SGD step of length 1 on the schedule."""
    method = auxjax.methods.get("jtds", outer_optimizer=optax.sgd(1.0), hypergradient=implicit(dense()), **options)
    context, state = state_of(linear_model(), problem._replace(params={"w": w}), method=method)
    state = state._replace(method=state.method._replace(meta=schedule))
    new, metrics = method.outer(context, state, problem.batch, dev.batch, KEY)
    return jax.tree.map(lambda a, b: a - b, schedule, new.method.meta), metrics


def inner_solver(problem, *, held_at=None):
    """`(schedule, start) -> params` at which the inner update stands still, by Newton's method.

    With `held_at` the weights are those at these params, whatever the params are.
    """
    method, model = auxjax.methods.get("jtds", standardise=False), linear_model()
    context, state = state_of(model, problem, method=method)

    def field(w, schedule):
        at = state._replace(
            params={"w": w if held_at is None else held_at}, method=state.method._replace(meta=schedule)
        )
        weights = method.weights(context, at, problem.batch, KEY)
        return jax.grad(lambda v: auxjax.weighted_loss(model.losses({"w": v}, problem.batch, KEY).values, weights))(w)

    def solve(schedule, start):
        def newton(w, _):
            return w - jnp.linalg.solve(jax.jacobian(field)(w, schedule), field(w, schedule)), None

        w = jax.lax.scan(newton, start, None, length=30)[0]
        return w, jnp.max(jnp.abs(field(w, schedule)))

    return solve


def mild_schedule():
    """Slopes small enough that the inner fixed point is unique and Newton finds it."""
    scaled = random_schedule(5)
    return {task: part._replace(slope=0.1 * part.slope) for task, part in scaled.items()}


@pytest.mark.parametrize("jacobian", ["exact", pytest.param("held_fixed", marks=pytest.mark.slow)])
def test_hypergradient_is_that_of_the_re_solved_inner_problem(jacobian):
    """Exact: of the true fixed point. Held fixed: of the problem whose filter does not see the params move."""
    problem, dev, schedule = LinearTasks.make(6, num_tasks=3), LinearTasks.make(7, num_tasks=3), mild_schedule()
    w, error = jax.jit(inner_solver(problem))(schedule, problem.params["w"])
    assert error < 1e-13
    gradient, metrics = hypergradient(problem, dev, schedule, w, jacobian=jacobian, standardise=False)
    assert metrics["hypergradient/relative_residual"] < 1e-12
    assert metrics["hypergradient/inner_grad_norm"] < 1e-12

    flat, unravel = jax.flatten_util.ravel_pytree(schedule)
    solve = inner_solver(problem, held_at=None if jacobian == "exact" else w)

    def dev_loss(shift):
        solved, error = solve(unravel(flat + shift), w)
        x, y = dev.batch["x"]["primary"], dev.batch["y"]["primary"]
        return jnp.mean(0.5 * (x @ solved - y) ** 2), error

    step = 1e-4
    up, errors = jax.jit(jax.vmap(dev_loss))(step * jnp.eye(flat.size))
    down, more = jax.jit(jax.vmap(dev_loss))(-step * jnp.eye(flat.size))
    assert max(errors.max(), more.max()) < 1e-12
    found, _ = jax.flatten_util.ravel_pytree(gradient)
    np.testing.assert_allclose(found, (up - down) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_the_two_jacobians_differ_only_by_how_weights_follow_the_params():
    problem, dev, schedule = LinearTasks.make(6, num_tasks=3), LinearTasks.make(7, num_tasks=3), mild_schedule()
    w = problem.params["w"]
    exact, _ = hypergradient(problem, dev, schedule, w, jacobian="exact", standardise=False)
    held, _ = hypergradient(problem, dev, schedule, w, jacobian="held_fixed", standardise=False)
    difference = np.abs(np.asarray(exact["aux0"].prototype) - np.asarray(held["aux0"].prototype)).max()
    assert difference > 1e-3 * np.abs(np.asarray(exact["aux0"].prototype)).max()
    flat = {task: part._replace(slope=jnp.zeros(())) for task, part in schedule.items()}
    same = [hypergradient(problem, dev, flat, w, jacobian=kind)[0] for kind in ("exact", "held_fixed")]
    for a, b in zip(*(jax.tree.leaves(gradient) for gradient in same), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14)


def test_unscheduled_primary_task_keeps_weight_one():
    problem = LinearTasks.make(0, num_tasks=2)
    method = auxjax.methods.get("jtds", schedule_primary=False)
    context, state = state_of(linear_model(), problem, method=method)
    assert list(state.method.meta) == ["aux0"]
    weights = method.weights(context, state, problem.batch, KEY)
    np.testing.assert_array_equal(weights["primary"], np.ones(8))


@pytest.mark.slow
def test_warm_start_is_the_last_solution():
    problem, dev = LinearTasks.make(0, num_tasks=2), LinearTasks.make(1, num_tasks=2)
    method = auxjax.methods.get(
        "jtds", warm_start=True, hypergradient=implicit(dense()), outer_optimizer=optax.sgd(0.1)
    )
    context, state = state_of(linear_model(), problem, method=method)
    new, _ = method.outer(context, state, problem.batch, dev.batch, KEY)
    weights = method.weights(context, state, problem.batch, KEY)
    hessian = sum(
        np.asarray(problem.batch["x"][t]).T @ (np.asarray(weights[t])[:, None] * np.asarray(problem.batch["x"][t])) / 8
        for t in ("primary", "aux0")
    )
    x, y = (np.asarray(dev.batch[name]["primary"]) for name in ("x", "y"))
    v = x.T @ (x @ np.asarray(problem.params["w"]) - y) / 8
    np.testing.assert_allclose(new.method.hypergradient["w"], np.linalg.solve(hessian, v), rtol=1e-8)


def test_solvers_that_cannot_average_over_replicas_serve_where_there_are_none():
    problem, dev = LinearTasks.make(0, num_tasks=2), LinearTasks.make(1, num_tasks=2)
    schedules = []
    for solver in (dense(), normal_cg(rtol=1e-12)):
        method = auxjax.methods.get("jtds", hypergradient=implicit(solver), outer_optimizer=optax.sgd(0.1))
        context, state = state_of(linear_model(), problem, method=method)
        new, _ = method.outer(context, state, problem.batch, dev.batch, KEY)
        schedules.append(new.method.meta)
    for one, two in zip(jax.tree.leaves(schedules[0]), jax.tree.leaves(schedules[1]), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-8)


@pytest.mark.slow
def test_an_estimator_with_state_lives_in_the_training_state():
    """Its gradients are those of the same solver called by hand, and its state resumes from step to step."""
    problem, dev = LinearTasks.make(0, num_tasks=2), LinearTasks.make(1, num_tasks=2)
    carried = amortise(
        lambda sketch: cg(max_steps=30, rtol=1e-10, preconditioner=sketch, unroll=False),
        prepare=nystrom_preparation(2, damping=0.0),
        every=2,
    )
    by_hand = auxjax.methods.get("jtds", hypergradient=implicit(dense()), outer_optimizer=optax.sgd(0.1))
    method = auxjax.methods.get("jtds", hypergradient=carried, outer_optimizer=optax.sgd(0.1))
    context, state = state_of(linear_model(), problem, method=method)
    _, other = state_of(linear_model(), problem, method=by_hand)
    assert other.method.hypergradient == ()
    for count in (1, 2, 3):
        state, metrics = method.outer(context, state, problem.batch, dev.batch, KEY)
        other, _ = by_hand.outer(context, other, problem.batch, dev.batch, KEY)
        assert state.method.hypergradient.count == count
        assert metrics["hypergradient/converged"]
    for one, two in zip(jax.tree.leaves(state.method.meta), jax.tree.leaves(other.method.meta), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("standardise", [True, False])
def test_unlabelled_examples_may_be_nan_and_change_nothing(standardise):
    """In loss and features, in the outer update too."""
    problem, dev = LinearTasks.make(0, num_tasks=2), LinearTasks.make(1, num_tasks=2)
    model, mask = linear_model(), jnp.arange(8) != 3

    def spoiled(value):
        def losses(params, batch, key):
            out = model.losses(params, batch, key)
            hit = {task: jnp.where(mask, loss, value) for task, loss in out.values.items()}
            features = jnp.where(mask[:, None], out.features["primary"], value)
            masks = {task: mask for task in hit}
            return out._replace(values=hit, features=dict.fromkeys(hit, features), masks=masks)

        return model._replace(losses=losses)

    schedules = []
    for value in (0.0, jnp.nan):
        method = auxjax.methods.get(
            "jtds", standardise=standardise, hypergradient=implicit(dense(damping=0.1)), outer_optimizer=optax.sgd(0.1)
        )
        context, state = state_of(spoiled(value), problem, method=method)
        new, _ = method.outer(context, state, problem.batch, dev.batch, KEY)
        schedules.append(new.method.meta)
    for one, two in zip(*map(jax.tree.leaves, schedules), strict=True):
        assert np.all(np.isfinite(two))
        np.testing.assert_allclose(one, two, rtol=1e-12)


def test_single_loop_advances_with_the_outer_steps():
    problem, dev = LinearTasks.make(0, num_tasks=2), LinearTasks.make(1, num_tasks=2)
    method = auxjax.methods.get("jtds", hypergradient=single_loop(), outer_optimizer=optax.sgd(1e-6))
    context, state = state_of(linear_model(), problem, method=method)
    outer = jax.jit(lambda state: method.outer(context, state, problem.batch, dev.batch, KEY))
    residuals = []
    for _ in range(40):
        state, metrics = outer(state)
        residuals.append(float(metrics["hypergradient/relative_residual"]))
    assert residuals[-1] < 0.1 * residuals[0]


def test_standardised_losses():
    losses, mask = jnp.array([1.0, 2.0, jnp.nan, 6.0]), jnp.array([True, True, False, True])
    found = standardised(losses, mask)
    np.testing.assert_allclose(found[jnp.array([0, 1, 3])], np.array([-2, -1, 3]) / np.sqrt(14 / 3), rtol=1e-9)
    assert found[2] == 0
    np.testing.assert_array_equal(standardised(jnp.array([3.0]), None), [0.0])
    tiny = standardised(jnp.array([1e-9, 2e-9, 4e-9]), None)  # losses of examples memorised
    np.testing.assert_allclose([tiny.mean(), tiny.std()], [0.0, 1.0], atol=1e-9)
    np.testing.assert_array_equal(standardised(jnp.full(4, 2.0), None), np.zeros(4))
    gradient = jax.grad(lambda x: standardised(x, None).sum())(jnp.full(4, 2.0))
    assert np.all(np.isfinite(gradient))


@pytest.mark.slow
def test_learned_filter_falls_with_the_loss_when_labels_are_wrong():
    """Regression with a third of the labels spoilt: the filter's slope ends negative, the spoilt get less weight."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=5)
    x, dev_x = rng.normal(size=(150, 5)), rng.normal(size=(60, 5))
    spoilt = np.arange(150) < 50
    y = np.where(spoilt, 6 * rng.normal(size=150), x @ w)
    batch = {"x": {"primary": jnp.array(x)}, "y": {"primary": jnp.array(y)}}
    dev = {"x": {"primary": jnp.array(dev_x)}, "y": {"primary": jnp.array(dev_x @ w)}}
    method = auxjax.methods.get("jtds", outer_optimizer=optax.sgd(0.5, momentum=0.9))
    init, step = auxjax.make_step(
        linear_model(), method, optax.sgd(0.5), inner_steps=5, draw_inner=lambda data, key: data
    )
    state = init(KEY, {"w": jnp.zeros(5)}, batch)
    for _ in range(150):
        state, _ = step(state, batch, dev)
    assert state.method.meta["primary"].slope < -1
    weights = np.asarray(auxjax.task_weights(linear_model(), method, state, batch, key=KEY)["primary"])
    assert weights[spoilt].mean() < 0.5 * weights[~spoilt].mean()
    ordinary = np.linalg.lstsq(x, y, rcond=None)[0]
    assert np.linalg.norm(state.params["w"] - w) < 0.5 * np.linalg.norm(ordinary - w)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "'sigmoid' or 'softplus'"),
        ({"jacobian": "none"}, "'held_fixed' or 'exact'"),
        ({"standardise": "batch"}, "True, False or 'sample'"),
        ({"hypergradient": single_loop(), "warm_start": True}, "warm_start"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        auxjax.methods.get("jtds", **options)
    with pytest.raises(TypeError, match="hypergradient"):
        auxjax.methods.get("jtds", hypergradient="neumann")


def test_features_are_needed_and_checked():
    problem = LinearTasks.make(0, num_tasks=2)

    def model_with(features):
        inner = linear_model().losses
        return auxjax.TaskModel(lambda p, b, k: inner(p, b, k)._replace(features=features), primary="primary")

    for features, message in (
        (None, "has none for task 'aux0'"),
        ({"primary": jnp.ones((8, 2))}, "has none for task 'aux0'"),
        (jnp.ones((4, 2)), r"has shape \(4, 2\); expected \[8, d\]"),
        (jnp.ones(8), r"has shape \(8,\); expected \[8, d\]"),
    ):
        with pytest.raises(ValueError, match=message):
            state_of(model_with(features), problem, method=auxjax.methods.get("jtds"))
    one = LinearTasks.make(0, num_tasks=1)
    with pytest.raises(ValueError, match="nothing to schedule"):
        state_of(linear_model(), one, method=auxjax.methods.get("jtds", schedule_primary=False))
