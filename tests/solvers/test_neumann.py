import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax import neumann
from tests.helpers.linear_systems import nonsymmetric, spd, symmetric


def series(matrix, b, step, terms):
    """step * sum_{i=0..terms} (I - step A)^i b, term by term."""
    total, term = np.zeros_like(b), b
    for _ in range(terms + 1):
        total, term = total + term, term - step * matrix @ term
    return step * total


@pytest.mark.parametrize("terms", [0, 1, 3, 10, 40])
def test_is_the_series_with_its_leading_step(terms):
    system = spd()
    x, info = neumann(terms, 0.2)(system.matvec, system.b)
    np.testing.assert_allclose(x, series(system.matrix, system.b, 0.2, terms), rtol=1e-13)
    assert info.num_matvecs == terms + 1


def test_error_stays_below_its_analytic_bound():
    system = spd()
    low, high = np.linalg.eigvalsh(system.matrix)[[0, -1]]
    step = 1 / high
    for terms in (0, 2, 8, 30):
        x, _ = neumann(terms, step)(system.matvec, system.b)
        bound = (1 - step * low) ** (terms + 1) * np.linalg.norm(system.solution)
        assert np.linalg.norm(x - system.solution) <= bound


@pytest.mark.parametrize("terms", [0, 2, 4, 5, 20])
def test_automatic_step_is_the_series_of_its_own_step(terms):
    """The first terms come from the power iteration's vectors; the result is the plain series all the same."""
    system = spd()
    x, info = neumann(terms)(system.matvec, system.b)
    vector, growth = system.b, []
    for _ in range(min(5, terms + 1)):
        product = system.matrix @ (vector / np.linalg.norm(vector))
        growth.append(np.linalg.norm(product))
        vector = product
    np.testing.assert_allclose(x, series(system.matrix, system.b, 1 / max(growth), terms), rtol=1e-12)
    assert info.num_matvecs == terms + 1


@pytest.mark.parametrize("make", [spd, nonsymmetric])
@pytest.mark.parametrize("step", [None, 0.15])
def test_converges_and_says_so(make, step):
    system = make()
    x, info = neumann(600, step, rtol=1e-9)(system.matvec, system.b)
    assert info.converged
    np.testing.assert_allclose(x, system.solution, rtol=1e-7)


@pytest.mark.parametrize("step", [None, 0.2])
def test_residual_is_the_true_one(step):
    for terms in (0, 30):
        solver = neumann(terms, step, unroll=1)
        solve = jax.jit(lambda matrix, b, solver=solver: solver(lambda direction: matrix @ direction, b))
        for system in (spd(), nonsymmetric(), symmetric([-1.0, -0.2, 0.5, 1.0, 2.0, 3.0, 3.5, 4.0])):
            x, info = solve(jnp.asarray(system.matrix), system.b)
            np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-9)


def test_a_step_too_large_is_reported_and_finite():
    system = spd()
    step = 3 / np.linalg.eigvalsh(system.matrix)[-1]
    for terms in (5, 50, 3000):
        x, info = jax.jit(lambda b, terms=terms: neumann(terms, step)(system.matvec, b))(system.b)
        assert np.all(np.isfinite(x))
        assert not info.converged
        np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-9)


def test_a_step_too_large_returns_the_best_partial_sum():
    system = spd()
    step = 3 / np.linalg.eigvalsh(system.matrix)[-1]
    x, info = neumann(30, step, unroll=1)(system.matvec, system.b)
    residuals = [system.residual(series(system.matrix, system.b, step, terms)) for terms in range(31)]
    np.testing.assert_allclose(info.relative_residual, min(residuals), rtol=1e-9)
    np.testing.assert_allclose(x, series(system.matrix, system.b, step, int(np.argmin(residuals))), rtol=1e-9)


def test_indefinite_matrices_are_finite_and_reported():
    system = symmetric([-2.0, -0.5, 1.0, 3.0])
    for step in (None, 0.3):
        x, info = neumann(200, step)(system.matvec, system.b)
        assert np.all(np.isfinite(x))
        assert not info.converged
        assert info.min_curvature < 0
        np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-9)


def test_min_curvature_is_a_rayleigh_quotient_within_the_spectrum():
    system = spd()
    low, high = np.linalg.eigvalsh(system.matrix)[[0, -1]]
    for step in (None, 0.2):
        for damping in (0.0, 0.7):
            _, info = neumann(60, step, damping=damping)(system.matvec, system.b)
            assert low * (1 - 1e-9) <= info.min_curvature <= high


