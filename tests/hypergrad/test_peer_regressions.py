"""One test for each wrong answer that other hypergradient libraries have been found to give.

Every test has the right answer by an independent route, and the defective formula written out in NumPy: that the
latter is off by the order stated shows that the case would catch it. Most cases are quadratics whose hypergradient is
the linear solve's solution itself, with the spectrum that was measured on a small network: 6e-4 to 0.218.
"""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from auxjax import BilevelProblem, cg, dense, implicit, neumann
from auxjax.hypergrad import one_step
from tests.helpers.bilevel_problems import flat_array, ridge
from tests.helpers.look_ahead import Point, central_differences, outer_after_training, run
from tests.helpers.quadratics import flat, solve, with_spectrum

SPECTRUM = np.geomspace(6e-4, 0.218, 20)


def network_like(scale=1.0):
    """`(matrix, v, u)` with `matrix u = v`."""
    matrix = scale * with_spectrum(SPECTRUM)
    u = np.random.default_rng(0).normal(size=len(matrix))
    return matrix, matrix @ u, u


def error(came, wanted) -> float:
    return np.linalg.norm(np.asarray(came) - wanted) / np.linalg.norm(wanted)


def numpy_cg(matrix, b, steps, *, tolerance=0.0, step_scale=1.0, old_residual=False, drop_last=False, threshold=0.0):
    """Conjugate gradients, right by default, with one option for each defect; NaN where it declares a breakdown."""
    x = np.zeros_like(b)
    r = p = b
    eps = np.finfo(b.dtype).eps
    for _ in range(steps):
        product = matrix @ p
        if p @ product <= threshold * eps * len(b) * (r @ r):
            return np.full_like(b, np.nan)
        alpha = (r @ r) / (step_scale * (p @ product))
        after = r - alpha * product
        if drop_last and np.linalg.norm(after) <= tolerance * np.linalg.norm(b):
            return x
        x, beta = x + alpha * p, (after @ after) / (r @ r)
        p = (r if old_residual else after) + beta * p
        r = after
        if np.linalg.norm(r) <= tolerance * np.linalg.norm(b):
            return x
    return x


def test_regression_1_cg_updates_its_direction_with_the_new_residual():
    """With the old one: 135 % off on a small network."""
    matrix, v, u = network_like()
    grad, info = solve(cg(max_steps=60, rtol=1e-12), matrix, v)
    np.testing.assert_allclose(grad, u, rtol=1e-8)
    assert info.converged
    assert error(numpy_cg(matrix, v, 60), u) < 1e-8
    assert 1 < error(numpy_cg(matrix, v, 20, old_residual=True), u) < 2
    assert error(numpy_cg(matrix, v, 60, old_residual=True), u) > 1


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_regression_2_cg_puts_the_scale_of_the_curvature_into_both_terms(scale):
    """In the step's length but not in the residual's update: right at scale 1, a hundred times off at 0.5."""
    matrix, v, u = network_like(scale)
    grad, info = solve(cg(max_steps=60, rtol=1e-12), matrix, v)
    np.testing.assert_allclose(grad, u, rtol=1e-8)
    assert info.converged
    wrong = scale * numpy_cg(matrix / scale, v / scale, 20, step_scale=scale)
    if scale == 1:
        assert error(wrong, u) < 1e-2
    elif scale == 0.5:
        assert error(wrong, u) > 50


def test_regression_2_cg_puts_its_damping_into_both_terms():
    matrix, v, _ = network_like()
    for damping in (0.05, 0.5):
        damped = matrix + damping * np.eye(20)
        _, info = solve(cg(max_steps=60, rtol=1e-12, damping=damping), matrix, v)
        came = flat(info.solution)
        np.testing.assert_allclose(came, np.linalg.solve(damped, v), rtol=1e-9)
        np.testing.assert_allclose(info.relative_residual, error(matrix @ came, v), rtol=1e-9)
        assert info.converged
        # The direction's curvature is damped, the residual's update is not.
        x, r = np.zeros(20), v
        p = r
        for _ in range(20):
            alpha = (r @ r) / (p @ damped @ p)
            x, after = x + alpha * p, r - alpha * matrix @ p
            p, r = after + (after @ after) / (r @ r) * p, after
        assert error(x, np.linalg.solve(damped, v)) > 0.1


def test_regression_3_dense_inverts_the_blocks_between_tensors_as_well():
    """With each tensor's own block only: 43 % off."""
    matrix, v, u = network_like()
    for first in (4, 12):
        grad, info = solve(dense(), matrix, v, first=first)
        np.testing.assert_allclose(grad, u, rtol=1e-9)
        assert info.relative_residual < 1e-11
        blocks = matrix.copy()
        blocks[:first, first:] = blocks[first:, :first] = 0
        assert error(np.linalg.solve(blocks, v), u) > 0.4


