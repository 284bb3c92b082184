import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax import cg, dense, implicit
from auxjax.solvers import minres as written_out_or_loop
from tests.helpers.bilevel_problems import estimate, flat_array, ridge, weighted_least_squares
from tests.helpers.compiled import compiled
from tests.helpers.linear_systems import spd, symmetric

pytestmark = pytest.mark.slow  # compiles for minutes in all

# Loops, which compile fast; what differs when the steps are written out is tested as such.
minres = functools.partial(written_out_or_loop, unroll=False)
SIGNS = np.array([1, -1, 1, 1, -1, 1, -1, 1])
FORMS = pytest.mark.parametrize("unroll", [True, False], ids=["written out", "loop"])


def indefinite():
    """Eigenvalues of both signs, between 0.3 and 4 in size."""
    return symmetric(np.geomspace(0.3, 4, 8) * SIGNS)


def singular():
    """Indefinite, with two eigenvalues 0."""
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(6, 6)))[0]
    return rotation @ np.diag([3.0, -2.0, 1.0, 0.5, 0.0, 0.0]) @ rotation.T


def run(system, init=None, **options):
    return compiled(minres, **options)(jnp.asarray(system.matrix), system.b, init)


def best(system, steps):
    """The vector of the Krylov space with the smallest residual, by a dense least-squares fit."""
    b = np.asarray(system.b)
    vectors = [b / np.linalg.norm(b)]
    for _ in range(steps - 1):
        new = system.matrix @ vectors[-1]
        for _ in range(2):
            new = new - np.array(vectors).T @ (np.array(vectors) @ new)
        vectors.append(new / np.linalg.norm(new))
    basis = np.array(vectors).T
    return basis @ np.linalg.lstsq(system.matrix @ basis, b)[0]


@FORMS
def test_equals_dense_at_convergence(unroll):
    for system in (spd(), indefinite()):
        x, info = run(system, max_steps=9, rtol=1e-12, unroll=unroll)
        exact, _ = dense()(system.matvec, system.b)
        np.testing.assert_allclose(x, exact, rtol=1e-10)
        assert info.converged
        np.testing.assert_allclose(info.relative_residual, system.residual(x), atol=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_every_iterate_has_the_smallest_residual_of_its_krylov_space(steps):
    for system in (spd(), indefinite()):
        x, info = run(system, max_steps=steps, rtol=0.0)
        np.testing.assert_allclose(x, best(system, steps), rtol=1e-8)
        np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-10)
        assert info.num_matvecs == steps + 1


def test_solves_where_conjugate_gradients_break_down():
    matrix, b = jnp.diag(jnp.asarray([1.0, -1.0])), jnp.ones(2)
    assert not compiled(cg)(matrix, b)[1].converged
    x, info = compiled(minres)(matrix, b)
    np.testing.assert_allclose(x, [1.0, -1.0], rtol=1e-12)
    assert info.converged


@pytest.mark.parametrize("damping", [0.1, 2.0])
def test_with_damping_solves_the_damped_system(damping):
    system = indefinite()
    x, info = run(system, max_steps=30, rtol=1e-12, damping=damping)
    damped = np.linalg.solve(system.matrix + damping * np.eye(8), system.b)
    np.testing.assert_allclose(x, damped, rtol=1e-9)
    np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-10)
    np.testing.assert_allclose(info.min_curvature, np.linalg.eigvalsh(system.matrix)[0], rtol=1e-6)
    assert info.converged


@FORMS
def test_keeps_its_last_step_when_it_stops_by_tolerance(unroll):
    """The step that reaches the tolerance counts: the answer is the first iterate below it."""
    system = indefinite()
    iterates = [best(system, steps) for steps in range(1, 9)]
    for rtol in (0.8, 0.5):
        needed = next(k for k, x in enumerate(iterates, 1) if system.residual(x) <= 0.9 * rtol)
        x, info = run(system, max_steps=5, rtol=rtol, unroll=unroll)
        np.testing.assert_allclose(x, iterates[needed - 1], rtol=1e-9)
        assert info.converged
        assert info.num_matvecs == (5 if unroll else needed) + 1


@FORMS
def test_a_factor_changes_the_scale_only_in_single_precision(unroll, single_precision):
    system = indefinite()
    matrix, b = jnp.asarray(system.matrix, jnp.float32), jnp.asarray(system.b, jnp.float32)
    solve = compiled(minres, max_steps=3, rtol=0.0, unroll=unroll)
    plain, plain_info = solve(matrix, b)
    for curvature in (1e-25, 1e-8, 1e8):
        x, info = solve(jnp.float32(curvature) * matrix, b)
        np.testing.assert_allclose(curvature * x, plain, rtol=1e-4)
        np.testing.assert_allclose(info.relative_residual, plain_info.relative_residual, rtol=1e-4)
        np.testing.assert_allclose(info.min_curvature / curvature, plain_info.min_curvature, rtol=1e-4)
        assert not info.converged
        x, info = compiled(minres, max_steps=30, rtol=1e-4)(jnp.float32(curvature) * matrix, jnp.float32(curvature) * b)
        np.testing.assert_allclose(x, system.solution, rtol=1e-2)
        assert info.converged