def test_automatic_step_survives_a_right_hand_side_that_hides_the_largest_eigenvalue():
    """The power iteration sees the large eigenvalue only through a trace of it; later terms take the growth back."""
    eigenvalues = np.array([1.0, 1.2, 1.5, 2.0, 1000.0])
    b = jnp.asarray([1.0, 1.0, 1.0, 1.0, 1e-18])
    x, info = neumann(400, rtol=1e-6)(lambda x: jnp.asarray(eigenvalues) * x, b)
    assert np.all(np.isfinite(x))
    np.testing.assert_allclose(x, np.asarray(b) / eigenvalues, rtol=1e-2, atol=1e-3)
    assert info.relative_residual < 1


def test_damping_solves_the_damped_system_and_reports_the_undamped_residual():
    system = spd()
    damped = np.linalg.solve(system.matrix + 0.5 * np.eye(len(system.b)), system.b)
    for step in (None, 0.15):
        x, info = neumann(500, step, damping=0.5, rtol=1e-9)(system.matvec, system.b)
        np.testing.assert_allclose(x, damped, rtol=1e-8)
        assert info.converged
        np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-9)
        assert info.relative_residual > 0.01


@pytest.mark.parametrize("step", [None, 0.2])
def test_two_short_warm_started_series_are_one_long_one(step):
    system = spd()
    solve = neumann(9, 0.2)
    half, _ = solve(system.matvec, system.b)
    x, info = solve(system.matvec, system.b, init=half)
    np.testing.assert_allclose(x, series(system.matrix, system.b, 0.2, 19), rtol=1e-12)
    assert info.num_matvecs == 11
    exact = jnp.asarray(system.solution)
    x, info = neumann(3, step)(system.matvec, system.b, init=exact)
    np.testing.assert_allclose(x, exact, rtol=1e-12)
    assert info.converged
    assert info.relative_residual < 1e-13


@pytest.mark.parametrize("step", [None, 0.2])
def test_a_zero_right_hand_side_has_the_zero_solution(step):
    system = spd()
    zero = jnp.zeros_like(system.b)
    for init in (None, system.b):
        x, info = neumann(7, step)(system.matvec, zero, init=init)
        np.testing.assert_array_equal(x, zero)
        assert info.relative_residual == 0
        assert info.converged
        assert info.min_curvature == 0


@pytest.mark.parametrize("step", [None, 1.0])
def test_a_zero_matrix_and_a_matrix_that_overflows_stay_finite(step):
    b = jnp.ones(3)
    for factor in (0.0, 1e308):
        x, info = neumann(6, step)(lambda x, factor=factor: factor * 1e3 * x, b)
        assert np.all(np.isfinite(x))
        assert not info.converged


