import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax.solvers.galerkin import galerkin

RNG = np.random.default_rng(0)
SQUARE = RNG.standard_normal((8, 8))
SYMMETRIC = SQUARE @ SQUARE.T + np.eye(8)
B = RNG.standard_normal(8)
SPAN = RNG.standard_normal((8, 3))


def solve(matrix, b, span, dtype=jnp.float64, damping=0.0):
    """`galerkin` on pytrees of two leaves, as one NumPy vector."""
    matrix, half = jnp.asarray(matrix, dtype), len(b) // 2

    def tree(x):
        return {"a": jnp.asarray(x[:half], dtype), "b": jnp.asarray(x[half:], dtype).reshape(-1, 1)}

    def matvec(x):
        return tree(matrix @ jnp.concatenate([x["a"], x["b"][:, 0]]))

    x = jax.jit(lambda b, span: galerkin(matvec, b, span, damping=damping))(
        tree(b), [tree(w) for w in np.transpose(span)]
    )
    return np.concatenate([x["a"], x["b"][:, 0]])


def wanted(matrix, b, span):
    return span @ np.linalg.solve(span.T @ matrix @ span, span.T @ b)


def test_it_is_nearest_to_the_solution_in_the_energy_norm():
    x = solve(SYMMETRIC, B, SPAN)
    np.testing.assert_allclose(x, wanted(SYMMETRIC, B, SPAN), rtol=1e-10)
    error = x - np.linalg.solve(SYMMETRIC, B)
    np.testing.assert_allclose(SPAN.T @ SYMMETRIC @ error, np.zeros(3), atol=1e-10)


def test_a_span_that_holds_the_solution_gives_it():
    span = np.stack([np.linalg.solve(SQUARE, B), SPAN[:, 0]], axis=1)
    np.testing.assert_allclose(solve(SQUARE, B, span), span[:, 0], rtol=1e-9)


def test_zero_and_dependent_directions_do_no_harm():
    span = np.stack([SPAN[:, 0], np.zeros(8), 3 * SPAN[:, 0], SPAN[:, 1]], axis=1)
    np.testing.assert_allclose(solve(SYMMETRIC, B, span), wanted(SYMMETRIC, B, SPAN[:, :2]), rtol=1e-9)
    np.testing.assert_array_equal(solve(SYMMETRIC, B, np.zeros((8, 2))), np.zeros(8))


@pytest.mark.parametrize("scale", [1e-15, pytest.param(1.0, marks=pytest.mark.slow), 1e15])
def test_scales_of_the_system_and_of_the_span_change_nothing_in_float32(scale):
    x = solve(scale * SYMMETRIC, scale * B, SPAN * np.asarray([1e-15, 1.0, 1e15]), jnp.float32)
    np.testing.assert_allclose(x, wanted(SYMMETRIC, B, SPAN), rtol=1e-4)


def test_nearly_dependent_directions_round_no_worse_than_the_best_of_them():
    """As the solutions of a slowly moving system are: a solution, and changes of it that point nearly the same way."""
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    matrix = (basis * np.geomspace(1e-2, 1, 30)) @ basis.T
    u, move = rng.standard_normal((2, 30))
    bend = 1e-5 * rng.standard_normal((2, 30))
    span = np.stack([u, 1e-3 * move + bend[0], 1e-3 * move + bend[1]], axis=1)
    truth = u + 1e-3 * move
    x = solve(matrix, matrix @ truth, span, jnp.float32)

    def energy(error):
        return np.sqrt(error @ matrix @ error)

    best = energy(wanted(matrix, matrix @ truth, span) - truth)
    assert energy(x - truth) < best + 1e-5 * energy(truth) < 0.1 * energy(u - truth)


def test_flat_directions_count_as_much_as_stiff_ones():
    """The solution lies along them."""
    x = solve(np.diag([1.0, 1e-7]), np.asarray([1.0, 1e-7]), np.eye(2), jnp.float32)
    np.testing.assert_allclose(x, [1.0, 1.0], rtol=1e-5)


def test_the_damped_system_is_the_one_that_counts():
    damped = SYMMETRIC + 0.5 * np.eye(8)
    np.testing.assert_allclose(solve(SYMMETRIC, B, SPAN, damping=0.5), wanted(damped, B, SPAN), rtol=1e-10)


def test_of_a_definite_matrix_it_is_taken_though_the_residual_grows():
    matrix, b, span = np.diag([1.0, 1e4]), np.asarray([1.0, 0.0]), np.asarray([[1.0], [0.005]])
    x = solve(matrix, b, span)
    np.testing.assert_allclose(x, wanted(matrix, b, span), rtol=1e-10)
    assert np.linalg.norm(b - matrix @ x) > np.linalg.norm(b)


def test_of_an_indefinite_matrix_it_is_taken_if_it_is_nearer_than_the_first_direction():
    indefinite = np.diag([1.0, -1.0 + 1e-6] + [1.0] * 6)
    span = np.eye(8)[:, :2].sum(axis=1, keepdims=True)
    assert np.linalg.norm(wanted(indefinite, B, span)) > 1e3
    np.testing.assert_array_equal(solve(indefinite, B, span), span[:, 0])
    span = np.stack([SPAN[:, 0], np.linalg.solve(indefinite, B)], axis=1)
    np.testing.assert_allclose(solve(indefinite, B, span), span[:, 1], rtol=1e-6)


def test_what_is_not_finite_is_left_out_or_leaves_the_first_direction():
    for broken in (np.nan, np.inf):
        np.testing.assert_array_equal(solve(broken * SYMMETRIC, B, SPAN), np.zeros(8))
        np.testing.assert_array_equal(solve(SYMMETRIC, broken * B, SPAN), SPAN[:, 0])
        span = np.stack([SPAN[:, 0], np.full(8, broken)], axis=1)
        np.testing.assert_allclose(solve(SYMMETRIC, B, span), wanted(SYMMETRIC, B, SPAN[:, :1]), rtol=1e-9)
    x = solve(1e-30 * np.eye(8), 1e20 * np.ones(8), SPAN, jnp.float32)
    np.testing.assert_array_equal(x, SPAN[:, 0].astype(np.float32))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="directions"):
        galerkin(lambda x: x, jnp.ones(3), [])
    with pytest.raises(ValueError, match="directions"):
        galerkin(lambda x: x, jnp.ones(3), [jnp.ones(4)])
    with pytest.raises(TypeError, match="matvec"):
        galerkin(3, jnp.ones(3), [jnp.ones(3)])