def test_a_singular_system_with_a_solution_gets_it():
    matrix = singular()
    b = matrix @ np.arange(1.0, 7.0)
    x, info = compiled(minres, max_steps=9, rtol=1e-10)(matrix, b)
    assert info.converged
    np.testing.assert_allclose(matrix @ np.asarray(x), b, rtol=1e-9)


@pytest.mark.parametrize(("unroll", "precision"), [(True, jnp.float64), (False, jnp.float64), (False, jnp.float32)])
def test_a_singular_system_without_a_solution_gets_the_smallest_residual(unroll, precision):
    matrix, b = singular(), np.arange(1.0, 7.0)
    fitted = np.linalg.lstsq(matrix, b)[0]
    smallest = np.linalg.norm(b - matrix @ fitted) / np.linalg.norm(b)
    solve = compiled(minres, max_steps=7, rtol=1e-10, unroll=unroll)
    x, info = solve(jnp.asarray(matrix, precision), jnp.asarray(b, precision))
    digits = 1e-10 if precision == jnp.float64 else 1e-5
    np.testing.assert_allclose(info.relative_residual, smallest, rtol=digits)
    assert np.linalg.norm(x) < 20 * np.linalg.norm(fitted)
    assert not info.converged
    if not unroll:
        assert info.num_matvecs <= 7


@FORMS
def test_breakdowns_are_finite_and_reported(unroll):
    b = jnp.arange(1.0, 5.0)
    solve = compiled(minres, max_steps=3, unroll=unroll)
    for factor, residual in ((0.0, 1.0), (np.nan, np.nan)):
        for init in (None, b):
            x, info = solve(factor * jnp.eye(4), b, init)
            assert np.all(np.isfinite(x))
            assert not info.converged
            np.testing.assert_equal(float(info.relative_residual), residual)
    x, info = solve(jnp.diag(jnp.asarray([1.0, 1.0, 0.0, 0.0])), b)
    np.testing.assert_allclose(x[:2], b[:2], rtol=1e-12)
    np.testing.assert_allclose(info.relative_residual, 5 / np.sqrt(30), rtol=1e-12)
    assert 0 <= info.min_curvature < 1e-15


def test_a_zero_right_hand_side_has_the_zero_solution():
    system = indefinite()
    zero = jnp.zeros_like(system.b)
    for init in (None, system.b):
        x, info = compiled(minres)(jnp.asarray(system.matrix), zero, init)
        np.testing.assert_array_equal(x, zero)
        assert info.relative_residual == 0
        assert info.min_curvature == 0
        assert info.converged
        assert info.num_matvecs == 1 + (init is not None)


def test_warm_start_from_the_solution_needs_no_step():
    system = indefinite()
    x, info = run(system, jnp.asarray(system.solution), rtol=1e-9)
    np.testing.assert_allclose(x, system.solution, rtol=1e-12)
    assert info.num_matvecs == 2
    x, info = run(system, jnp.arange(8.0), max_steps=30, rtol=1e-12)
    np.testing.assert_allclose(x, system.solution, rtol=1e-9)
    np.testing.assert_allclose(info.relative_residual, system.residual(x), atol=1e-14)


def test_negative_curvature_is_seen_as_a_bound_from_above():
    """Eigenvalues of the tridiagonal matrix are Rayleigh quotients: never below the smallest eigenvalue."""
    for system in (spd(), indefinite()):
        lowest = np.linalg.eigvalsh(system.matrix)[0]
        seen = [run(system, max_steps=k, rtol=0.0)[1].min_curvature for k in (1, 2, 3, 6, 8)]
        assert all(value >= lowest - 1e-12 for value in seen)
        assert all(np.diff(seen) <= 1e-12)
        np.testing.assert_allclose(seen[-1], lowest, rtol=1e-9)


def test_negative_curvature_hidden_from_the_right_hand_side_and_the_solution_is_seen():
    matrix, b = jnp.diag(jnp.asarray([5.0, 4.0, 3.0, -0.1])), jnp.asarray([1.0, 1.0, 1.0, 0.01])
    x, info = compiled(minres, max_steps=8, rtol=0.0)(matrix, b)
    assert b @ matrix @ b > 0
    assert x @ matrix @ x > 0
    np.testing.assert_allclose(info.min_curvature, -0.1, rtol=1e-9)


