"""Rounds of cross-fitted hypergradients: the signal against re-solved problems, the step by hand, resumption."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.hypergrad import implicit
from auxjax.solvers import dense
from auxjax.training.weight_learning import make_rounds

TASKS = ("far", "near")  # sorted by name, as everywhere
FOLDS, COUNT, DIM = 3, 12, 3


def make_data(seed=0):
    """Few noisy labels of the primary task, many of a task with nearly its solution and of one with another."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=DIM)
    x = rng.normal(size=(COUNT, DIM))
    data = {"x": x, "y": x @ truth + 0.3 * rng.normal(size=COUNT)}
    rows = np.arange(COUNT) % FOLDS
    data["kept"] = np.stack([np.flatnonzero(rows != fold) for fold in range(FOLDS)])
    data["held_out"] = np.stack([np.flatnonzero(rows == fold) for fold in range(FOLDS)])
    for name, solution in (("near", truth + 0.1), ("far", -truth)):
        inputs = rng.normal(size=(20, DIM))
        data[name] = {"x": inputs, "y": inputs @ solution}
    return jax.tree.map(jnp.asarray, data)


def losses(params, batch, key):
    del key

    def squared(part):
        return 0.5 * jnp.square(part["x"] @ params - part["y"])

    return auxjax.TaskLosses({task: squared(part) for task, part in batch.items()})


MODEL = auxjax.TaskModel(losses, primary="primary")


def draw_inner(data, key, fold):
    kept = data["kept"][fold]
    return {"primary": {"x": data["x"][kept], "y": data["y"][kept]}, **{task: data[task] for task in TASKS}}


def draw_held_out(data, key, fold):
    rows = data["held_out"][fold]
    return {"primary": {"x": data["x"][rows], "y": data["y"][rows]}}


UPDATES, RATE = 400, 0.2


@functools.cache
def rounds_of(loop="scan", updates=UPDATES, **options):
    """Rounds long enough to end at the minimum; tests share their compiled program."""
    return make_rounds(
        MODEL,
        optax.sgd(RATE),
        init_params,
        draw_inner=draw_inner,
        draw_held_out=draw_held_out,
        folds=FOLDS,
        updates=updates,
        hypergradient=implicit(dense()),
        loop=loop,
        **options,
    )


def init_params(key):
    return 0.1 * jax.random.normal(key, (DIM,)), None


def solved(data, fold, weights):
    """The params that minimise the inner loss of a fold, by NumPy."""
    batch = jax.tree.map(np.asarray, draw_inner(data, None, fold))
    parts = [(1.0, batch["primary"]), *((weight, batch[task]) for task, weight in zip(TASKS, weights, strict=True))]
    matrix = sum(weight * part["x"].T @ part["x"] / len(part["y"]) for weight, part in parts)
    return np.linalg.solve(matrix, sum(weight * part["x"].T @ part["y"] / len(part["y"]) for weight, part in parts))


def held_out_loss(data, fold, weights):
    part = jax.tree.map(np.asarray, draw_held_out(data, None, fold))["primary"]
    return 0.5 * np.mean((part["x"] @ solved(data, fold, weights) - part["y"]) ** 2)


def test_the_signal_is_the_derivative_of_the_re_solved_problem():
    data = make_data()
    rounds = rounds_of()
    _, info = rounds.round(rounds.init(jax.random.key(0), data), data)
    assert rounds.tasks(data) == list(TASKS)
    for fold in range(FOLDS):
        for place in range(2):
            step = 1e-5 * np.eye(2)[place]
            slope = (held_out_loss(data, fold, 1 + step) - held_out_loss(data, fold, 1 - step)) / 2e-5
            np.testing.assert_allclose(info.signal[-1, fold, place], slope, rtol=1e-6)
        np.testing.assert_allclose(info.held_out[-1, fold], held_out_loss(data, fold, np.ones(2)), rtol=1e-9)
    assert info.weights[1] > 1 > info.weights[0]


