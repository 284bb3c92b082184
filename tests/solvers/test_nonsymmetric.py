"""The solvers of jaxopt for matrices that are not symmetric."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax import dense, implicit
from auxjax.solvers import bicgstab, normal_cg
from tests.helpers.bilevel_problems import estimate, flat_array, module_scaled_field
from tests.helpers.compiled import compiled
from tests.helpers.linear_systems import make, nonsymmetric, spd, symmetric

pytestmark = pytest.mark.slow  # compiles for minutes in all

BOTH = pytest.mark.parametrize("factory", [normal_cg, bicgstab])


def run(factory, system, init=None, **options):
    return compiled(factory, **options)(jnp.asarray(system.matrix), system.b, init)


def textbook_bicgstab(matrix, b, rtol, max_steps, inverse=None):
    """Stabilised biconjugate gradients in NumPy: the solution and the number of steps."""
    inverse = np.eye(len(b)) if inverse is None else inverse
    x, r, shadow, p, rho = np.zeros_like(b), b, b, b, b @ b
    steps = 0
    while np.linalg.norm(r) > rtol * np.linalg.norm(b) and steps < max_steps:
        q = matrix @ inverse @ p
        alpha = rho / (shadow @ q)
        s = r - alpha * q
        x, steps = x + alpha * inverse @ p, steps + 1
        if np.linalg.norm(s) < rtol * np.linalg.norm(b):
            break
        t = matrix @ inverse @ s
        omega = (t @ s) / (t @ t)
        x, r = x + omega * inverse @ s, s - omega * t
        rho, before = shadow @ r, rho
        p = r + rho / before * alpha / omega * (p - omega * q)
    return x, steps


def textbook_normal_cg(matrix, b, rtol, max_steps, inverse=None):
    """Conjugate gradients on the normal equations in NumPy: the solution and the number of steps."""
    inverse = np.eye(len(b)) if inverse is None else inverse
    x, r = np.zeros_like(b), matrix.T @ b
    p = z = inverse @ r
    steps = 0
    while np.linalg.norm(r) > rtol * np.linalg.norm(matrix.T @ b) and steps < max_steps:
        product, gamma = matrix.T @ (matrix @ p), r @ z
        alpha = gamma / (p @ product)
        x, r, steps = x + alpha * p, r - alpha * product, steps + 1
        z = inverse @ r
        p = z + (r @ z) / gamma * p
    return x, steps


def products(steps):
    return 2 * steps + 4


TEXTBOOK = {normal_cg: textbook_normal_cg, bicgstab: textbook_bicgstab}


@BOTH
def test_equals_dense_at_convergence(factory):
    for system in (nonsymmetric(), spd()):
        x, info = run(factory, system, max_steps=60, rtol=1e-13)
        exact, _ = dense()(system.matvec, system.b)
        np.testing.assert_allclose(x, exact, rtol=1e-10)
        np.testing.assert_allclose(info.relative_residual, system.residual(x), atol=1e-14)


def test_normal_equations_solve_indefinite_systems():
    system = symmetric([3.0, -2.0, 1.5, -1.0, 0.5, -0.4])
    x, info = run(normal_cg, system, max_steps=60, rtol=1e-11)
    np.testing.assert_allclose(x, system.solution, rtol=1e-9)
    assert info.converged


@BOTH
@pytest.mark.parametrize("damping", [0.1, 2.0])
def test_with_damping_solves_the_damped_system(factory, damping):
    system = nonsymmetric()
    x, info = run(factory, system, max_steps=60, rtol=1e-12, damping=damping)
    damped = np.linalg.solve(system.matrix + damping * np.eye(8), system.b)
    np.testing.assert_allclose(x, damped, rtol=1e-9)
    np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-9)


@BOTH
@pytest.mark.parametrize("preconditioned", [False, True])
def test_iterates_and_counts_are_those_of_the_textbook(factory, preconditioned):
    """Also: the step that reaches the tolerance is kept; marks change no digit; no scale changes anything."""
    system = make(nonsymmetric().matrix @ np.diag(np.geomspace(0.3, 3, 8)))
    near = np.linalg.inv(system.matrix + 0.1 * np.random.default_rng(8).normal(size=(8, 8)))
    inverse = (near @ near.T if factory is normal_cg else near) if preconditioned else None

    @functools.partial(jax.jit, static_argnames=("rtol", "max_steps"))
    def solve(scale, rtol, max_steps):
        apply = (lambda r: jnp.asarray(inverse) @ r / scale) if preconditioned else None
        matvec = lambda x: scale * system.matvec(x)  # noqa: E731
        return factory(max_steps=max_steps, rtol=rtol, preconditioner=apply)(matvec, system.b)

    for rtol, max_steps in ((0.1, 30), (1e-4, 30), (0.0, 2)):
        expected, steps = TEXTBOOK[factory](system.matrix, np.asarray(system.b), 0.9 * rtol, max_steps, inverse)
        for scale in (1e-12, 1.0, 1e12):
            x, info = solve(scale, rtol, max_steps)
            np.testing.assert_allclose(scale * x, expected, rtol=1e-7)
            np.testing.assert_allclose(info.relative_residual, system.residual(scale * x), rtol=1e-6, atol=1e-12)
            assert info.num_matvecs == products(steps)
            assert bool(info.converged) == bool(info.relative_residual <= rtol)


@BOTH
def test_flat_and_steep_losses_in_single_precision_are_no_breakdown(factory, single_precision):
    system = nonsymmetric()
    matrix, b = jnp.asarray(system.matrix, jnp.float32), jnp.asarray(system.b, jnp.float32)
    solve = compiled(factory, max_steps=3, rtol=0.0)
    plain, plain_info = solve(matrix, b)
    for curvature in (1e-25, 1e-8, 1e8):
        x, info = solve(jnp.float32(curvature) * matrix, b)
        np.testing.assert_allclose(curvature * x, plain, rtol=2e-3)
        np.testing.assert_allclose(info.relative_residual, plain_info.relative_residual, rtol=1e-3)
        assert info.num_matvecs == products(3)
        x, info = compiled(factory, max_steps=60, rtol=1e-4)(
            jnp.float32(curvature) * matrix, jnp.float32(curvature) * b
        )
        np.testing.assert_allclose(x, system.solution, rtol=1e-2)


@BOTH
def test_breakdowns_are_finite_and_reported(factory):
    b = jnp.arange(1.0, 5.0)
    solve = compiled(factory)
    for factor, residual in ((0.0, 1.0), (np.nan, np.nan)):
        for init in (None, b):
            x, info = solve(factor * jnp.eye(4), b, init)
            assert np.all(np.isfinite(x))
            assert not info.converged
            np.testing.assert_equal(float(info.relative_residual), residual)


def test_bicgstab_breaks_down_where_the_matrix_is_skew():
    """<r, A r> = 0 for every r: the first step divides by zero."""
    matrix, b = jnp.asarray([[0.0, 1.0], [-1.0, 0.0]]), jnp.asarray([1.0, 2.0])
    for init in (None, jnp.asarray([0.5, 0.5])):
        x, info = compiled(bicgstab)(matrix, b, init)
        np.testing.assert_array_equal(x, jnp.zeros(2) if init is None else init)
        assert not info.converged
        np.testing.assert_allclose(info.relative_residual, np.linalg.norm(b - matrix @ x) / np.sqrt(5), rtol=1e-12)
    x, info = compiled(normal_cg)(matrix, b)
    np.testing.assert_allclose(x, jnp.linalg.solve(matrix, b), rtol=1e-12)
    assert info.converged


def test_normal_equations_of_a_singular_system_give_the_least_squares_solution():
    matrix, b = jnp.diag(jnp.asarray([3.0, -2.0, 1.0, 0.0])), jnp.arange(1.0, 5.0)
    x, info = compiled(normal_cg, max_steps=30, rtol=1e-12)(matrix, b)
    np.testing.assert_allclose(x, np.linalg.pinv(matrix) @ b, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(info.relative_residual, 4 / np.sqrt(30), rtol=1e-12)
    assert not info.converged


@BOTH
def test_a_zero_right_hand_side_has_the_zero_solution(factory):
    system = nonsymmetric()
    zero = jnp.zeros_like(system.b)
    for init in (None, system.b):
        x, info = compiled(factory)(jnp.asarray(system.matrix), zero, init)
        np.testing.assert_array_equal(x, zero)
        assert info.relative_residual == 0
        assert info.converged
        assert info.num_matvecs == products(0)


@BOTH
def test_warm_start_from_the_solution_needs_no_step(factory):
    system = nonsymmetric()
    x, info = run(factory, system, jnp.asarray(system.solution), rtol=1e-9)
    np.testing.assert_allclose(x, system.solution, rtol=1e-12)
    assert info.num_matvecs == products(0)
    x, info = run(factory, system, jnp.arange(8.0), max_steps=60, rtol=1e-12)
    np.testing.assert_allclose(x, system.solution, rtol=1e-9)


@BOTH
def test_pytrees_jit_and_vmap(factory):
    rng = np.random.default_rng(9)
    systems = [make(np.eye(8) + factor * rng.normal(size=(8, 8))) for factor in (0.01, 0.1, 0.3)]
    matrices, rights = jnp.stack([jnp.asarray(s.matrix) for s in systems]), jnp.stack([s.b for s in systems])
    solve = factory(max_steps=40, rtol=1e-5)

    def solve_tree(matrix, b):
        def matvec(tree):
            flat = matrix @ jnp.concatenate([tree["a"].reshape(-1), tree["b"]])
            return {"a": flat[:6].reshape(2, 3), "b": flat[6:]}

        tree, info = solve(matvec, {"a": b[:6].reshape(2, 3), "b": b[6:]})
        return jnp.concatenate([tree["a"].reshape(-1), tree["b"]]), info

    x, info = jax.jit(jax.vmap(solve_tree))(matrices, rights)
    for index, system in enumerate(systems):
        alone, alone_info = solve(system.matvec, system.b)
        np.testing.assert_allclose(x[index], alone, rtol=1e-8)
        assert info.num_matvecs[index] == alone_info.num_matvecs
    assert len(set(info.num_matvecs.tolist())) > 1


@BOTH
def test_derivative_is_that_of_the_linear_system(factory):
    system = nonsymmetric()

    def total(solve, scale):
        x, _ = solve(lambda x: scale * system.matvec(x) + x, scale**2 * system.b)
        return jnp.sum(x**3)

    by_dense = jax.grad(lambda scale: total(dense(), scale))(0.7)
    solve = factory(max_steps=60, rtol=1e-13)
    np.testing.assert_allclose(jax.grad(lambda scale: total(solve, scale))(0.7), by_dense, rtol=1e-8)


@BOTH
def test_hypergradient_is_the_closed_form(factory):
    solved = module_scaled_field()
    grad, info = estimate(implicit(factory(max_steps=60, rtol=1e-12)), solved)
    np.testing.assert_allclose(np.ravel(grad), solved.hypergradient, rtol=1e-8)
    np.testing.assert_allclose(flat_array(info.solution), solved.solution, rtol=1e-8)


@BOTH
def test_refuses_options_out_of_range(factory):
    name = factory.__name__
    with pytest.raises(ValueError, match=f"{name}.max_steps"):
        factory(max_steps=0)
    with pytest.raises(ValueError, match=f"{name}.damping"):
        factory(damping=-1.0)
    with pytest.raises(TypeError, match=f"{name}.preconditioner"):
        factory(preconditioner=3.0)
    with pytest.raises(ValueError, match=r"preconditioner=. returned"):
        factory(preconditioner=lambda r: r[:1])(lambda x: x, jnp.ones(3))
