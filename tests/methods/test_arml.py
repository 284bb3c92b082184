"""ARML against NumPy, the exact quadratic program, and the Gaussian posterior it samples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.formulas.simplex import simplex_quadratic_program
from tests.helpers.training_problems import LinearTasks, linear_model, state_of

KEY = jax.random.key(0)
TASKS = ("primary", "aux0", "aux1")


def two_parameter_regression(seed, *, exact_optima):
    """The regression of Shamsian et al. (2023): primary and helpful optimum (1, 1), harmful (-1, -4), 1,000 points.

    The primary task's noise has standard deviation 5, the others' 0.25. With `exact_optima` the part of the noise that
    the inputs could explain is taken out, so that the least-squares optima are these points and not estimates of them.
    """
    rng = np.random.default_rng(seed)
    batch = {"x": {}, "y": {}}
    for task, optimum, noise in (("primary", (1, 1), 5.0), ("aux0", (1, 1), 0.25), ("aux1", (-1, -4), 0.25)):
        x, errors = rng.normal(size=(1000, 2)), noise * rng.normal(size=1000)
        if exact_optima:
            errors -= x @ np.linalg.lstsq(x, errors, rcond=None)[0]
        batch["x"][task] = jnp.array(x)
        batch["y"][task] = jnp.array(x @ np.array(optimum, float) + errors)
    return LinearTasks(batch, {"w": jnp.array(rng.normal(size=2))})


def gradients(problem, w):
    """[K + 1, dim], gradients of the mean losses, primary first."""
    found = []
    for task in TASKS:
        x, y = np.asarray(problem.batch["x"][task]), np.asarray(problem.batch["y"][task])
        found.append(x.T @ (x @ w - y) / len(y))
    return np.array(found)


def train(problem, method, num_steps, *, learning_rate=0.1, key=KEY):
    init, step = auxjax.make_step(linear_model(), method, optax.sgd(learning_rate))
    state = init(key, problem.params, problem.batch)
    state, metrics = jax.lax.scan(lambda s, _: step(s, problem.batch), state, None, length=num_steps)
    return state, metrics


def test_one_update_of_the_weights_is_the_published_formula():
    problem = LinearTasks.make(0, num_tasks=3)
    method = auxjax.methods.get("arml", outer_optimizer=optax.sgd(0.01))
    context, state = state_of(linear_model(), problem, method=method)
    state = state._replace(method=state.method._replace(weights=jnp.array([0.4, 1.6])))
    new, metrics = method.outer(context, state, problem.batch, None, KEY)
    g = gradients(problem, np.asarray(state.params["w"]))
    residual = g[0] - 0.4 * g[1] - 1.6 * g[2]
    moved = np.array([0.4, 1.6]) + 0.01 * 2 * g[1:] @ residual
    shifted = moved + (2 - moved.sum()) / 2
    assert shifted.min() > 0  # the projection of the test's point is the shift alone
    np.testing.assert_allclose(new.method.weights, shifted, rtol=1e-12)
    np.testing.assert_allclose(metrics["score_divergence"], residual @ residual, rtol=1e-12)


def test_shift_and_clamp_may_exceed_the_total():
    problem = LinearTasks.make(0, num_tasks=3)
    method = auxjax.methods.get("arml", projection="shift_and_clamp", outer_optimizer=optax.sgd(0.0))
    context, state = state_of(linear_model(), problem, method=method)
    state = state._replace(method=state.method._replace(weights=jnp.array([2.5, -0.5])))
    new, _ = method.outer(context, state, problem.batch, None, KEY)
    np.testing.assert_allclose(new.method.weights, [2.5, 0.0], rtol=1e-15)


@pytest.mark.parametrize("form", ["merged", "two_stage"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_harmful_task_of_the_two_parameter_regression_gets_no_weight(form, seed):
    problem = two_parameter_regression(seed, exact_optima=True)
    sampling = {"step_size": 0.05, "temperature": 1e-3} if form == "two_stage" else {}
    method = auxjax.methods.get("arml", form=form, outer_optimizer=optax.sgd(0.01), **sampling)
    state, metrics = train(problem, method, 1500)
    assert state.method.weights[1] < 0.02
    np.testing.assert_allclose(state.method.weights.sum(), 2.0, rtol=1e-6)
    assert not state.method.sampling
    np.testing.assert_allclose(state.params["w"], [1, 1], atol=0.1)
    assert np.all(np.isfinite(metrics["score_divergence"]))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_with_noise_in_the_optima_weights_are_the_exact_quadratic_programs(seed):
    """The noisy primary task's own optimum is off by 0.16 or so; the exact weight of the harmful task is then not 0."""
    problem = two_parameter_regression(seed, exact_optima=False)
    state, _ = train(problem, auxjax.methods.get("arml", outer_optimizer=optax.sgd(0.01)), 3000)
    g = gradients(problem, np.asarray(state.params["w"]))
    exact = simplex_quadratic_program(jnp.array(g[1:] @ g[1:].T), jnp.array(g[1:] @ g[0]), 2.0)
    np.testing.assert_allclose(state.method.weights, exact, atol=1e-3)
    assert state.method.weights[1] < 0.15
    single, _ = train(problem, auxjax.methods.get("stl"), 1500)
    assert np.linalg.norm(state.params["w"] - 1) < np.linalg.norm(single.params["w"] - 1)