def test_the_step_is_the_formula():
    data = make_data()
    rounds = rounds_of()
    state = rounds.init(jax.random.key(1), data)
    logits, squares = np.zeros(2), 0.0
    for _ in range(2):
        state, info = rounds.round(state, data)
        assert info.signal.shape == (2, FOLDS, 2)
        assert info.held_out.shape == info.train.shape == (2, FOLDS)
        mean = np.mean(info.signal, axis=(0, 1))
        mean -= mean.mean()
        squares += np.mean(mean**2)
        logits -= 2 * mean / np.sqrt(squares)
        np.testing.assert_allclose(info.weights, 2 * np.exp(logits) / np.exp(logits).sum(), rtol=1e-9)
    assert state.round == 2


def test_folds_are_those_of_a_loop_over_folds():
    data = make_data()
    rounds = rounds_of()
    info = rounds.round(rounds.init(jax.random.key(2), data), data)[1]
    ones = {task: jnp.ones(()) for task in TASKS}

    @jax.jit
    def of_fold(key, inner, outer):
        """One fold alone: its own params, gradient descent on its own loss, and a dense solve at 3/4 of it."""

        def loss(params, weights):
            means = {task: value.mean() for task, value in losses(params, inner, None).values.items()}
            return means["primary"] + weights["far"] * means["far"] + weights["near"] * means["near"]

        def held_out(params):
            return losses(params, outer, None).values["primary"].mean()

        start = init_params(jax.random.split(key)[0])[0]
        params = jax.lax.fori_loop(0, 3 * UPDATES // 4, lambda _, at: at - RATE * jax.grad(loss)(at, ones), start)
        solution = jnp.linalg.solve(jax.hessian(loss)(params, ones), jax.grad(held_out)(params))
        mixed = jax.jacobian(jax.grad(loss), argnums=1)(params, ones)
        return jnp.stack([-solution @ mixed[task] for task in TASKS])

    for fold in range(FOLDS):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), 0), fold)
        wanted = of_fold(key, draw_inner(data, None, fold), draw_held_out(data, None, fold))
        np.testing.assert_allclose(info.signal[0, fold], wanted, rtol=1e-10)


@pytest.mark.slow
def test_loops_on_the_host_and_in_the_program_agree():
    data = make_data()
    found = []
    for options in ({"loop": "scan"}, {"loop": "host"}, {"loop": "host", "together": False}):
        rounds = rounds_of(**options)
        found.append(rounds.round(rounds.init(jax.random.key(2), data), data)[1])
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), found[0], other)


def test_fold_after_fold_is_for_a_loop_on_the_host_and_chosen_where_there_are_convolutions():
    with pytest.raises(ValueError, match=r"together=False, loop='scan'\): expected loop='host'"):
        rounds_of(together=False)


def test_a_saved_state_resumes_to_the_bit():
    data = make_data()
    rounds = rounds_of()
    states = [rounds.init(jax.random.key(3), data)]
    for _ in range(3):
        states.append(rounds.round(states[-1], data)[0])
    saved = jax.tree.map(np.array, states[1]._replace(key=jax.random.key_data(states[1].key)))
    resumed = jax.tree.map(jnp.asarray, saved)._replace(key=jax.random.wrap_key_data(jnp.asarray(saved.key)))
    for _ in range(2):
        resumed = rounds.round(resumed, data)[0]
    np.testing.assert_array_equal(resumed.logits, states[3].logits)
    np.testing.assert_array_equal(resumed.squares, states[3].squares)


