import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax import dense, implicit
from auxjax.solvers import nystrom
from auxjax.solvers._nystrom import sketch_matrix
from tests.helpers.bilevel_problems import estimate, flat_array, ridge
from tests.helpers.linear_systems import make, spd, symmetric

pytestmark = pytest.mark.slow  # compiles for minutes in all

KEY = jax.random.key(3)


@functools.cache
def compiled(rank, damping, rtol=1e-3):
    """`(matrix, b, key) -> (x, SolveInfo)`, jitted once for all tests."""
    return jax.jit(lambda matrix, b, key: nystrom(rank, damping=damping, rtol=rtol)(lambda x: matrix @ x, b, key=key))


def solve(system, rank, damping, key=KEY, rtol=1e-3):
    return compiled(rank, damping, rtol)(jnp.asarray(system.matrix), system.b, key)


@pytest.mark.parametrize("rank", [8, 20])
def test_with_full_rank_is_the_damped_dense_solution(rank):
    system = spd()
    for damping in (1e-3, 0.5):
        x, info = solve(system, rank, damping, rtol=1e-10)
        np.testing.assert_allclose(x, dense(damping=damping)(system.matvec, system.b)[0], rtol=1e-9)
        np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-9)
        assert info.converged
        assert info.num_matvecs == 8 + 1
        np.testing.assert_allclose(info.min_curvature, np.linalg.eigvalsh(system.matrix)[0], rtol=1e-9)


def test_is_the_woodbury_formula_of_the_columns_it_looked_at():
    system = spd()
    directions = np.linalg.qr(np.asarray(jax.random.normal(KEY, (8, 3))))[0]
    columns = system.matrix @ directions
    low_rank = columns @ np.linalg.inv(directions.T @ columns) @ columns.T
    x, info = solve(system, 3, 0.2)
    np.testing.assert_allclose(x, np.linalg.solve(low_rank + 0.2 * np.eye(8), system.b), rtol=1e-9)
    np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-10)
    assert info.num_matvecs == 4


def test_the_approximation_is_positive_and_below_the_matrix():
    system = spd()
    for rank in (1, 3, 8):
        sketch = jax.jit(sketch_matrix, static_argnums=(0, 2))(system.matvec, system.b, rank, KEY)
        basis, values = np.asarray(sketch.basis), np.asarray(sketch.eigenvalues)
        np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-12)
        assert np.all(np.diff(values) <= 0)
        assert values[-1] > 0
        rest = system.matrix - basis @ np.diag(values) @ basis.T
        assert np.linalg.eigvalsh(rest)[0] > -1e-12


def test_the_error_falls_with_the_rank_where_the_spectrum_decays():
    system = symmetric(10.0 ** -np.arange(12.0))
    damping = 1e-8
    exact = np.linalg.solve(system.matrix + damping * np.eye(12), system.b)
    sizes = []
    for rank in (2, 5, 8, 12):
        errors = []
        for seed in range(5):
            x, _ = solve(system, rank, damping, key=jax.random.key(seed))
            errors.append(np.linalg.norm(x - exact) / np.linalg.norm(exact))
        sizes.append(np.median(errors))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 0.5
    assert sizes[-2] < 0.3
    assert sizes[-1] < 1e-6


def test_low_rank_matrices_are_exact_from_their_rank_on():
    system = _low_rank()
    for precision, digits in ((jnp.float64, 1e-9), (jnp.float32, 1e-4)):
        matrix, b = jnp.asarray(system, precision), jnp.arange(1.0, 7.0).astype(precision)
        for rank in (3, 5):
            x, info = compiled(rank, 0.1)(matrix, b, KEY)
            exact = np.linalg.solve(system + 0.1 * np.eye(6), b)
            np.testing.assert_allclose(x, exact, rtol=digits)
            assert info.converged
            assert info.min_curvature >= 0


def _low_rank():
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(6, 6)))[0]
    return rotation @ np.diag([5.0, 2.0, 1.0, 0.0, 0.0, 0.0]) @ rotation.T


@pytest.mark.parametrize("curvature", [1e-20, 1e8])
def test_a_factor_changes_the_scale_only_in_single_precision(curvature, single_precision):
    system = symmetric(np.geomspace(1e-4, 4, 8))
    matrix, b = jnp.asarray(system.matrix, jnp.float32), jnp.asarray(system.b, jnp.float32)
    plain, plain_info = compiled(4, 0.01)(matrix, b, KEY)
    x, info = compiled(4, 0.01 * curvature)(jnp.float32(curvature) * matrix, b, KEY)
    np.testing.assert_allclose(curvature * x, plain, rtol=1e-3)
    np.testing.assert_allclose(info.relative_residual, plain_info.relative_residual, rtol=1e-4)


