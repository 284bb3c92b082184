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


def solve(matrix, b, span, dtype=jnp.float64):
    """`galerkin` on pytrees of two leaves, as one NumPy vector."""
    matrix = jnp.asarray(matrix, dtype)

    def tree(x):
        return {"a": jnp.asarray(x[:3], dtype), "b": jnp.asarray(x[3:], dtype).reshape(-1, 1)}

    def matvec(x):
        return tree(matrix @ jnp.concatenate([x["a"], x["b"][:, 0]]))

    x = jax.jit(lambda b, span: galerkin(matvec, b, span))(tree(b), [tree(w) for w in np.transpose(span)])
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


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_scales_of_the_system_and_of_the_span_change_nothing_in_float32(scale):
    x = solve(scale * SYMMETRIC, scale * B, SPAN * np.asarray([1e-15, 1.0, 1e15]), jnp.float32)
    np.testing.assert_allclose(x, wanted(SYMMETRIC, B, SPAN), rtol=1e-4)


def test_where_it_would_be_further_off_than_zero_it_is_zero():
    indefinite = np.diag([1.0, -1.0 + 1e-6] + [1.0] * 6)
    assert np.linalg.norm(wanted(indefinite, B, np.ones((8, 1)) * [[1.0]] * np.eye(8)[:, :2].sum(1)[:, None])) > 1e3
    np.testing.assert_array_equal(solve(indefinite, B, np.eye(8)[:, :2].sum(1)[:, None]), np.zeros(8))
    for broken in (np.nan, np.inf):
        np.testing.assert_array_equal(solve(broken * SYMMETRIC, B, SPAN), np.zeros(8))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="directions"):
        galerkin(lambda x: x, jnp.ones(3), [])
    with pytest.raises(ValueError, match="directions"):
        galerkin(lambda x: x, jnp.ones(3), [jnp.ones(4)])
    with pytest.raises(TypeError, match="matvec"):
        galerkin(3, jnp.ones(3), [jnp.ones(3)])