@pytest.mark.parametrize("gives_outputs", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_default_curvatures_are_those_of_the_model(gives_outputs):
    """Where the model is linear and its losses are squares, Gauss-Newton is the Hessian; Fisher is not."""
    data = make_data()
    model = MODEL
    if gives_outputs:
        model = model._replace(
            outputs=lambda params, batch, key: {task: part["x"] @ params for task, part in batch.items()},
            output_losses=lambda z, batch, key: auxjax.TaskLosses(
                {task: 0.5 * jnp.square(z[task] - batch[task]["y"]) for task in batch}
            ),
        )
    given = {"draw_inner": draw_inner, "draw_held_out": draw_held_out, "folds": FOLDS, "updates": UPDATES}
    rounds = make_rounds(model, optax.sgd(RATE), init_params, measure_at=(1.0,), loop="scan", **given)
    info = rounds.round(rounds.init(jax.random.key(0), data), data)[1]
    for fold in range(FOLDS):
        batch, params = draw_inner(data, None, fold), solved(data, fold, np.ones(2))
        matrix, fisher = np.zeros((DIM, DIM)), np.zeros((DIM, DIM))
        gradients = {}
        for task, part in batch.items():
            x, residual = np.asarray(part["x"]), np.asarray(part["x"]) @ params - np.asarray(part["y"])
            matrix += x.T @ x / len(x)
            fisher += (x * residual[:, None]).T @ (x * residual[:, None]) / len(x)
            gradients[task] = x.T @ residual / len(x)
        part = jax.tree.map(np.asarray, draw_held_out(data, None, fold))["primary"]
        slope = part["x"].T @ (part["x"] @ params - part["y"]) / len(part["y"])
        solution = np.linalg.solve((matrix if gives_outputs else fisher) + 1e-2 * np.eye(DIM), slope)
        wanted = [-solution @ gradients[task] for task in TASKS]
        np.testing.assert_allclose(info.signal[0, fold], wanted, rtol=1e-6)


@pytest.mark.slow
def test_what_is_not_labelled_may_be_nan_and_changes_nothing():
    def unlabelled(params, batch, key):
        out = losses(params, batch, key)
        if "far" not in out.values:  # the held-out loss
            return out
        values = jnp.concatenate([out.values["far"][:5], jnp.full(15, jnp.nan)])
        return auxjax.TaskLosses(out.values | {"far": values}, masks={"far": jnp.arange(20) < 5})

    def only_labelled(params, batch, key):
        out = losses(params, batch, key)
        return auxjax.TaskLosses({task: value[:5] if task == "far" else value for task, value in out.values.items()})

    found, data = [], make_data()
    for function in (unlabelled, only_labelled):
        model = auxjax.TaskModel(function, primary="primary")
        given = {"draw_inner": draw_inner, "draw_held_out": draw_held_out, "folds": FOLDS, "updates": 4}
        rounds = make_rounds(model, optax.sgd(RATE), init_params, measure_at=(1.0,), loop="scan", **given)
        found.append(rounds.round(rounds.init(jax.random.key(0), data), data)[1])
    assert np.isfinite(found[0].signal).all()
    np.testing.assert_allclose(found[0].signal, found[1].signal, rtol=1e-9)


def test_learn_weights_finds_the_task_that_helps():
    learned = auxjax.learn_weights(
        MODEL,
        optax.sgd(RATE),
        init_params,
        make_data(),
        jax.random.key(4),
        draw_inner=draw_inner,
        draw_held_out=draw_held_out,
        folds=FOLDS,
        rounds=4,
        updates=30,
        loop="scan",
    )
    assert set(learned.weights) == set(TASKS)
    assert learned.weights["near"] > 1.3
    assert learned.weights["far"] < 0.7
    assert learned.history.shape == (5, 2)
    np.testing.assert_allclose(learned.history.sum(axis=1), 2.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "piece"),
    [
        ({"folds": 1}, ValueError, "folds=1"),
        ({"updates": 0}, ValueError, "updates=0"),
        ({"rate": 0.0}, ValueError, "rate=0.0"),
        ({"total": 0.0}, ValueError, "total=0.0"),
        ({"measure_at": (1.0, 0.5)}, ValueError, "expected shares of a round, ascending"),
        ({"loop": "fast"}, ValueError, "loop='fast'"),
        ({"draw_inner": None}, TypeError, "draw_inner="),
    ],
)
def test_mistakes_are_named(options, error, piece):
    given = {"draw_inner": draw_inner, "draw_held_out": draw_held_out} | options
    with pytest.raises(error, match=piece):
        make_rounds(MODEL, optax.sgd(RATE), lambda key: (jnp.zeros(DIM), None), **given)


