"""The projection against its optimality conditions and a bisection, the shortcut, and the quadratic programme."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import auxjax
from auxjax.formulas.simplex import keep_on_simplex, project_simplex, shift_and_clamp, simplex_quadratic_program
from tests.helpers.training_problems import LinearTasks, linear_model, state_of


def bisect(weights, total):
    """The projection by bisection on its threshold, in float64."""
    low, high = np.min(weights) - total, np.max(weights)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(weights - middle, 0).sum() > total else (low, middle)
    return np.maximum(weights - (low + high) / 2, 0)


@pytest.mark.parametrize("size", [1, 2, 7, 312])
@pytest.mark.parametrize("total", [1e-3, 1.0, 312.0])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_projection_equals_bisection(size, total, spread):
    weights = spread * np.random.default_rng(size).normal(size=size)
    result = np.asarray(project_simplex(jnp.asarray(weights), total))
    np.testing.assert_allclose(result, bisect(weights, total), rtol=1e-10, atol=1e-12 * (total + spread))
    np.testing.assert_allclose(result.sum(), total, rtol=1e-14)
    assert result.min() >= 0


def test_projection_by_hand():
    np.testing.assert_allclose(project_simplex(jnp.array([2.5, -0.5]), 2.0), [2.0, 0.0], rtol=1e-15)
    np.testing.assert_allclose(project_simplex(jnp.array([1.0, 0.5]), 2), [1.25, 0.75], rtol=1e-15)
    np.testing.assert_allclose(project_simplex(jnp.full(4, 7.0), 2.0), np.full(4, 0.5), rtol=1e-15)
    np.testing.assert_array_equal(project_simplex(jnp.array([-jnp.inf, 3.0, 3.0]), 1.0), [0.0, 0.5, 0.5])


def test_points_of_the_simplex_stay():
    weights = jnp.array([0.0, 0.25, 1.75, 0.0])
    np.testing.assert_array_equal(project_simplex(weights, 2.0), weights)


@pytest.mark.parametrize("case", ["many", "ties", "offset", "huge entry", "negative"])
def test_projection_keeps_the_digits_of_float32(case):
    rng = np.random.default_rng(0)
    weights = {
        "many": rng.normal(size=100_000),
        "ties": np.repeat([1.0, 1.0, -2.0, 0.999], 250),
        "offset": 1e6 + rng.normal(size=100),
        "huge entry": np.r_[rng.normal(size=100), 1e30],
        "negative": -1e4 - rng.uniform(size=100),
    }[case].astype(np.float32)
    result = np.asarray(jax.jit(project_simplex)(jnp.asarray(weights), np.float32(1)), np.float64)
    assert result.min() >= 0
    np.testing.assert_allclose(result.sum(), 1.0, rtol=1e-6)
    # float32 distances to the largest entry are exact or nearly so; the projection must be as good as they are.
    expected = bisect(np.maximum(weights.astype(np.float64) - np.float64(weights.max()), -2.0), 1.0)
    np.testing.assert_allclose(result, expected, atol=3e-7)


def test_projection_of_a_pytree_is_that_of_all_its_entries():
    tree = {"a": jnp.array([0.3, -1.0]), "b": [jnp.array(2.0), jnp.array([[0.1]], jnp.float32)]}
    flat = jnp.array([0.3, -1.0, 2.0, np.float64(np.float32(0.1))])
    result, expected = project_simplex(tree, 1.5), project_simplex(flat, 1.5)
    np.testing.assert_allclose(result["a"], expected[:2], rtol=1e-15)
    np.testing.assert_allclose(result["b"][0], expected[2], rtol=1e-15)
    assert result["b"][1].dtype == jnp.float32
    assert result["b"][1].shape == (1, 1)


def test_half_precision_is_projected_in_float32():
    result = project_simplex(jnp.linspace(-1, 1, 300, dtype=jnp.bfloat16), 1.0)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(result, np.float64).sum(), 1.0, rtol=4e-3)


def test_projection_derivatives():
    weights, total = jnp.array([0.9, 0.7, -3.0, 0.2, 0.85]), jnp.asarray(1.2)
    rng = np.random.default_rng(1)
    jacobian = jax.jacrev(project_simplex)(weights, total)
    support = np.asarray(project_simplex(weights, total) > 0, float)
    np.testing.assert_allclose(jacobian, np.diag(support) - np.outer(support, support) / support.sum(), atol=1e-15)
    np.testing.assert_allclose(jax.jacfwd(project_simplex)(weights, total), jacobian, atol=1e-15)
    np.testing.assert_allclose(jax.jacrev(project_simplex, 1)(weights, total), support / support.sum(), rtol=1e-15)
    step = 1e-6 * rng.normal(size=5)
    change = project_simplex(weights + step, total) - project_simplex(weights - step, total)
    np.testing.assert_allclose(change / 2, jacobian @ step, atol=1e-15)


def test_projection_under_jit_and_vmap():
    batch = jax.random.normal(jax.random.key(0), (5, 6))
    totals = jnp.arange(1.0, 6.0)
    mapped = jax.jit(jax.vmap(project_simplex))(batch, totals)
    np.testing.assert_allclose(
        mapped, jnp.stack([project_simplex(w, t) for w, t in zip(batch, totals, strict=True)]), rtol=1e-14, atol=1e-15
    )


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_projection_of_nan_and_inf_is_nan(bad):
    assert np.all(np.isnan(project_simplex(jnp.array([1.0, bad]), 1.0)))


def test_shift_and_clamp_by_hand():
    np.testing.assert_array_equal(shift_and_clamp(jnp.array([2.5, -0.5]), 2.0), [2.5, 0.0])
    np.testing.assert_allclose(shift_and_clamp(jnp.array([0.0, 0.5]), 2.0), [0.75, 1.25], rtol=1e-15)
    np.testing.assert_allclose(shift_and_clamp({"a": jnp.array([4.0]), "b": jnp.array(-2.0)}, 3.0)["a"], [4.5])


def test_shift_and_clamp_is_the_projection_while_nothing_is_clamped():
    weights = jnp.array([1.0, 1.2, 0.7])
    np.testing.assert_allclose(shift_and_clamp(weights, 3.0), project_simplex(weights, 3.0), rtol=1e-14)


def make_program(kind, size, seed):
    """Gradients `[d, K]` and a primary gradient, as ARML has them."""
    rng = np.random.default_rng([seed, size])
    tasks = rng.normal(size=(max(1, size // 2) if kind == "rank deficient" else 3 * size, size))
    if kind == "zero gradients":
        tasks[:, ::2] = 0
    if kind == "twins":
        tasks[:, -1] = tasks[:, 0]
    if kind == "ill-conditioned":
        tasks *= np.logspace(0, -5, size)
    if kind == "large":
        tasks *= 1e5
    primary = rng.normal(size=tasks.shape[0]) * (1e5 if kind == "large" else 1)
    return tasks.T @ tasks, tasks.T @ primary


@pytest.mark.parametrize("kind", ["plain", "rank deficient", "zero gradients", "twins", "ill-conditioned", "large"])
@pytest.mark.parametrize("size", [1, 2, 5, 39])
@pytest.mark.parametrize("total", [0.01, 1.0, 39.0])
def test_programme_meets_the_optimality_conditions(kind, size, total):
    gram, linear = make_program(kind, size, 0)
    weights = np.asarray(jax.jit(simplex_quadratic_program)(jnp.asarray(gram), jnp.asarray(linear), total))
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(), total, rtol=1e-13)
    gradient = 2 * (gram @ weights - linear)
    scale = max(np.abs(gram).max() * total, np.abs(linear).max()) or 1.0
    level = gradient @ weights / total
    assert np.all(gradient >= level - 1e-8 * scale)
    np.testing.assert_allclose(weights * (gradient - level) / (total * scale), 0, atol=1e-8)


@pytest.mark.parametrize("size", [2, 5, 12])
def test_programme_equals_scipy(size):
    gram, linear = make_program("plain", size, 1)
    total = float(size)
    ours = np.asarray(simplex_quadratic_program(jnp.asarray(gram), jnp.asarray(linear), total))
    theirs = scipy.optimize.minimize(
        lambda w: w @ gram @ w - 2 * linear @ w,
        np.ones(size),
        jac=lambda w: 2 * (gram @ w - linear),
        bounds=[(0, None)] * size,
        constraints={"type": "eq", "fun": lambda w: w.sum() - total, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    ).x
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    value = lambda w: w @ gram @ w - 2 * linear @ w  # noqa: E731
    assert value(ours) <= value(theirs) + 1e-12 * abs(value(theirs))


def test_programme_equals_long_projected_gradient_descent():
    gram, linear = map(jnp.asarray, make_program("plain", 5, 2))
    step = 1 / jnp.linalg.eigvalsh(gram)[-1]
    descend = lambda _, w: project_simplex(w - step * (gram @ w - linear), 5.0)  # noqa: E731
    slow = jax.lax.fori_loop(0, 3000, descend, jnp.ones(5))
    np.testing.assert_allclose(simplex_quadratic_program(gram, linear, 5.0), slow, atol=1e-10)


def test_programme_by_hand():
    """One orthonormal task each: the projection of the inner products with the primary gradient."""
    linear = jnp.array([0.9, -0.4, 0.3])
    np.testing.assert_allclose(
        simplex_quadratic_program(jnp.eye(3), linear, 1.0), project_simplex(linear, 1.0), atol=1e-14
    )
    np.testing.assert_allclose(simplex_quadratic_program(jnp.zeros((3, 3)), linear, 2.0), [2.0, 0, 0], atol=1e-12)


def test_programme_without_information_keeps_equal_weights():
    np.testing.assert_allclose(simplex_quadratic_program(jnp.zeros((4, 4)), jnp.zeros(4), 4.0), np.ones(4), rtol=1e-12)
    gram, linear = jnp.ones((2, 2)), jnp.ones(2)  # two tasks with one and the same gradient
    np.testing.assert_allclose(simplex_quadratic_program(gram, linear, 1.0), [0.5, 0.5], rtol=1e-8)


def test_programme_derivatives_equal_finite_differences():
    gram, linear = make_program("plain", 6, 3)
    gram, linear, total = jnp.asarray(gram), jnp.asarray(linear), jnp.asarray(1.5)
    weights = jax.jit(simplex_quadratic_program)(gram, linear, total)
    assert 1 < np.sum(weights > 0) < 6
    rng = np.random.default_rng(0)
    half = rng.normal(size=(6, 6))
    steps = (jnp.asarray(half + half.T), jnp.asarray(rng.normal(size=6)), jnp.asarray(0.3))
    point = (gram, linear, total)

    @jax.jit
    def along(t):
        return simplex_quadratic_program(*(start + t * step for start, step in zip(point, steps, strict=True)))

    difference = (along(1e-5) - along(-1e-5)) / 2e-5
    forward = jax.jit(lambda: jax.jvp(simplex_quadratic_program, point, steps)[1])()
    np.testing.assert_allclose(forward, difference, atol=1e-7)
    cotangent = jnp.asarray(rng.normal(size=6))
    value = lambda *arguments: cotangent @ simplex_quadratic_program(*arguments)  # noqa: E731
    grads = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(*point)
    product = sum(jnp.sum(g * s) for g, s in zip(grads, steps, strict=True))
    np.testing.assert_allclose(product, cotangent @ forward, rtol=1e-9)


def test_programme_under_vmap():
    programs = [make_program(kind, 5, 4) for kind in ("plain", "twins", "ill-conditioned")]
    grams, linears = (jnp.stack([jnp.asarray(part) for part in parts]) for parts in zip(*programs, strict=True))
    mapped = jax.jit(jax.vmap(lambda g, b: simplex_quadratic_program(g, b, 5.0)))(grams, linears)
    loop = [simplex_quadratic_program(g, b, 5.0) for g, b in zip(grams, linears, strict=True)]
    np.testing.assert_allclose(mapped, jnp.stack(loop), atol=1e-8)


@pytest.mark.parametrize("size", [2, 39])
def test_programme_in_plain_float32(single_precision, size):
    gram, linear = make_program("plain", size, 5)
    weights = np.asarray(jax.jit(simplex_quadratic_program)(np.float32(gram), np.float32(linear), 1.0))
    assert weights.dtype == np.float32
    gradient = 2 * (gram @ weights - linear)
    scale = max(np.abs(gram).max(), np.abs(linear).max())
    assert np.all(gradient >= gradient @ weights - 3e-6 * scale)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)


def test_programme_with_nan_is_nan():
    assert np.all(np.isnan(simplex_quadratic_program(jnp.eye(2), jnp.array([jnp.nan, 0.0]), 1.0)))


@pytest.mark.parametrize(
    ("error", "piece", "call"),
    [
        (ValueError, "total", lambda: project_simplex(jnp.ones(2), 0.0)),
        (ValueError, "total", lambda: shift_and_clamp(jnp.ones(2), -1)),
        (ValueError, "total", lambda: simplex_quadratic_program(jnp.eye(2), jnp.ones(2), 0)),
        (ValueError, "total", lambda: project_simplex(jnp.ones(2), jnp.ones(2))),
        (ValueError, "no entries", lambda: project_simplex(jnp.ones(0), 1.0)),
        (TypeError, "int", lambda: project_simplex(jnp.ones(2, int), 1.0)),
        (ValueError, r"\(2, 3\)", lambda: simplex_quadratic_program(jnp.ones((2, 3)), jnp.ones(2), 1.0)),
        (TypeError, "int", lambda: simplex_quadratic_program(jnp.eye(2, dtype=int), jnp.ones(2), 1.0)),
        (ValueError, "max_steps", lambda: simplex_quadratic_program(jnp.eye(2), jnp.ones(2), 1.0, max_steps=0)),
    ],
)
def test_mistakes_are_named(error, piece, call):
    with pytest.raises(error, match=piece):
        call()


def test_an_optimiser_of_weights_keeps_them_on_the_simplex():
    """All but the one that is held; those that are projected to 0 are 0 exactly."""
    weights = {"primary": jnp.array(1.0), "a": jnp.array(1.0), "b": jnp.array(1.0), "c": jnp.array(1.0)}
    gradients = {"primary": jnp.array(5.0), "a": jnp.array(-1.0), "b": jnp.array(0.2), "c": jnp.array(3.0)}
    optimizer = optax.chain(optax.sgd(0.5), keep_on_simplex(3.0, held=lambda path: path == "primary"))
    updates, _ = optimizer.update(gradients, optimizer.init(weights), weights)
    found = optax.apply_updates(weights, updates)
    wanted = project_simplex(jnp.array([1.5, 0.9, -0.5]), 3.0)
    assert [float(found[name]) for name in ("primary", "a", "b", "c")] == pytest.approx([1.0, *map(float, wanted)])
    assert wanted[2] == 0.0
    assert found["c"] == 0.0


@pytest.mark.parametrize("name", ["auxilearn", "auto_lambda"])
def test_methods_with_weights_take_it(name):
    problem = LinearTasks.make(3, num_tasks=4)
    optimizer = optax.chain(optax.sgd(10.0), keep_on_simplex(3.0, held=lambda path: path == "primary"))
    method = auxjax.methods.get(name, outer_optimizer=optimizer)
    context, state = state_of(linear_model(), problem, method=method)
    before = state.method.meta["primary"]
    state, _ = method.outer(context, state, problem.batch, problem.batch, jax.random.key(0))
    weights = dict(state.method.meta)
    assert weights.pop("primary") == before
    assert sum(weights.values()) == pytest.approx(3.0, rel=1e-12)
    assert min(weights.values()) == 0.0


def test_mistakes_of_keeping_weights_on_the_simplex_are_named():
    with pytest.raises(ValueError, match="total"):
        keep_on_simplex(0.0)
    with pytest.raises(TypeError, match=r"keep_on_simplex\(held=\): expected a function of a leaf's path"):
        keep_on_simplex(1.0, held="primary")
    with pytest.raises(ValueError, match="expected the weights beside their updates"):
        keep_on_simplex(1.0).update(jnp.ones(2), optax.EmptyState())
    with pytest.raises(ValueError, match=r"expected some weights that are not held, got all of \['a'\]"):
        keep_on_simplex(1.0, held=lambda path: True).update({"a": jnp.ones(2)}, optax.EmptyState(), {"a": jnp.ones(2)})