def test_weights_agree_with_the_exact_quadratic_program_inside_the_simplex():
    rng = np.random.default_rng(5)
    problem = LinearTasks.make(5, num_tasks=3, num_examples=40)
    for task, optimum in zip(TASKS, ((1.0, 1.0, 0.0), (1.5, 0.2, 0.0), (0.3, 1.6, 0.5)), strict=True):
        x = np.asarray(problem.batch["x"][task])
        problem.batch["y"][task] = jnp.array(x @ np.array(optimum) + 0.1 * rng.normal(size=40))
    method = auxjax.methods.get("arml", outer_optimizer=optax.sgd(0.05))
    state, _ = train(problem, method, 20000)
    g = gradients(problem, np.asarray(state.params["w"]))
    exact = simplex_quadratic_program(jnp.array(g[1:] @ g[1:].T), jnp.array(g[1:] @ g[0]), 2.0)
    assert exact.min() > 0.05
    np.testing.assert_allclose(state.method.weights, exact, atol=1e-3)


@pytest.mark.slow
def test_langevin_stage_samples_the_gaussian_posterior():
    problem = LinearTasks.make(7, num_tasks=3, num_examples=20)
    step_size, temperature, chains, steps = 0.05, 1 / 20, 4000, 400
    method = auxjax.methods.get("arml", form="two_stage", step_size=step_size, temperature=temperature)
    context, state = state_of(linear_model(), problem, method=method)

    def chain(key):
        def update(carry, index):
            new, _ = method.inner(context, carry, problem.batch, jax.random.fold_in(key, index))
            return new, None

        return jax.lax.scan(update, state, jnp.arange(steps))[0].params["w"]

    samples = np.asarray(jax.jit(jax.vmap(chain))(jax.random.split(KEY, chains)))
    x = [np.asarray(problem.batch["x"][task]) for task in TASKS]
    y = [np.asarray(problem.batch["y"][task]) for task in TASKS]
    hessian = sum(a.T @ a / 20 for a in x)
    mean = np.linalg.solve(hessian, sum(a.T @ b / 20 for a, b in zip(x, y, strict=True)))
    # The chain's own stationary covariance: discretisation divides the posterior's T H^-1 by (I - step H / 2).
    covariance = temperature * np.linalg.inv(hessian - step_size * hessian @ hessian / 2)
    error_of_mean = np.sqrt(np.diag(covariance) / chains)
    assert np.all(np.abs(samples.mean(0) - mean) < 4 * error_of_mean)
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    error_of_covariance = np.sqrt((scale**2 + covariance**2) / chains)
    assert np.all(np.abs(np.cov(samples.T) - covariance) < 4 * error_of_covariance)
    assert np.all(np.abs(covariance - temperature * np.linalg.inv(hessian)) < 0.2 * scale)