@pytest.mark.parametrize("step", [None, 0.2])
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_the_scale_of_the_problem_does_not_matter_in_single_precision(step, scale, single_precision):
    system = spd()
    matrix, b = jnp.asarray(system.matrix, jnp.float32), jnp.asarray(system.b, jnp.float32)
    plain, plain_info = neumann(12, step, unroll=1)(lambda x: matrix @ x, b)
    scaled_step = None if step is None else step / scale
    scaled, info = neumann(12, scaled_step, unroll=1)(lambda x: scale * (matrix @ x), scale * b)
    np.testing.assert_allclose(scaled, plain, rtol=1e-5)
    np.testing.assert_allclose(info.relative_residual, plain_info.relative_residual, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("step", [None, pytest.param(0.2, marks=pytest.mark.slow)])
def test_loops_and_straight_line_code_agree(step):
    system = spd()
    plain, _ = neumann(12, step, unroll=True)(system.matvec, system.b)
    for unroll in (None, 1, 4):
        x, _ = jax.jit(lambda b, unroll=unroll: neumann(12, step, unroll=unroll)(system.matvec, b))(system.b)
        np.testing.assert_allclose(x, plain, rtol=1e-13)


def test_short_series_have_no_loop_on_the_cpu():
    system = spd()
    for options in ({}, {"step_size": 0.2}):
        text = jax.jit(lambda b, options=options: neumann(12, **options)(system.matvec, b)).lower(system.b).compile()
        assert " while(" not in text.as_text()


@pytest.mark.parametrize("step", [None, 0.2])
def test_derivative_is_that_of_the_series(step):
    """With a fixed step the series is a polynomial in A: its derivative in a scale of A by finite differences."""
    system = spd()

    def total(scale):
        x, _ = neumann(8, step, unroll=1)(lambda x: scale * system.matvec(x), system.b)
        return jnp.sum(x**2)

    grad = jax.grad(total)(1.0)
    assert np.isfinite(grad)
    if step is not None:  # with the automatic step, the step is held fixed and finite differences would move it
        np.testing.assert_allclose(grad, (total(1 + 1e-6) - total(1 - 1e-6)) / 2e-6, rtol=1e-7)


@pytest.mark.parametrize(
    "terms", [6, pytest.param(7, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.slow)]
)
def test_automatic_step_with_products_rounded_to_half_precision_is_as_good_as_a_step_by_hand(terms):
    """A model that computes in bfloat16: what is combined from products loses digits, what is measured does not."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(60, 60)))[0]
    matrix = jnp.asarray(basis @ np.diag(np.linspace(1.0, 1.3, 60)) @ basis.T, jnp.bfloat16)
    b = jnp.asarray(rng.normal(size=60), jnp.float32)

    def matvec(x):
        return (matrix @ x.astype(jnp.bfloat16)).astype(jnp.float32)

    _, by_hand = neumann(terms, 0.8)(matvec, b)
    x, info = neumann(terms)(matvec, b)
    outside = jnp.linalg.norm(b - matvec(x)) / jnp.linalg.norm(b)
    np.testing.assert_allclose(info.relative_residual, outside, atol=2e-3)  # half a unit of bfloat16
    assert info.relative_residual <= 2 * by_hand.relative_residual + 1e-3
    assert info.num_matvecs == terms + 1


def test_refuses_options_out_of_range():
    for options in ({"num_terms": -1}, {"num_terms": 3, "damping": -0.1}, {"num_terms": 3, "step_size": 0.0}):
        with pytest.raises(ValueError, match="neumann"):
            neumann(**options)
    with pytest.raises(ValueError, match="step_size"):
        neumann(3, -1.0)
    with pytest.raises(TypeError, match="num_terms"):
        neumann(3.5)
    with pytest.raises(ValueError, match=r"keep='first'.*'best' or 'all'"):
        neumann(3, keep="first")


INDEFINITE = [-2.0, -0.5, 1.0, 3.0]


@pytest.mark.parametrize(
    ("eigenvalues", "step"), [(INDEFINITE, 0.3), ([0.3, 1.0, 4.0], 1.5), ([1e-5, -2e-4, 0.1], 1e-4)]
)
def test_all_terms_are_the_whole_series_whatever_becomes_of_the_residual(eigenvalues, step):
    """Negative curvature, a step above 2 / lambda_max, a step without effect; with a guess, the same from there."""
    system = symmetric(eigenvalues)
    for terms in (0, 3, 12):
        x, info = neumann(terms, step, keep="all")(system.matvec, system.b)
        wanted = series(system.matrix, system.b, step, terms)
        np.testing.assert_allclose(x, wanted, rtol=1e-12)
        np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-9)
        guess = jnp.arange(1.0, 1.0 + len(system.b))
        x, _ = neumann(terms, step, keep="all")(system.matvec, system.b, init=guess)
        rest = np.asarray(system.b) - system.matrix @ np.asarray(guess)
        np.testing.assert_allclose(x, guess + series(system.matrix, rest, step, terms), rtol=1e-12)


def test_all_terms_with_the_automatic_step():
    system = symmetric(INDEFINITE)
    vector, growth = system.b, []
    for _ in range(5):
        product = system.matrix @ (vector / np.linalg.norm(vector))
        growth.append(np.linalg.norm(product))
        vector = product
    for terms in (4, 9):
        x, _ = neumann(terms, keep="all")(system.matvec, system.b)
        np.testing.assert_allclose(x, series(system.matrix, system.b, 1 / max(growth), terms), rtol=1e-11)


@pytest.mark.parametrize("step", [None, 1.0])
def test_all_terms_are_finite_where_the_matrix_overflows(step):
    x, info = neumann(6, step, keep="all")(lambda x: 1e308 * (1e3 * x), jnp.ones(3))
    assert np.all(np.isfinite(x))
    assert not info.converged


@pytest.mark.parametrize("terms", [3, 8])
def test_rounding_does_not_decide_how_many_terms_are_kept(terms, single_precision):
    """Where step A is below the rounding error, the residual of a convergent series rises and falls by chance."""
    solve = jax.jit(lambda matrix, b: neumann(terms, 1e-4)(lambda x: matrix @ x, b)[0])
    for seed in range(10):
        system = symmetric(np.random.default_rng(seed).uniform(1e-5, 2e-4, 20), seed)
        x = solve(jnp.asarray(system.matrix, jnp.float32), jnp.asarray(system.b, jnp.float32))
        np.testing.assert_allclose(x, series(system.matrix, np.asarray(system.b), 1e-4, terms), rtol=1e-5)


def test_an_automatic_step_keeps_its_size_on_a_direction_it_hardly_sees(single_precision):
    """b is all but an eigenvector of a tiny eigenvalue: its residual neither falls nor grows beyond rounding."""
    eigenvalues, b = jnp.array([1e-9, 1.0], jnp.float32), jnp.array([1.0, 1e-3], jnp.float32)
    x, _ = neumann(30)(lambda x: eigenvalues * x, b)
    long, _ = neumann(60)(lambda x: eigenvalues * x, b)
    np.testing.assert_allclose(long[0] / x[0], 61 / 31, rtol=1e-4)
