"""The closed forms on Gaussian tasks against integrals on a grid and exact quadrature; a small run of the benchmark."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax.formulas.simplex import simplex_quadratic_program
from benchmarks.studies.arml_theory import __main__ as arml_theory
from benchmarks.studies.arml_theory import gaussian, runs

pytestmark = pytest.mark.slow

FIXED_POINT = jax.jit(gaussian.fisher_fixed_point, static_argnums=(2, 3))
WEIGHTS = jnp.array([0.3, 1.9, 0.8])
TINY = ["--seeds", "0,1", "--dims", "2", "--primary", "4,64", "--settings", "alike", "--steps", "40"]


def regressions(seed, *, dim=2, tasks=4, examples=7):
    """Inputs `[K + 1][n, d]`, targets and their sums."""
    rng = np.random.default_rng(seed)
    x = [rng.normal(size=(examples + k, dim)) for k in range(tasks)]
    y = [rng.normal(size=examples + k) for k in range(tasks)]
    return x, y, jax.tree.map(jnp.asarray, gaussian.moments(x, y, [len(rows) for rows in y]))


def isotropic(points, primary, *, precision, primary_precision):
    """Tasks with precisions that are multiples of the identity, at given means; no mini-batches."""
    means = np.concatenate([primary[None], points])
    scale = np.array([primary_precision] + [precision] * len(points))
    matrices = scale[:, None, None] * np.eye(means.shape[1])
    zero = gaussian.GaussianTasks(matrices, scale[:, None] * means, matrices, means, scale)
    return jax.tree.map(jnp.asarray, zero)


def log_density(tasks, theta, task):
    """Unnormalised, `[points]`."""
    return -np.einsum("pi,ij,pj->p", theta, tasks.precision[task], theta) / 2 + theta @ np.asarray(tasks.linear[task])


def samples(tasks, weights, heat=1.0):
    """Points and probabilities of a quadrature that is exact for polynomials up to degree 7 under p_J."""
    joint = gaussian.distribution(tasks, weights, primary=1.0)
    nodes, mass = np.polynomial.hermite_e.hermegauss(4)
    grid = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    points = np.asarray(joint.mean) + np.sqrt(heat) * grid @ np.linalg.cholesky(joint.covariance).T
    return points, np.outer(mass, mass).ravel() / mass.sum() ** 2


def grid_of(tasks, weights):
    """A fine grid in the plane, its cell, and log p_w on it, normalised by summation."""
    prior = gaussian.distribution(tasks, weights, primary=0.0)
    widest = 12 * np.sqrt(np.linalg.eigvalsh(prior.covariance)[-1])
    axis = np.linspace(-widest, widest, 801)
    theta = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2) + np.asarray(prior.mean)
    cell = (axis[1] - axis[0]) ** 2
    log_prior = sum(w * log_density(tasks, theta, k + 1) for k, w in enumerate(np.asarray(weights)))
    return theta, cell, log_prior - np.log(np.sum(np.exp(log_prior)) * cell)


def test_divergence_of_the_true_prior_is_the_integral():
    _, _, tasks = regressions(0)
    mean, covariance = np.array([0.2, -0.1]), np.array([[0.05, 0.01], [0.01, 0.03]])
    theta, cell, log_prior = grid_of(tasks, WEIGHTS)
    shifted = theta - mean
    log_true = -np.einsum("pi,ij,pj->p", shifted, np.linalg.inv(covariance), shifted) / 2
    log_true -= np.log(2 * np.pi) + np.linalg.slogdet(covariance)[1] / 2
    integral = np.sum(np.exp(log_true) * (log_true - log_prior)) * cell
    found = gaussian.true_prior_divergence(tasks, WEIGHTS, jnp.array(mean), jnp.array(covariance))
    np.testing.assert_allclose(found, integral, rtol=1e-9)


@pytest.mark.parametrize("held", [False, True])
def test_first_surrogate_is_the_integral(held):
    _, _, tasks = regressions(1)
    sampled = jnp.array([1.2, 0.1, 1.7]) if held else WEIGHTS
    theta, cell, log_prior = grid_of(tasks, WEIGHTS)
    primary = log_density(tasks, theta, 0)
    joint = primary + sum(w * log_density(tasks, theta, k + 1) for k, w in enumerate(np.asarray(sampled)))
    joint = np.exp(joint - joint.max())
    integral = np.sum(joint * (primary - log_prior)) / np.sum(joint)
    assert cell > 0
    found = gaussian.surrogate_divergence(tasks, WEIGHTS, sampled if held else None)
    np.testing.assert_allclose(found, integral, rtol=1e-9)


@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_gram_objective_and_partial_gradient_are_expectations(heat):
    _, _, tasks = regressions(2)
    points, mass = samples(tasks, WEIGHTS, heat)
    scores = np.einsum("kij,pj->pki", tasks.precision, points) - np.asarray(tasks.linear)
    gram = np.einsum("p,pki,pli->kl", mass, scores, scores)
    np.testing.assert_allclose(gaussian.expected_gram(tasks, WEIGHTS, heat), gram, rtol=1e-10)
    gap = scores[:, 0] - np.einsum("k,pki->pi", np.asarray(WEIGHTS), scores[:, 1:])
    np.testing.assert_allclose(gaussian.fisher_objective(tasks, WEIGHTS, heat), mass @ np.sum(gap**2, 1), rtol=1e-10)
    partial = -np.einsum("p,pki,pi->k", mass, scores[:, 1:], gap)
    np.testing.assert_allclose(gaussian.partial_gradient(tasks, WEIGHTS, heat), partial, rtol=1e-9)


def test_batch_noise_is_the_variance_over_all_examples():
    x, y, tasks = regressions(3)
    points, mass = samples(tasks, WEIGHTS)
    found = np.asarray(gaussian.batch_noise(tasks, WEIGHTS))
    for task, (rows, targets) in enumerate(zip(x, y, strict=True)):
        errors = points @ rows.T - targets
        single = len(targets) * errors[:, :, None] * rows[None]  # what one example says of the gradient of the sum
        variance = np.sum(np.var(single, axis=1), axis=1)
        np.testing.assert_allclose(found[task], mass @ variance, rtol=1e-10)
    grown = gaussian.partial_gradient(tasks, WEIGHTS, batch=4) - gaussian.partial_gradient(tasks, WEIGHTS)
    np.testing.assert_allclose(grown, found[1:] * WEIGHTS / 4, rtol=1e-9)


@pytest.mark.slow
def test_with_equal_precisions_the_surrogate_prior_is_centred_on_the_primary_estimate():
    """All fixed points put the mean of p_w on the primary optimum, and the ideal weights put it on mu*."""
    rng = np.random.default_rng(4)
    points = rng.normal(size=(5, 4))
    inside, other = rng.dirichlet(np.full(5, 8.0), size=2) @ points
    tasks = isotropic(points, inside, precision=3.0, primary_precision=2.0)
    equal = jnp.ones(5)
    for solve in (gaussian.surrogate_fixed_point, gaussian.fisher_fixed_point):
        np.testing.assert_allclose(solve(tasks, equal)[0] @ points / 5, inside, atol=1e-8)
    mode = gaussian.fisher_fixed_point(tasks, equal, 0.0)[0]
    np.testing.assert_allclose(mode @ points / 5, inside, atol=1e-8)
    moving, gap, _ = gaussian.minimise_on_simplex(lambda w: gaussian.fisher_objective(tasks, w), equal)
    assert gap < 1e-10
    np.testing.assert_allclose(moving @ points / 5, inside, atol=1e-5)
    true = (jnp.array(other), 0.1 * jnp.eye(4))
    ideal, gap, _ = gaussian.minimise_on_simplex(lambda w: gaussian.true_prior_divergence(tasks, w, *true), equal)
    assert gap < 1e-10
    np.testing.assert_allclose(ideal @ points / 5, other, atol=1e-5)


@pytest.mark.parametrize(("primary_precision", "sign"), [(3.0, -1), (60.0, 1)])
def test_first_surrogate_with_moving_samples_flees_a_primary_task_weaker_than_the_prior(primary_precision, sign):
    """With equal precisions it is |m_w - m_0|^2 a b (a - b) / 2 (a + b)^2, for a of p_0 and b of p_w."""
    rng = np.random.default_rng(5)
    points = rng.normal(size=(5, 4))
    tasks = isotropic(points, points[0], precision=3.0, primary_precision=primary_precision)
    a, b = primary_precision, 15.0
    weights = jnp.array(5 * rng.dirichlet(np.ones(5), size=2))
    values = [gaussian.surrogate_divergence(tasks, w) for w in weights]
    squares = np.sum((np.asarray(weights) @ points / 5 - points[0]) ** 2, axis=1)
    wanted = (squares[1] - squares[0]) * a * b * (a - b) / (2 * (a + b) ** 2)
    np.testing.assert_allclose(values[1] - values[0], wanted, rtol=1e-9)
    assert np.sign(values[1] - values[0]) == sign * np.sign(squares[1] - squares[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("heat", "batch"), [(1.0, None), (0.0, None), (1.0, 3)])
def test_fixed_points_are_their_own_best_response(seed, heat, batch):
    _, _, tasks = regressions(seed, dim=3, tasks=6)
    found, residual, steps = FIXED_POINT(tasks, jnp.ones(5), heat, batch)
    assert residual < 1e-11
    assert steps < 300
    gram = np.array(gaussian.expected_gram(tasks, found, heat))
    if batch:
        gram += np.diag(np.asarray(gaussian.batch_noise(tasks, found, heat)) / batch)
    exact = simplex_quadratic_program(jnp.array(gram[1:, 1:]), jnp.array(gram[1:, 0]), 5.0)
    np.testing.assert_allclose(found, exact, atol=1e-7)
    np.testing.assert_allclose(gaussian.best_response(tasks, found, heat, batch), exact, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_ideal_weights_are_certified_and_beat_all_others(seed):
    _, _, tasks = regressions(seed, dim=3, tasks=6)
    true = (jnp.zeros(3), jnp.eye(3) / 20)
    value = jax.jit(lambda w: gaussian.true_prior_divergence(tasks, w, *true))
    found, gap, _ = gaussian.minimise_on_simplex(value, jnp.ones(5))
    assert 0 <= gap + 1e-13 < 1e-10
    assert found.min() >= 0
    np.testing.assert_allclose(found.sum(), 5, rtol=1e-12)
    others = 5 * np.random.default_rng(seed).dirichlet(np.ones(5), size=300)
    near = 0.99 * np.asarray(found) + 0.01 * others
    assert all(value(jnp.array(other)) > value(found) for other in np.concatenate([others, near]))


@pytest.mark.parametrize("setting", arml_theory.SETTINGS)
@pytest.mark.parametrize("primary", [3, 9])
def test_full_and_mini_batches_have_the_gradients_of_the_sums(setting, primary):
    replica = runs.make_replica(0, 5, primary, setting, 12)
    theta = np.linspace(-1, 1, 5)
    wanted = replica.tasks.precision @ theta - replica.tasks.linear

    def gradients(batch):
        def means(params):
            values = runs.losses(params, runs.as_floats(batch), None).values
            return jnp.stack([jnp.mean(values[name]) for name in ("primary", *(f"aux_{k}" for k in range(5)))])

        return jax.jacrev(means)(jnp.asarray(theta, jnp.float32))

    full = runs.full_batch(replica, 1.0)
    np.testing.assert_allclose(gradients(full), wanted, rtol=2e-4, atol=2e-4)
    data = jax.tree.map(jnp.asarray, runs.in_units(replica.data, 1.0))
    drawn = runs.draw_batch(data, jax.random.key(0), batch=50)
    chosen = np.unique(np.asarray(drawn["primary"][0]), axis=0)
    assert len(chosen) == primary  # padding is never drawn
    keys = jax.random.split(jax.random.key(1), 4000)
    many = jax.jit(jax.vmap(lambda key: gradients(runs.draw_batch(data, key, batch=8))))(keys)
    spread = np.asarray(many.std(0)) / np.sqrt(4000)
    assert np.all(np.abs(np.asarray(many.mean(0)) - wanted) < 5 * spread + 1e-4)


def test_equal_weights_make_a_surrogate_prior_as_narrow_as_the_true_one():
    replica = runs.make_replica(1, 8, 4, "alike", 4)
    precision = replica.tasks.precision[1:].sum(0)
    np.testing.assert_allclose(np.trace(precision) / 8, 8 / runs.RHO**2, rtol=0.1)
    mean = runs.make_replica(1, 8, 4, "mean", 4)
    undone = arml_theory.as_prior(jax.tree.map(jnp.asarray, mean.tasks), mean.factor)
    np.testing.assert_allclose(undone.precision, replica.tasks.precision, rtol=1e-12)


@pytest.mark.slow
def test_small_run_is_written_and_drawn(tmp_path, capsys, ordinary_promotion):
    result = arml_theory.main([*TINY, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "arml_theory.json").read_text()) == json.loads(json.dumps(result))
    assert {path.name for path in tmp_path.glob("*.png")} == {"theory_alike.png", "arml_alike.png", "noise.png"}
    assert len(result["rows"]) == 4
    for row in result["rows"]:
        assert abs(row["gaps"]["ideal"]) < 1e-10
        assert row["distance"]["ideal"] == 0
        assert all(value > -1e-9 for value in row["excess"].values())
        for weights in row["weights"].values():
            np.testing.assert_allclose(sum(weights), 5, rtol=1e-5)
            assert min(weights) >= 0
    assert [record["primary"] for record in result["summary"]] == [4, 64]
    assert "excess" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--seeds", "a"], ["--dims", "0"], ["--settings", "odd"], ["--batch", "0"], ["--rate", "2"]]
)
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        arml_theory.parse(arguments)
    assert "error" in capsys.readouterr().err