def test_after_sampling_weights_stay_and_training_is_plain():
    problem = two_parameter_regression(0, exact_optima=False)
    method = auxjax.methods.get(
        "arml",
        form="two_stage",
        step_size=0.05,
        temperature=1e-3,
        min_updates=1,
        max_updates=30,
        outer_optimizer=optax.sgd(0.001),
        tolerance=1e-12,
    )
    state, metrics = train(problem, method, 60)
    assert int(np.sum(np.asarray(metrics["sampling"]))) == 29  # the 30th update ends it
    fixed = state.method.weights
    again, _ = train(problem._replace(params=state.params), auxjax.methods.get("stl"), 1)
    assert again.step == 1
    init, step = auxjax.make_step(linear_model(), method, optax.sgd(0.1), donate=False)
    after, _ = step(state, problem.batch)
    np.testing.assert_array_equal(after.method.weights, fixed)
    g = gradients(problem, np.asarray(state.params["w"]))
    plain = np.asarray(state.params["w"]) - 0.1 * (g[0] + np.asarray(fixed) @ g[1:])
    np.testing.assert_allclose(after.params["w"], plain, rtol=1e-12)
    assert init is not None


def test_without_noise_the_langevin_stage_is_gradient_descent():
    problem = LinearTasks.make(3, num_tasks=3)
    cold = auxjax.methods.get("arml", form="two_stage", step_size=0.1, temperature=0.0)
    merged = auxjax.methods.get("arml")
    a, _ = train(problem, cold, 20)
    b, _ = train(problem, merged, 20)
    np.testing.assert_allclose(a.params["w"], b.params["w"], rtol=1e-12)


def test_one_auxiliary_task_is_equal_weights():
    problem = LinearTasks.make(4, num_tasks=2)
    a, _ = train(problem, auxjax.methods.get("arml"), 10)
    b, _ = train(problem, auxjax.methods.get("equal"), 10)
    np.testing.assert_allclose(a.params["w"], b.params["w"], rtol=1e-12)


def test_weights_only_compare_gradients_on_the_trunk():
    """A task head with a huge gradient of its own changes nothing."""

    def losses(params, batch, key):
        del key
        shared = batch @ params["trunk"]
        head = 1e3 * params["head"]
        return auxjax.TaskLosses({"primary": shared**2, "aux0": (shared - 1) ** 2, "aux1": (shared + head) ** 2})

    batch, params = jnp.array([[1.0, 0.5], [0.2, -1.0]]), {"trunk": jnp.array([0.3, 0.4]), "head": jnp.array(0.0)}
    found = {}
    for name, trunk in (
        ("predicate", lambda path: path == "trunk"),
        ("mask", {"trunk": True, "head": False}),
        ("all", None),
    ):
        model = auxjax.TaskModel(losses, primary="primary", trunk=trunk)
        method = auxjax.methods.get("arml", outer_optimizer=optax.sgd(1e-2))
        context, state = state_of(model, LinearTasks(batch, params), method=method)
        new, _ = method.outer(context, state, batch, None, KEY)
        found[name] = np.asarray(new.method.weights)
    np.testing.assert_array_equal(found["predicate"], found["mask"])
    assert np.abs(found["predicate"] - 1).max() < 0.1
    assert np.abs(found["all"] - 1).max() > 0.5


