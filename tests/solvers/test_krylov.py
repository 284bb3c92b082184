import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax import cg, dense
from tests.helpers.linear_systems import spd, symmetric


def textbook_cg(matrix, b, rtol, max_steps, inverse=None, start=None):
    """Conjugate gradients in NumPy: the solution and the number of steps."""
    apply = (lambda r: r) if inverse is None else (lambda r: inverse @ r)
    x = np.zeros_like(b) if start is None else np.array(start)
    r = b - matrix @ x
    z = apply(r)
    p, steps = z, 0
    while np.linalg.norm(r) > rtol * np.linalg.norm(b) and steps < max_steps:
        gamma = r @ z
        alpha = gamma / (p @ matrix @ p)
        x, r = x + alpha * p, r - alpha * matrix @ p
        z = apply(r)
        p, steps = z + (r @ z) / gamma * p, steps + 1
    return x, steps


@pytest.mark.parametrize("unroll", [pytest.param(False, marks=pytest.mark.slow), True])
def test_equals_dense_at_convergence(unroll):
    """Regression of a peer: a search direction updated with the old residual is off by 135 %."""
    system = spd()
    x, info = cg(max_steps=30, rtol=1e-12, unroll=unroll)(system.matvec, system.b)
    exact, _ = dense()(system.matvec, system.b)
    np.testing.assert_allclose(x, exact, rtol=1e-10)
    assert info.converged


@pytest.mark.parametrize("unroll", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_with_damping_solves_the_damped_system(unroll):
    """Regression of a peer: a scale that reached one of two terms only."""
    system = spd()
    for damping in (0.1, 0.5, 2.0):
        x, info = cg(max_steps=30, rtol=1e-12, damping=damping, unroll=unroll)(system.matvec, system.b)
        damped = np.linalg.solve(system.matrix + damping * np.eye(len(system.b)), system.b)
        np.testing.assert_allclose(x, damped, rtol=1e-10)
        assert info.converged
        np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-10)


