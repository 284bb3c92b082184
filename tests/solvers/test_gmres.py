import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax import dense, implicit
from auxjax.solvers import gmres as written_out_or_loop
from tests.helpers.bilevel_problems import estimate, flat_array, module_scaled_field, ridge
from tests.helpers.compiled import compiled
from tests.helpers.linear_systems import make, nonsymmetric, spd, symmetric

pytestmark = pytest.mark.slow  # compiles for minutes in all

# Loops, which compile fast; what differs when the steps are written out is tested as such.
gmres = functools.partial(written_out_or_loop, unroll=False)
FORMS = pytest.mark.parametrize("unroll", [True, False], ids=["written out", "loop"])


def run(system, init=None, **options):
    return compiled(gmres, **options)(jnp.asarray(system.matrix), system.b, init)


def textbook_gmres(matrix, b, steps, start=None):
    """The vector of the Krylov space with the smallest residual, by a dense least-squares fit."""
    start = np.zeros_like(b) if start is None else start
    left = b - matrix @ start
    vectors = [left / np.linalg.norm(left)]
    for _ in range(steps - 1):
        new = matrix @ vectors[-1]
        for _ in range(2):
            new = new - np.array(vectors).T @ (np.array(vectors) @ new)
        vectors.append(new / np.linalg.norm(new))
    basis = np.array(vectors).T
    return start + basis @ np.linalg.lstsq(matrix @ basis, left)[0]


@FORMS
def test_equals_dense_at_convergence(unroll):
    for system in (nonsymmetric(), spd(), symmetric([3.0, -2.0, 1.5, -1.0, 0.5, -0.4])):
        x, info = run(system, max_steps=8, rtol=1e-12, unroll=unroll)
        exact, _ = dense()(system.matvec, system.b)
        np.testing.assert_allclose(x, exact, rtol=1e-10)
        assert info.converged
        np.testing.assert_allclose(info.relative_residual, system.residual(x), atol=1e-14)


def test_every_iterate_has_the_smallest_residual_of_its_krylov_space():
    system = nonsymmetric()
    b = np.asarray(system.b)
    for steps in (1, 2, 3, 6):
        x, info = run(system, max_steps=steps, rtol=0.0)
        np.testing.assert_allclose(x, textbook_gmres(system.matrix, b, steps), rtol=1e-9)
        np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-9)
        assert info.num_matvecs == steps + 1


def test_restarts_continue_from_the_solution_so_far():
    system = nonsymmetric()
    b = np.asarray(system.b)
    expected = None
    for steps in (2, 2, 1):
        expected = textbook_gmres(system.matrix, b, steps, start=expected)
    for unroll in (True, False):
        x, info = run(system, max_steps=5, restart=2, rtol=0.0, unroll=unroll)
        np.testing.assert_allclose(x, expected, rtol=1e-9)
        assert info.num_matvecs == 2 + 1 + 2 + 1 + 1 + 1
    x, info = run(system, max_steps=200, restart=3, rtol=1e-10)
    np.testing.assert_allclose(x, system.solution, rtol=1e-9)
    assert info.converged
    assert info.num_matvecs < 100


def test_with_damping_solves_the_damped_system():
    system = nonsymmetric()
    for damping in (0.1, 2.0):
        x, info = run(system, max_steps=30, rtol=1e-12, damping=damping)
        damped = np.linalg.solve(system.matrix + damping * np.eye(8), system.b)
        np.testing.assert_allclose(x, damped, rtol=1e-10)
        np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-10)
        assert info.converged


@FORMS
def test_keeps_its_last_step_when_it_stops_by_tolerance(unroll):
    system = nonsymmetric()
    b = np.asarray(system.b)
    for rtol in (0.5, 0.2):
        iterates = [textbook_gmres(system.matrix, b, steps) for steps in range(1, 9)]
        needed = next(k for k, x in enumerate(iterates, 1) if system.residual(x) <= 0.9 * rtol)
        x, info = run(system, max_steps=5, rtol=rtol, unroll=unroll)
        np.testing.assert_allclose(x, iterates[needed - 1], rtol=1e-9)
        assert info.converged
        assert info.num_matvecs == (5 if unroll else needed) + 1