def test_indefinite_and_broken_matrices_have_finite_answers_and_true_residuals():
    system = symmetric(np.geomspace(0.3, 4, 8) * np.array([1, -1, 1, 1, -1, 1, -1, 1]))
    for rank in (4, 8):
        x, info = solve(system, rank, 0.1)
        assert np.linalg.norm(x) <= np.linalg.norm(system.b) / 0.1 * (1 + 1e-12)
        np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-10)
        assert not info.converged
    assert info.min_curvature < 0
    b = jnp.arange(1.0, 5.0)
    x, info = compiled(2, 0.5)(0.0 * jnp.eye(4), b, KEY)
    np.testing.assert_allclose(x, b / 0.5, rtol=1e-12)
    assert info.relative_residual == 1
    assert info.converged  # the damped system is solved
    x, info = compiled(2, 0.5)(jnp.nan * jnp.eye(4), b, KEY)
    assert np.all(np.isfinite(x))
    assert not info.converged
    x, info = compiled(2, 0.5)(jnp.eye(4), jnp.zeros(4), KEY)
    np.testing.assert_array_equal(x, np.zeros(4))
    assert info.relative_residual == 0
    assert info.min_curvature == 0
    assert info.converged


def test_pytrees_jit_and_vmap():
    system = spd()

    def matvec(tree):
        flat = system.matvec(jnp.concatenate([tree["a"].reshape(-1), tree["b"]]))
        return {"a": flat[:6].reshape(2, 3), "b": flat[6:]}

    def solve_tree(key, b):
        tree, info = nystrom(4, damping=0.1)(matvec, {"a": b[:6].reshape(2, 3), "b": b[6:]}, key=key)
        return jnp.concatenate([tree["a"].reshape(-1), tree["b"]]), info

    keys = jax.random.split(KEY, 3)
    rights = jnp.stack([make(system.matrix, seed).b for seed in range(3)])
    x, info = jax.jit(jax.vmap(solve_tree))(keys, rights)
    for index in range(3):
        alone, alone_info = compiled(4, 0.1)(jnp.asarray(system.matrix), rights[index], keys[index])
        np.testing.assert_allclose(x[index], alone, rtol=1e-10)
        np.testing.assert_allclose(info.relative_residual[index], alone_info.relative_residual, rtol=1e-10)
    assert np.any(x[0] != x[1])


def test_mixed_precision_leaves_come_back_as_they_were():
    b = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
    x, info = nystrom(5, damping=0.5)(lambda x: jax.tree.map(lambda leaf: 2 * leaf, x), b, key=KEY)
    assert x["a"].dtype == jnp.bfloat16
    assert x["b"].dtype == info.relative_residual.dtype == jnp.float32
    # The products see the first leaf in half precision, of which a random sketch hands on the rounding errors.
    np.testing.assert_allclose(x["b"], 0.4, rtol=2e-3)


def test_derivative_is_that_of_the_damped_linear_system():
    system = spd()

    def total(solver, scale, **options):
        x, _ = solver(lambda x: scale * system.matvec(x) + x, scale**2 * system.b, **options)
        return jnp.sum(x**3)

    by_dense = jax.grad(lambda scale: total(dense(damping=0.1), scale))(0.7)
    by_nystrom = jax.grad(lambda scale: total(nystrom(8, damping=0.1), scale, key=KEY))(0.7)
    np.testing.assert_allclose(by_nystrom, by_dense, rtol=1e-9)


def test_hypergradient_with_full_rank_and_little_damping_is_the_closed_form():
    solved = ridge()
    grad, info = estimate(implicit(nystrom(6, damping=1e-10)), solved, key=KEY)
    np.testing.assert_allclose(np.ravel(grad), solved.hypergradient, rtol=1e-8)
    np.testing.assert_allclose(flat_array(info.solution), solved.solution, rtol=1e-8)
    assert info.converged


def test_refuses_what_it_cannot_use():
    system = spd()
    with pytest.raises(TypeError, match=r"nystrom solve\(key=\) is missing"):
        nystrom(3, damping=0.1)(system.matvec, system.b)
    with pytest.raises(TypeError, match="typed PRNG key"):
        nystrom(3, damping=0.1)(system.matvec, system.b, key=jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="damping"):
        nystrom(3, damping=0.0)
    with pytest.raises(ValueError, match="damping"):
        nystrom(3, damping=-1.0)
    with pytest.raises(ValueError, match="rank"):
        nystrom(0, damping=0.1)
    with pytest.raises(TypeError, match="rank"):
        nystrom(2.5, damping=0.1)
    with pytest.raises(TypeError, match="damping"):
        nystrom(3)