@pytest.mark.parametrize("unroll", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_keeps_its_last_step_when_it_stops_by_tolerance(unroll):
    """Regression of a peer: the step that reached the tolerance was dropped."""
    system = spd()
    for rtol in (1e-1, 1e-2, 1e-4):
        expected, _ = textbook_cg(system.matrix, np.asarray(system.b), 0.9 * rtol, 30)
        x, info = cg(max_steps=30, rtol=rtol, unroll=unroll)(system.matvec, system.b)
        np.testing.assert_allclose(x, expected, rtol=1e-10)
        assert info.converged
        assert info.relative_residual <= rtol


@pytest.mark.parametrize(
    "curvature", [1e-18, pytest.param(1e-8, marks=pytest.mark.slow), pytest.param(1e8, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("unroll", [pytest.param(False, marks=pytest.mark.slow), True])
def test_flat_losses_in_single_precision_are_no_breakdown(unroll, curvature, single_precision):
    """Regression of a peer: p'Ap had to exceed a multiple of eps, which flat losses never do."""
    system = spd()
    matrix, b = jnp.asarray(system.matrix, jnp.float32), jnp.asarray(system.b, jnp.float32)
    plain, plain_info = cg(max_steps=6, rtol=0.0, unroll=unroll)(lambda x: matrix @ x, b)
    x, info = cg(max_steps=6, rtol=0.0, unroll=unroll)(lambda x: curvature * (matrix @ x), b)
    np.testing.assert_allclose(curvature * x, plain, rtol=1e-4)
    np.testing.assert_allclose(info.relative_residual, plain_info.relative_residual, rtol=1e-3)
    assert info.num_matvecs == 7
    x, info = cg(max_steps=30, rtol=1e-4, unroll=unroll)(lambda x: curvature * (matrix @ x), curvature * b)
    np.testing.assert_allclose(x, system.solution, rtol=1e-2)
    assert info.converged


@pytest.mark.parametrize("precision", [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_counts_the_products_it_made(precision, scale, preconditioned):
    """That of a textbook iteration, on any scale and with a preconditioner."""
    system = symmetric(np.geomspace(0.2, 3, 40))
    inverse = np.diag(1 / np.diag(system.matrix))
    matrix, b = scale * jnp.asarray(system.matrix, precision), jnp.asarray(system.b, precision)
    device_inverse = jnp.asarray(inverse, precision) / scale
    preconditioner = (lambda r: device_inverse @ r) if preconditioned else None
    for rtol, max_steps in ((0.3, 200), (0.05, 200), (1e-9, 7)):
        solve = cg(max_steps=max_steps, rtol=rtol, preconditioner=preconditioner, unroll=False)
        _, info = solve(lambda x: matrix @ x, b)
        _, steps = textbook_cg(
            system.matrix, np.asarray(system.b), 0.9 * rtol, max_steps, inverse if preconditioned else None
        )
        assert info.num_matvecs == steps + 1


@pytest.mark.parametrize("unroll", [False, True])
def test_iterates_are_those_of_the_textbook(unroll):
    system = spd()
    for max_steps in (1, 3, 5):
        x, _ = cg(max_steps=max_steps, rtol=0.0, unroll=unroll)(system.matvec, system.b)
        expected, _ = textbook_cg(system.matrix, np.asarray(system.b), 0.0, max_steps)
        np.testing.assert_allclose(x, expected, rtol=1e-13)


@pytest.mark.parametrize("unroll", [False, True])
def test_warm_start_from_the_solution_needs_no_step(unroll):
    system = spd()
    solve = cg(max_steps=30, rtol=1e-9, unroll=unroll)
    x, info = solve(system.matvec, system.b, init=jnp.asarray(system.solution))
    np.testing.assert_allclose(x, system.solution, rtol=1e-12)
    assert info.num_matvecs == (32 if unroll else 2)
    assert info.relative_residual < 1e-12
    near = jnp.asarray(system.solution * 1.001)
    x, info = cg(max_steps=30, rtol=1e-4, unroll=unroll)(system.matvec, system.b, init=near)
    expected, steps = textbook_cg(system.matrix, np.asarray(system.b), 0.9e-4, 30, start=near)
    np.testing.assert_allclose(x, expected, rtol=1e-10)
    assert info.num_matvecs == (32 if unroll else steps + 2)
    assert info.converged


@pytest.mark.parametrize("unroll", [False, True])
def test_breakdown_is_finite_and_reported(unroll):
    """<b, A b> = 0: the first step divides by zero."""
    matrix = jnp.diag(jnp.asarray([1.0, -1.0]))
    b = jnp.ones(2)
    x, info = cg(unroll=unroll)(lambda x: matrix @ x, b)
    assert np.all(np.isfinite(x))
    assert not info.converged
    np.testing.assert_allclose(info.relative_residual, np.linalg.norm(b - matrix @ x) / np.sqrt(2), rtol=1e-12)
    start = jnp.asarray([0.5, 0.5])
    x, info = cg(unroll=unroll)(lambda x: matrix @ x, b, init=start)
    assert np.all(np.isfinite(x))
    zero, info = cg(unroll=unroll)(lambda x: 0.0 * x, b)
    assert np.all(np.isfinite(zero))
    assert not info.converged
    assert info.relative_residual == 1


@pytest.mark.parametrize("unroll", [False, True])
def test_a_zero_right_hand_side_has_the_zero_solution(unroll):
    system = spd()
    zero = jnp.zeros_like(system.b)
    for init in (None, system.b):
        x, info = cg(unroll=unroll)(system.matvec, zero, init=init)
        np.testing.assert_array_equal(x, zero)
        assert info.relative_residual == 0
        assert info.converged
        assert info.num_matvecs == (21 if unroll else 1) + (init is not None)


@pytest.mark.slow  # the rounding of quickly compiled programs, times a condition of 300, is more than is allowed here
@pytest.mark.parametrize("unroll", [False, True])
def test_vmapped_systems_are_solved_and_counted_one_by_one(unroll):
    systems = [symmetric(np.geomspace(low, 3, 8), seed) for seed, low in enumerate((2.9, 2.0, 0.01))]
    matrices, rights = jnp.stack([jnp.asarray(s.matrix) for s in systems]), jnp.stack([s.b for s in systems])

    def solve(matrix, b):
        return cg(max_steps=30, rtol=1e-4, unroll=unroll)(lambda x: matrix @ x, b)

    x, info = jax.vmap(solve)(matrices, rights)
    for index, system in enumerate(systems):
        alone, alone_info = solve(system.matrix, system.b)
        np.testing.assert_allclose(x[index], alone, rtol=1e-10)
        assert info.num_matvecs[index] == alone_info.num_matvecs
    assert len(set(info.num_matvecs.tolist())) == (1 if unroll else 3)


@pytest.mark.parametrize("unroll", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_derivative_is_that_of_the_linear_system(unroll):
    system = spd()

    def total(solve, scale):
        x, _ = solve(lambda x: scale * system.matvec(x) + x, scale**2 * system.b)
        return jnp.sum(x**3)

    def warm(matvec, b):
        return cg(max_steps=30, rtol=1e-13, unroll=unroll)(matvec, b, init=100.0 * b)

    by_dense = jax.grad(lambda scale: total(dense(), scale))(0.7)
    for solve in (cg(max_steps=30, rtol=1e-13, unroll=unroll), warm):
        by_cg = jax.grad(lambda scale, solve=solve: total(solve, scale))(0.7)
        np.testing.assert_allclose(by_cg, by_dense, rtol=1e-9)
        along = jax.jvp(lambda scale, solve=solve: total(solve, scale), (0.7,), (1.0,))[1]
        np.testing.assert_allclose(along, by_dense, rtol=1e-9)


@pytest.mark.parametrize(
    "scale", [1e-12, pytest.param(1.0, marks=pytest.mark.slow), pytest.param(1e12, marks=pytest.mark.slow)]
)
def test_written_out_with_a_preconditioner_is_the_textbook(scale):
    system = symmetric(np.geomspace(0.2, 3, 12))
    inverse = np.diag(1 / np.diag(system.matrix))
    device = jnp.asarray(inverse) / scale
    for rtol, max_steps in ((0.3, 20), (1e-9, 5)):
        solve = cg(max_steps=max_steps, rtol=rtol, preconditioner=lambda r: device @ r, unroll=True)
        x, info = solve(lambda x: scale * system.matvec(x), system.b)
        expected, _ = textbook_cg(system.matrix, np.asarray(system.b), 0.9 * rtol, max_steps, inverse)
        np.testing.assert_allclose(scale * x, expected, rtol=1e-10)
        assert info.num_matvecs == max_steps + 1


@pytest.mark.parametrize("unroll", [False, True])
def test_sees_negative_curvature_that_the_solution_does_not(unroll):
    """In the plane of the first two directions; the matrix is indefinite and the solution's quotient positive."""
    system = symmetric(np.asarray([-0.5, 1.0, 2.0, 3.0, 4.0, 5.0]))
    x, info = cg(max_steps=12, rtol=1e-10, unroll=unroll)(system.matvec, system.b)
    quotient = np.asarray(x) @ system.matrix @ np.asarray(x) / np.sum(np.asarray(x) ** 2)
    assert -0.5 <= info.min_curvature < min(0, quotient)


def test_refuses_options_out_of_range():
    with pytest.raises(ValueError, match="max_steps"):
        cg(max_steps=0)
    with pytest.raises(ValueError, match="damping"):
        cg(damping=-1.0)
    with pytest.raises(TypeError, match="preconditioner"):
        cg(preconditioner=3.0)


def test_importing_the_library_leaves_jaxopt_alone_and_making_a_solver_warns_of_nothing():
    script = (
        "import sys, warnings; warnings.simplefilter('error'); import auxjax; assert 'jaxopt' not in sys.modules; "
        "auxjax.cg(); assert 'jaxopt' not in sys.modules; auxjax.normal_cg(); assert 'jaxopt' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