@pytest.mark.parametrize(
    ("kept", "piece"),
    [((), "learn_weights weighs auxiliary tasks"), (("near",), r"expected at least two, got \['near'\]")],
)
def test_a_model_with_nothing_to_weigh_is_refused(kept, piece):
    def few(params, batch, key):
        values = losses(params, batch, key).values
        return auxjax.TaskLosses({task: values[task] for task in ("primary", *kept)})

    draws = {"draw_inner": draw_inner, "draw_held_out": draw_held_out}
    model = auxjax.TaskModel(few, primary="primary")
    rounds = make_rounds(model, optax.sgd(RATE), lambda key: (jnp.zeros(DIM), None), **draws)
    with pytest.raises(ValueError, match=piece):
        rounds.init(jax.random.key(0), make_data())


@pytest.mark.parametrize("outputs", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_task_that_a_measured_batch_lacks_gets_no_signal(outputs):
    def draw_measured(data, key, fold):
        batch = draw_inner(data, key, fold)
        return {part: rows for part, rows in batch.items() if part != "far"}

    def outputs_of(params, batch, key):
        return {task: part["x"] @ params for task, part in batch.items()}

    def output_losses(z, batch, key):
        return auxjax.TaskLosses({task: 0.5 * jnp.square(z[task] - part["y"]) for task, part in batch.items()})

    model = MODEL._replace(outputs=outputs_of, output_losses=output_losses) if outputs else MODEL
    draws = {"draw_inner": draw_inner, "draw_held_out": draw_held_out, "draw_measured": draw_measured}
    start = lambda key: (jnp.zeros(DIM), None)  # noqa: E731
    rounds = make_rounds(model, optax.sgd(RATE), start, **draws, folds=FOLDS, updates=4)
    data = make_data()
    _, info = rounds.round(rounds.init(jax.random.key(0), data), data)
    np.testing.assert_array_equal(info.signal[..., 0], 0.0)
    assert np.all(info.signal[..., 1] != 0)


def test_the_sum_of_the_weights_is_the_total():
    data = make_data()
    rounds = rounds_of(total=6.5)
    state = rounds.init(jax.random.key(3), data)
    np.testing.assert_allclose(rounds.weights(state), 6.5 / 2)
    state, info = rounds.round(state, data)
    np.testing.assert_allclose(jnp.sum(info.weights), 6.5)
    assert info.weights[0] != info.weights[1]
    plain = rounds_of()
    other = plain.round(plain.init(jax.random.key(3), data), data)[1]
    assert not np.allclose(info.signal, other.signal)  # the networks train with these weights


def test_without_a_simplex_the_weights_are_free_and_the_mean_of_the_signal_stays():
    data = make_data()
    rounds = rounds_of(simplex=False, rate=0.5)
    state, info = rounds.round(rounds.init(jax.random.key(3), data), data)
    mean = np.asarray(info.signal).mean(axis=(0, 1))
    logits = -0.5 * mean / np.sqrt(np.mean(mean**2))
    np.testing.assert_allclose(state.logits, logits, rtol=1e-12)
    np.testing.assert_allclose(rounds.weights(state), np.exp(logits), rtol=1e-12)


@pytest.mark.parametrize(
    "loop",
    [{"loop": "scan"}, pytest.param({"loop": "host", "together": False}, marks=pytest.mark.slow)],
)
def test_without_restarts_networks_train_on_where_they_were(loop):
    """Two rounds at a rate of next to 0 are one round of twice the length, measured half way and at the end."""
    data = make_data()
    short = rounds_of(restart=False, updates=50, measure_at=(1.0,), rate=1e-14, **loop)
    state = short.init(jax.random.key(3), data)
    state, first = short.round(state, data)
    assert state.networks.step.tolist() == [50] * FOLDS
    state, second = short.round(state, data)
    assert state.networks.step.tolist() == [100] * FOLDS
    long = rounds_of(updates=100, measure_at=(0.5, 1.0))
    whole = long.round(long.init(jax.random.key(3), data), data)[1]
    np.testing.assert_allclose([first.signal[0], second.signal[0]], whole.signal, rtol=1e-9)
    assert rounds_of().init(jax.random.key(3), data).networks is None