@pytest.mark.slow
@pytest.mark.parametrize(
    "curvature", [1e-18, pytest.param(1e-8, marks=pytest.mark.slow), pytest.param(1e8, marks=pytest.mark.slow)]
)
def test_regression_4_flat_losses_in_single_precision_are_no_breakdown_of_cg(curvature, single_precision):
    """NaN where p'Ap has to exceed 200 eps n r'r, which flat losses never do."""
    flat_matrix = with_spectrum(np.geomspace(0.3, 4, 8)).astype(np.float32)
    v = np.random.default_rng(1).normal(size=8).astype(np.float32)
    wanted = np.linalg.solve(flat_matrix.astype(np.float64), v)
    scaled = (curvature * flat_matrix).astype(np.float32)
    for right in (v, np.float32(curvature) * v):
        grad, info = solve(cg(max_steps=40, rtol=1e-5), scaled, right)
        assert grad.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(grad, np.float64) * (curvature if right is v else 1), wanted, rtol=1e-3)
        assert info.converged
    assert error(numpy_cg(flat_matrix, v, 8), wanted) < 1e-3
    assert error(numpy_cg(flat_matrix, v, 8, threshold=200), wanted) < 1e-3
    assert np.all(np.isnan(numpy_cg(scaled, v, 8, threshold=200))) == (curvature < 1)


def test_regression_5_every_example_weight_has_its_own_one_step_gradient():
    """With one scalar, the sum over examples, broadcast over all of them: 29 times off."""
    examples, size, step = 300, 6, 0.2
    rng = np.random.default_rng(0)
    inputs, others = rng.normal(size=(2, examples, size))
    targets, other_targets = rng.normal(size=(2, examples))
    w, weights = rng.normal(size=size), rng.uniform(size=examples)

    problem = BilevelProblem(
        inner=lambda params, meta, batch: jnp.mean(meta * (batch[0] @ params - batch[1]) ** 2) / 2,
        outer=lambda params, meta, batch: jnp.mean((batch[0] @ params - batch[1]) ** 2) / 2,
    )
    batches = [tuple(jnp.asarray(x) for x in batch) for batch in ((inputs, targets), (others, other_targets))]
    point = Point(problem, jnp.asarray(w), jnp.asarray(weights), *batches)
    grad, _ = run(one_step(step), point)

    errors = inputs @ w - targets
    ahead = w - step * inputs.T @ (weights * errors) / examples
    v = others.T @ (others @ ahead - other_targets) / examples
    wanted = -step * errors * (inputs @ v) / examples
    assert grad.shape == (examples,)
    np.testing.assert_allclose(grad, wanted, rtol=1e-10)
    few = point._replace(meta=point.meta[:20], inner_batch=(batches[0][0][:20], batches[0][1][:20]))
    differences = central_differences(outer_after_training(few, 1, optax.sgd(step)), few.meta)
    np.testing.assert_allclose(run(one_step(step), few)[0], differences, rtol=1e-8)
    assert error(np.full(examples, np.sum(wanted)), wanted) > 10


@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-4])
def test_regression_6_cg_keeps_its_last_step_when_it_stops_by_tolerance(rtol):
    matrix = with_spectrum(np.geomspace(0.3, 4, 8))
    v = np.random.default_rng(1).normal(size=8)
    grad, info = solve(cg(max_steps=40, rtol=rtol), matrix, v)
    expected = numpy_cg(matrix, v, 40, tolerance=0.9 * rtol)
    np.testing.assert_allclose(grad, expected, rtol=1e-9)
    assert info.converged
    assert info.relative_residual <= rtol
    dropped = numpy_cg(matrix, v, 40, tolerance=0.9 * rtol, drop_last=True)
    assert error(matrix @ dropped, v) > rtol
    assert error(dropped, expected) > rtol / 5


def test_regression_7_neumann_keeps_its_leading_factor():
    """Without it the implicit part is 1/step too large, and an explicit part cannot be added to it."""
    solved, step = ridge(explicit=0.3), 0.05
    grad, info = run(implicit(neumann(3000, step)), solved)
    np.testing.assert_allclose(grad, solved.hypergradient, rtol=1e-9)
    np.testing.assert_allclose(flat_array(info.solution), solved.solution, rtol=1e-9)
    explicit = 0.3 * np.asarray(solved.meta)
    implicit_part = solved.hypergradient - explicit
    wrong = explicit + implicit_part / step
    np.testing.assert_allclose(error(wrong - explicit, implicit_part), 1 / step - 1)
    assert error(wrong, solved.hypergradient) > 1


def test_regression_7_a_short_neumann_series_of_tiny_steps_is_small_and_says_that_it_is_no_solution():
    """Without the factor, 3 terms at step 1e-4 are four times the plain gradient, the curvature without effect."""
    matrix, v, u = network_like()
    grad, info = solve(neumann(3, 1e-4), matrix, v)
    series, term = np.zeros_like(v), v
    for _ in range(4):
        series, term = series + term, term - 1e-4 * matrix @ term
    np.testing.assert_allclose(grad, 1e-4 * series, rtol=1e-12)
    np.testing.assert_allclose(info.relative_residual, error(1e-4 * matrix @ series, v), rtol=1e-9)
    assert not info.converged
    assert error(series, 4 * v) < 1e-4
    assert error(series, u) > 0.5