@FORMS
def test_a_factor_changes_the_scale_only_in_single_precision(unroll, single_precision):
    system = nonsymmetric()
    matrix, b = jnp.asarray(system.matrix, jnp.float32), jnp.asarray(system.b, jnp.float32)
    solve = compiled(gmres, max_steps=3, rtol=0.0, unroll=unroll)
    plain, plain_info = solve(matrix, b)
    for curvature in (1e-25, 1e-8, 1e8):
        x, info = solve(jnp.float32(curvature) * matrix, b)
        np.testing.assert_allclose(curvature * x, plain, rtol=1e-4)
        np.testing.assert_allclose(info.relative_residual, plain_info.relative_residual, rtol=1e-4)
        x, info = compiled(gmres, max_steps=8, rtol=1e-4)(jnp.float32(curvature) * matrix, jnp.float32(curvature) * b)
        np.testing.assert_allclose(x, system.solution, rtol=1e-2)
        assert info.converged


def test_reaches_its_tolerance_in_single_precision_on_an_ill_conditioned_matrix_of_any_norm(single_precision):
    """Where jax's own GMRES gives NaN, or stops with ten times the residual asked for."""
    rng = np.random.default_rng(0)
    rotations = [np.linalg.qr(rng.normal(size=(60, 60)))[0] for _ in range(2)]
    matrix = rotations[0] @ np.diag(np.geomspace(1e-5, 1, 60)) @ rotations[0].T
    b = jnp.asarray(matrix @ rng.normal(size=60), jnp.float32)
    for norm in (1.0, 30.0):
        device = jnp.asarray(norm * matrix, jnp.float32)
        for rtol in (1e-2, 1e-4):
            x, info = compiled(gmres, max_steps=60, restart=60, rtol=rtol)(device, b)
            assert info.converged
            assert np.linalg.norm(b - device @ x) <= rtol * np.linalg.norm(b)


@FORMS
def test_singular_systems_get_the_smallest_residual(unroll):
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(6, 6)))[0]
    matrix = rotation @ np.diag([3.0, -2.0, 1.0, 0.5, 0.0, 0.0]) @ rotation.T
    solve = compiled(gmres, max_steps=6, rtol=1e-10, unroll=unroll)
    b = matrix @ np.arange(1.0, 7.0)
    x, info = solve(matrix, b)
    np.testing.assert_allclose(matrix @ np.asarray(x), b, rtol=1e-9)
    assert info.converged
    b = np.arange(1.0, 7.0)
    fitted = np.linalg.lstsq(matrix, b)[0]
    x, info = solve(matrix, b)
    smallest = np.linalg.norm(b - matrix @ fitted) / np.linalg.norm(b)
    np.testing.assert_allclose(info.relative_residual, smallest, rtol=1e-9)
    assert np.linalg.norm(x) < 20 * np.linalg.norm(fitted)
    assert not info.converged


@FORMS
def test_breakdowns_are_finite_and_reported(unroll):
    b = jnp.arange(1.0, 5.0)
    solve = compiled(gmres, max_steps=3, unroll=unroll)
    for factor, residual in ((0.0, 1.0), (np.nan, np.nan)):
        for init in (None, b):
            x, info = solve(factor * jnp.eye(4), b, init)
            assert np.all(np.isfinite(x))
            assert not info.converged
            np.testing.assert_equal(float(info.relative_residual), residual)


def test_stagnation_until_the_last_step():
    """A cyclic shift: no step but the last makes the residual smaller."""
    system = make(np.roll(np.eye(5), 1, axis=0))
    b = jnp.zeros(5).at[0].set(1)
    x, info = compiled(gmres, max_steps=4)(system.matrix, b)
    np.testing.assert_array_equal(x, jnp.zeros(5))
    assert info.num_matvecs == 5
    x, info = compiled(gmres, max_steps=5)(system.matrix, b)
    np.testing.assert_allclose(system.matrix @ np.asarray(x), b, atol=1e-15)
    assert info.converged
    assert info.num_matvecs == 6


def test_a_zero_right_hand_side_has_the_zero_solution():
    system = nonsymmetric()
    zero = jnp.zeros_like(system.b)
    for init in (None, system.b):
        x, info = compiled(gmres)(jnp.asarray(system.matrix), zero, init)
        np.testing.assert_array_equal(x, zero)
        assert info.relative_residual == 0
        assert info.min_curvature == 0
        assert info.converged


def test_warm_start_from_the_solution_needs_no_step():
    system = nonsymmetric()
    x, info = run(system, jnp.asarray(system.solution), max_steps=8, rtol=1e-9)
    np.testing.assert_allclose(x, system.solution, rtol=1e-12)
    assert info.num_matvecs == 2
    start = np.arange(8.0)
    x, info = run(system, jnp.asarray(start), max_steps=3, rtol=0.0)
    np.testing.assert_allclose(x, textbook_gmres(system.matrix, np.asarray(system.b), 3, start), rtol=1e-9)