def test_preconditioner_keeps_the_solution_and_its_true_residual():
    system = indefinite()
    inverse = jnp.linalg.inv(jnp.asarray(symmetric(np.geomspace(0.5, 3, 8), seed=2).matrix))

    @functools.partial(jax.jit, static_argnames="rtol")
    def solve(factor, rtol):
        return minres(max_steps=30, rtol=rtol, preconditioner=lambda r: factor * (inverse @ r))(system.matvec, system.b)

    for factor in (1.0, 1e-20, 1e20):
        for rtol in (1e-1, 1e-11):
            x, info = solve(factor, rtol)
            np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-6, atol=1e-14)
            assert info.converged
        np.testing.assert_allclose(x, system.solution, rtol=1e-9)
        assert np.linalg.eigvalsh(system.matrix)[0] <= info.min_curvature < 0


def test_preconditioned_residual_falls_in_the_metric_of_the_preconditioner():
    system = indefinite()
    inverse = np.diag(np.geomspace(0.2, 5, 8))
    sizes = []
    for steps in (1, 2, 4, 8):
        solve = minres(max_steps=steps, rtol=0.0, preconditioner=lambda r: jnp.asarray(inverse) @ r)
        left = system.b - system.matrix @ np.asarray(solve(system.matvec, system.b)[0])
        sizes.append(left @ inverse @ left)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-16 * sizes[0]


def test_a_preconditioner_that_is_not_positive_is_no_solution_but_finite():
    system = indefinite()
    x, info = minres(preconditioner=lambda r: -r)(system.matvec, system.b)
    assert np.all(np.isfinite(x))
    assert not info.converged


@FORMS
def test_pytrees_jit_and_vmap(unroll):
    values = (np.full(8, 2.0), np.array([3.0, 1, 3, 1, 3, 1, 3, 1]), np.geomspace(0.5, 3, 8))
    systems = [symmetric(value * SIGNS, seed) for seed, value in enumerate(values)]
    matrices, rights = jnp.stack([jnp.asarray(s.matrix) for s in systems]), jnp.stack([s.b for s in systems])
    solve = minres(max_steps=4 if unroll else 9, rtol=1e-5, unroll=unroll)

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
        np.testing.assert_allclose(info.relative_residual[index], system.residual(x[index]), rtol=1e-6, atol=1e-13)
    assert len(set(info.num_matvecs.tolist())) == (1 if unroll else 3)


def test_half_precision_is_computed_in_single():
    system = indefinite()
    b = system.b.astype(jnp.bfloat16)
    matrix = jnp.asarray(system.matrix, jnp.float32)
    x, info = minres(max_steps=30)(lambda x: (matrix @ x.astype(jnp.float32)).astype(jnp.bfloat16), b)
    assert x.dtype == jnp.bfloat16
    assert info.relative_residual.dtype == jnp.float32
    assert info.relative_residual < 0.05


def test_derivative_is_that_of_the_linear_system():
    system = indefinite()

    def total(solve, scale):
        x, _ = solve(lambda x: scale * system.matvec(x) + x, scale**2 * system.b)
        return jnp.sum(x**3)

    def warm(matvec, b):
        return minres(max_steps=30, rtol=1e-13)(matvec, b, init=100.0 * b)

    by_dense = jax.grad(lambda scale: total(dense(), scale))(0.7)
    by_minres = jax.grad(lambda scale: total(minres(max_steps=30, rtol=1e-13), scale))(0.7)
    np.testing.assert_allclose(by_minres, by_dense, rtol=1e-8)
    along = jax.jvp(lambda scale: total(warm, scale), (0.7,), (1.0,))[1]
    np.testing.assert_allclose(along, by_dense, rtol=1e-8)


@pytest.mark.parametrize("problem", [ridge, weighted_least_squares])
def test_hypergradient_is_the_closed_form(problem):
    solved = problem()
    grad, info = estimate(implicit(minres(max_steps=20, rtol=1e-12)), solved)
    np.testing.assert_allclose(np.ravel(grad), solved.hypergradient, rtol=1e-9)
    np.testing.assert_allclose(flat_array(info.solution), solved.solution, rtol=1e-9)
    assert info.converged


def test_refuses_options_out_of_range():
    with pytest.raises(ValueError, match="max_steps"):
        minres(max_steps=0)
    with pytest.raises(ValueError, match="damping"):
        minres(damping=-1.0)
    with pytest.raises(TypeError, match="preconditioner"):
        minres(preconditioner=3.0)
    with pytest.raises(TypeError, match="unroll"):
        written_out_or_loop(unroll=3)
    with pytest.raises(ValueError, match=r"minres\(preconditioner=\) returned"):
        minres(preconditioner=lambda r: r[:1])(lambda x: x, jnp.ones(3))
