"""JTDS as its authors' code has it: a bias, the sample deviation, weight decay and the whole series."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import auxjax
from auxjax.methods._jtds import TaskSchedule, standardised_by_sample
from tests.helpers.training_problems import LinearTasks, linear_model, state_of

KEY = jax.random.key(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def random_schedule(seed):
    """A schedule with every factor in play."""
    rng = np.random.default_rng(seed)
    draws = {
        task: (rng.normal(), 0.5 * rng.normal(size=3), *rng.normal(size=3)) for task in ("primary", "aux0", "aux1")
    }
    return {task: TaskSchedule(*map(jnp.array, part)) for task, part in draws.items()}


def test_the_public_code_adds_a_bias_and_divides_by_the_sample_deviation():
    problem = LinearTasks.make(0, num_tasks=3, masked=True)
    options = {"activation": "softplus", "feature_bias": True, "standardise": "sample"}
    method = auxjax.methods.get("jtds", **options)
    assert method.whole_batch
    context, state = state_of(linear_model(masked=True), problem, method=method)
    assert state.method.meta["aux0"].bias == 0
    schedule = random_schedule(1)
    state = state._replace(method=state.method._replace(meta=schedule))
    weights = method.weights(context, state, problem.batch, KEY)
    for task, part in schedule.items():
        x, y = np.asarray(problem.batch["x"][task]), np.asarray(problem.batch["y"][task])
        mask = np.asarray(problem.batch["mask"][task])
        losses = (0.5 * (x @ np.asarray(state.params["w"]) - y) ** 2)[mask]
        losses = (losses - losses.mean()) / (losses.std(ddof=1) + 1e-6)
        wanted = softplus(float(part.importance)) * softplus(x[mask] @ np.asarray(part.prototype) + float(part.bias))
        wanted = wanted * sigmoid(float(part.slope) * losses + float(part.offset))
        np.testing.assert_allclose(weights[task][mask], wanted, rtol=1e-12)


def public_code(batch, dev, w, schedule, updates):
    """JTDS as its authors have it, in NumPy: `(w, schedule)` after as many inner and outer updates in turn.

    The series has all its terms at a step of 1e-4 and no leading factor; SGD with momentum 0.9 and weight decay 5e-5.
    """

    def tables(w):
        for task, part in schedule.items():
            x, residual = batch["x"][task], batch["x"][task] @ w - batch["y"][task]
            losses = 0.5 * residual**2
            z = (losses - losses.mean()) / (losses.std(ddof=1) + 1e-6)
            a, f, b = part[0], x @ part[1] + part[4], part[2] * z + part[3]
            yield task, x, residual, z, (softplus(a), softplus(f), sigmoid(b)), (sigmoid(a), sigmoid(f))

    momentum = {task: [np.zeros_like(leaf) for leaf in part] for task, part in schedule.items()}
    for _ in range(updates):
        w = w - 0.1 * sum(x.T @ (s[0] * s[1] * s[2] * r) / len(r) for _, x, r, _, s, _ in tables(w))
        found = list(tables(w))
        hessian = sum(x.T @ ((s[0] * s[1] * s[2])[:, None] * x) / len(r) for _, x, r, _, s, _ in found)
        x, y = dev["x"]["primary"], dev["y"]["primary"]
        total = term = x.T @ (x @ w - y) / len(y)
        for _ in range(3):
            term = term - 1e-4 * hessian @ term
            total = total + term
        for task, x, r, z, (a, f, b), (da, df) in found:
            along = -(x @ total) * r / len(r)  # -total . grad l_i, over n
            filtered = a * f * b * (1 - b) * along
            slopes = [np.sum(da * f * b * along), x.T @ (a * df * b * along), filtered @ z, filtered.sum()]
            slopes.append(np.sum(a * df * b * along))
            for place, slope in enumerate(slopes):
                slope = slope + 5e-5 * schedule[task][place]
                momentum[task][place] = 0.9 * momentum[task][place] + slope
                schedule[task][place] = schedule[task][place] - 1e-2 * momentum[task][place]
    return w, schedule


def test_five_updates_are_those_of_the_public_code():
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    method = auxjax.methods.get(
        "jtds",
        activation="softplus",
        feature_bias=True,
        standardise="sample",
        hypergradient=auxjax.implicit(auxjax.neumann(3, 1e-4, keep="all")),
        outer_optimizer=optax.chain(
            optax.scale(1e4),
            optax.clip_by_global_norm(1e3),
            optax.add_decayed_weights(5e-5),
            optax.sgd(1e-2, momentum=0.9),
        ),
    )
    init, step = auxjax.make_step(linear_model(), method, optax.sgd(0.1), donate=False)
    state = init(KEY, problem.params, problem.batch)
    schedule = {task: [np.asarray(leaf) for leaf in part] for task, part in state.method.meta.items()}
    batches = [jax.tree.map(np.asarray, part.batch) for part in (problem, dev)]
    w, schedule = public_code(*batches, np.asarray(problem.params["w"]), schedule, 5)
    for _ in range(5):
        state, _ = step(state, problem.batch, dev.batch)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-11)
    for task, part in state.method.meta.items():
        for found, wanted in zip(part, schedule[task], strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_standardised_by_the_sample_deviation():
    losses, mask = jnp.array([1.0, 2.0, jnp.nan, 6.0]), jnp.array([True, True, False, True])
    found = standardised_by_sample(losses, mask)
    np.testing.assert_allclose(found[jnp.array([0, 1, 3])], np.array([-2, -1, 3]) / (np.sqrt(7) + 1e-6), rtol=1e-12)
    assert found[2] == 0
    for flat in (jnp.array([3.0]), jnp.full(4, 2.0)):
        assert np.all(standardised_by_sample(flat, None) == 0)
        assert np.all(np.isfinite(jax.jacrev(lambda x: standardised_by_sample(x, None))(flat)))