def test_preconditioner_on_the_right_keeps_the_true_residual():
    system = nonsymmetric()
    inverse = np.linalg.inv(system.matrix + 0.1 * np.random.default_rng(8).normal(size=(8, 8)))

    @functools.partial(jax.jit, static_argnames=("rtol", "max_steps"))
    def solve(factor, max_steps, rtol):
        apply = lambda r: factor * (jnp.asarray(inverse) @ r)  # noqa: E731
        return gmres(max_steps=max_steps, rtol=rtol, preconditioner=apply)(system.matvec, system.b)

    expected = inverse @ textbook_gmres(system.matrix @ inverse, np.asarray(system.b), 2)
    for factor in (1.0, 1e-20, 1e20):
        x, info = solve(factor, 2, 0.0)
        np.testing.assert_allclose(x, expected, rtol=1e-9)
        np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-9)
    plain = run(system, max_steps=8, rtol=1e-3)[1]
    better = solve(1.0, 8, 1e-3)[1]
    assert better.converged
    assert better.num_matvecs < plain.num_matvecs


@FORMS
def test_pytrees_jit_and_vmap(unroll):
    rng = np.random.default_rng(9)
    systems = [make(np.eye(8) + factor * rng.normal(size=(8, 8))) for factor in (0.01, 0.1, 0.3)]
    matrices, rights = jnp.stack([jnp.asarray(s.matrix) for s in systems]), jnp.stack([s.b for s in systems])
    solve = gmres(max_steps=4 if unroll else 8, rtol=1e-5, unroll=unroll)

    def solve_tree(matrix, b):
        def matvec(tree):
            flat = matrix @ jnp.concatenate([tree["a"].reshape(-1), tree["b"]])
            return {"a": flat[:6].reshape(2, 3), "b": flat[6:]}

        tree, info = solve(matvec, {"a": b[:6].reshape(2, 3), "b": b[6:]})
        return jnp.concatenate([tree["a"].reshape(-1), tree["b"]]), info

    x, info = jax.jit(jax.vmap(solve_tree))(matrices, rights)
    for index, system in enumerate(systems):
        alone, alone_info = solve(system.matvec, system.b)
        np.testing.assert_allclose(x[index], alone, rtol=1e-9)
        assert info.num_matvecs[index] == alone_info.num_matvecs
    assert len(set(info.num_matvecs.tolist())) == (1 if unroll else 3)


def test_derivative_is_that_of_the_linear_system():
    system = nonsymmetric()

    def total(solve, scale):
        x, _ = solve(lambda x: scale * system.matvec(x) + x, scale**2 * system.b)
        return jnp.sum(x**3)

    by_dense = jax.grad(lambda scale: total(dense(), scale))(0.7)
    solve = gmres(max_steps=8, rtol=1e-13)
    np.testing.assert_allclose(jax.grad(lambda scale: total(solve, scale))(0.7), by_dense, rtol=1e-9)
    along = jax.jvp(lambda scale: total(solve, scale), (0.7,), (1.0,))[1]
    np.testing.assert_allclose(along, by_dense, rtol=1e-9)


@pytest.mark.parametrize("problem", [module_scaled_field, ridge])
def test_hypergradient_is_the_closed_form(problem):
    solved = problem()
    grad, info = estimate(implicit(gmres(max_steps=6, rtol=1e-12)), solved)
    np.testing.assert_allclose(np.ravel(grad), solved.hypergradient, rtol=1e-9)
    np.testing.assert_allclose(flat_array(info.solution), solved.solution, rtol=1e-9)
    assert info.converged


def test_min_curvature_is_a_rayleigh_quotient():
    for system in (spd(), symmetric([3.0, -2.0, 1.5, -1.0, 0.5, -0.4])):
        seen = run(system, max_steps=8, rtol=1e-10)[1].min_curvature
        lowest = np.linalg.eigvalsh(system.matrix)[0]
        assert seen >= lowest - 1e-12
        assert np.sign(seen) == np.sign(lowest)


def test_refuses_options_out_of_range():
    with pytest.raises(ValueError, match="max_steps"):
        gmres(max_steps=0)
    with pytest.raises(ValueError, match="restart"):
        gmres(restart=0)
    with pytest.raises(ValueError, match="damping"):
        gmres(damping=-1.0)
    with pytest.raises(TypeError, match="preconditioner"):
        gmres(preconditioner=3.0)
    with pytest.raises(TypeError, match="unroll"):
        written_out_or_loop(unroll=3)