def test_primary_labels_may_drive_the_weights_only():
    problem = LinearTasks.make(6, num_tasks=3)
    method = auxjax.methods.get("arml", train_primary=False)
    context, state = state_of(linear_model(), problem, method=method)
    new, _ = method.inner(context, state, problem.batch, KEY)
    w = np.asarray(state.params["w"])
    np.testing.assert_allclose(new.params["w"], w - 0.1 * gradients(problem, w)[1:].sum(0), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "three"}, "expected 'merged' or 'two_stage'"),
        ({"form": "two_stage"}, "needs both"),
        ({"form": "two_stage", "step_size": -1.0, "temperature": 1.0}, r"step_size=-1\.0.*>= 0"),
        ({"step_size": 0.1}, "adds no noise"),
        ({"projection": "softmax"}, "'simplex' or 'shift_and_clamp'"),
        ({"total": 0.0}, "expected a finite number > 0"),
        ({"max_updates": 1}, "min_updates <= max_updates"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        auxjax.methods.get("arml", **options)


def test_no_auxiliary_task_is_refused():
    problem = LinearTasks.make(0, num_tasks=1)
    with pytest.raises(ValueError, match="the model has none"):
        state_of(linear_model(), problem, method=auxjax.methods.get("arml"))


def test_step_size_and_temperature_may_be_swept():
    """As arguments of `vmap`: one program for several noise levels."""
    problem = LinearTasks.make(0, num_tasks=3)

    def run(step_size, temperature):
        method = auxjax.methods.get("arml", form="two_stage", step_size=step_size, temperature=temperature)
        context, state = state_of(linear_model(), problem, method=method)
        return method.inner(context, state, problem.batch, KEY)[0].params["w"]

    sizes, temperatures = jnp.array([0.1, 0.2]), jnp.array([0.0, 0.5])
    swept = jax.vmap(run)(sizes, temperatures)
    for found, step_size, temperature in zip(swept, sizes, temperatures, strict=True):
        np.testing.assert_allclose(found, run(float(step_size), float(temperature)), rtol=1e-12)


@pytest.mark.slow
def test_a_batch_without_a_primary_label_moves_no_weight(ordinary_promotion):
    """There is no primary gradient to match; what cancels out would be favoured."""
    problem = LinearTasks.make(0, num_tasks=3, masked=True)
    method = auxjax.methods.get("arml")
    context, state = state_of(linear_model(masked=True), problem, method=method)
    before, _ = method.outer(context, state, problem.batch, None, KEY)
    problem.batch["mask"]["primary"] = jnp.zeros(8, bool)
    after, _ = method.outer(context, before, problem.batch, None, KEY)
    jax.tree.map(np.testing.assert_array_equal, after.method, before.method)
    assert np.ptp(before.method.weights) > 0


def gaussians(seed, short):
    """The scores of Gaussians at one point, primary first: one alike, one across, one whose score is `short`."""
    first, alike, across, other = np.random.default_rng(seed).normal(size=(4, 6))
    unit = lambda vector: vector / np.linalg.norm(vector)  # noqa: E731
    scores = np.stack([3 * unit(first), 2 * unit(first + 0.4 * alike), 2 * unit(across), short * unit(other)])

    # -log p = |theta - mu|^2 / 2 v has the score (theta - mu) / v: at theta = 0 and v = 1 the mean is minus the score.
    def losses(params, batch, key):
        del key
        values = {
            task: 0.5 * jnp.sum((params["theta"] + mean) ** 2, keepdims=True)
            for task, mean in zip(("primary", "aux0", "aux1", "aux2"), batch, strict=True)
        }
        return auxjax.TaskLosses(values)

    return auxjax.TaskModel(losses, primary="primary"), LinearTasks(jnp.array(scores), {"theta": jnp.zeros(6)}), scores


@pytest.mark.parametrize("normalise", [False, True])
def test_weights_of_gaussians_are_the_quadratic_programs_with_and_without_the_lengths(normalise):
    """A short score, of a solved task or of noise, takes what the sum leaves; by direction it does not."""
    for seed in (0, 1):
        model, problem, scores = gaussians(seed, short=1e-3)
        method = auxjax.methods.get("arml", normalise=normalise, outer_optimizer=optax.sgd(0.05))
        context, state = state_of(model, problem, method=method)
        update = jax.jit(lambda s, m=method, c=context, p=problem: m.outer(c, s, p.batch, None, KEY)[0])
        state = jax.lax.fori_loop(0, 1500, lambda _, s, u=update: u(s), state)
        compared = scores / np.linalg.norm(scores, axis=1, keepdims=True) if normalise else scores
        rest = jnp.array(compared[1:])
        exact = simplex_quadratic_program(rest @ rest.T, rest @ compared[0], 3.0)
        np.testing.assert_allclose(state.method.weights, exact, atol=1e-6)
        _, metrics = method.outer(context, state, problem.batch, None, KEY)
        left = compared[0] - np.asarray(state.method.weights) @ compared[1:]
        np.testing.assert_allclose(metrics["score_divergence"], left @ left, rtol=1e-9)
        alike, _, short = state.method.weights
        assert (short < alike) if normalise else (short > 1.4)


def test_a_score_of_zero_has_no_direction():
    model, problem, _ = gaussians(0, short=0.0)
    method = auxjax.methods.get("arml", normalise=True)
    context, state = state_of(model, problem, method=method)
    new, metrics = method.outer(context, state, problem.batch, None, KEY)
    assert np.all(np.isfinite(new.method.weights))
    assert metrics["skipped"] == 0
