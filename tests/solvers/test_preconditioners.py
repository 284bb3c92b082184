import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from auxjax import cg
from auxjax.solvers import (
    adam_preconditioner,
    diagonal_preconditioner,
    gmres,
    minres,
    nystrom_preconditioner,
)
from tests.helpers.linear_systems import make, spd, symmetric

pytestmark = pytest.mark.slow  # compiles for minutes in all

KEY = jax.random.key(3)


def as_matrix(preconditioner, size):
    return np.asarray(jax.vmap(preconditioner, in_axes=1, out_axes=1)(jnp.eye(size)))


def outliers():
    """Five large eigenvalues over a cluster: condition number 1e4."""
    return symmetric(np.concatenate([np.linspace(1, 2, 35), np.geomspace(300, 1e4, 5)]))


def bad_scaling():
    """A well-conditioned matrix whose variables are measured in very different units: condition number about 1e6."""
    units = np.geomspace(1e-3, 1, 30)
    rng = np.random.default_rng(2)
    coupling = 0.1 * rng.normal(size=(30, 30)) / np.sqrt(30)
    return make(units[:, None] * (np.eye(30) + coupling + coupling.T) * units[None, :])


def test_nystrom_has_its_formula():
    system = spd()
    directions = np.linalg.qr(np.asarray(jax.random.normal(KEY, (8, 3))))[0]
    columns = system.matrix @ directions
    low_rank = columns @ np.linalg.inv(directions.T @ columns) @ columns.T
    values, vectors = np.linalg.eigh(low_rank)
    values, vectors = values[-3:], vectors[:, -3:]
    for damping in (0.0, 0.2):
        expected = vectors @ np.diag(1 / (values + damping)) @ vectors.T
        expected += (np.eye(8) - vectors @ vectors.T) / (values[0] + damping)
        made = nystrom_preconditioner(system.matvec, system.b, 3, damping=damping, key=KEY)
        np.testing.assert_allclose(as_matrix(made, 8), expected, rtol=1e-8, atol=1e-12)


def test_nystrom_with_full_rank_is_the_inverse():
    system = spd()
    made = nystrom_preconditioner(system.matvec, system.b, 8, damping=0.1, key=KEY)
    np.testing.assert_allclose(
        as_matrix(made, 8), np.linalg.inv(system.matrix + 0.1 * np.eye(8)), rtol=1e-9, atol=1e-12
    )
    for solver in (cg, minres, gmres):
        x, info = solver(max_steps=3, rtol=1e-9, damping=0.1, preconditioner=made)(system.matvec, system.b)
        np.testing.assert_allclose(x, np.linalg.solve(system.matrix + 0.1 * np.eye(8), system.b), rtol=1e-8)
        assert info.converged


def test_nystrom_saves_steps_where_few_eigenvalues_stick_out():
    system = outliers()
    made = nystrom_preconditioner(system.matvec, system.b, 12, damping=0.0, key=KEY)
    for solver, most in ((cg, 14), (minres, 14)):
        options = {"max_steps": 200, "rtol": 1e-6} | ({"unroll": False} if solver is minres else {})
        plain, plain_info = solver(**options)(system.matvec, system.b)
        x, info = solver(**options, preconditioner=made)(system.matvec, system.b)
        np.testing.assert_allclose(x, plain, rtol=1e-2, atol=1e-5)
        assert plain_info.converged
        assert info.converged
        np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-6)
        assert info.num_matvecs <= most
        assert plain_info.num_matvecs >= 19


@pytest.mark.parametrize("solver", [cg, minres])
def test_the_diagonal_saves_steps_where_units_differ(solver):
    system = bad_scaling()
    options = {"max_steps": 300, "rtol": 1e-8} | ({"unroll": False} if solver is minres else {})
    made = diagonal_preconditioner(jnp.diag(jnp.asarray(system.matrix)))
    _, plain = solver(**options)(system.matvec, system.b)
    x, info = solver(**options, preconditioner=made)(system.matvec, system.b)
    assert info.converged
    np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-6)
    assert info.num_matvecs <= 20
    assert plain.num_matvecs >= 60


def test_adam_divides_as_optax_does():
    """One step of optax.adam from its state is the preconditioned mean of the gradients."""
    params = {"a": jnp.asarray([[1.0, -2.0]]), "b": jnp.asarray([0.5])}
    grads = {"a": jnp.asarray([[0.3, 4.0]]), "b": jnp.asarray([-1e-3])}
    optimiser = optax.scale_by_adam(b1=0.0, b2=0.9, eps=1e-4)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimiser.update(grads, optimiser.init(params))
    corrected = jax.tree.map(lambda nu: nu / 0.1, state.nu)
    made = adam_preconditioner(corrected, eps=1e-4)(grads)
    for name in params:
        np.testing.assert_allclose(made[name], updates[name], rtol=1e-12)


def test_all_are_pytrees_that_pass_jit_and_scan():
    system = spd()

    @jax.jit
    def solve(preconditioner, b):
        return cg(max_steps=20, rtol=1e-10, preconditioner=preconditioner)(system.matvec, b)[0]

    for made in (
        nystrom_preconditioner(system.matvec, system.b, 4, damping=0.1, key=KEY),
        diagonal_preconditioner(jnp.diag(jnp.asarray(system.matrix))),
        adam_preconditioner(system.b**2),
    ):
        np.testing.assert_allclose(solve(made, system.b), system.solution, rtol=1e-8)
        carried, _ = jax.lax.scan(lambda carry, _: (carry, carry(system.b)), made, length=2)
        np.testing.assert_allclose(carried(system.b), made(system.b), rtol=1e-14)


def test_precision_and_structure_are_those_of_the_right_hand_side():
    diagonal = {"a": jnp.asarray([2.0, 4.0], jnp.float32), "b": jnp.asarray([[0.5]], jnp.float32)}
    r = jax.tree.map(lambda d: jnp.ones_like(d).astype(jnp.bfloat16), diagonal)
    for made in (
        diagonal_preconditioner(diagonal),
        adam_preconditioner(jax.tree.map(lambda d: d**2, diagonal), eps=0.0),
        nystrom_preconditioner(
            lambda x: jax.tree.map(lambda d, a: (d * a.astype(d.dtype)).astype(a.dtype), diagonal, x),
            jax.tree.map(lambda leaf: leaf.astype(jnp.float32), r),
            3,
            damping=0.0,
            key=KEY,
        ),
    ):
        answer = made(r)
        assert jax.tree.structure(answer) == jax.tree.structure(r)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(answer))
        np.testing.assert_allclose(answer["a"].astype(jnp.float32), [0.5, 0.25], rtol=1e-2)
        np.testing.assert_allclose(answer["b"].astype(jnp.float32), [[2.0]], rtol=1e-2)


def test_stays_positive_and_finite_on_diagonals_that_are_not():
    made = diagonal_preconditioner(jnp.asarray([1.0, -2.0, 0.0]))
    values = np.diag(as_matrix(made, 3))
    np.testing.assert_allclose(values[:2], [1.0, 0.5], rtol=1e-14)
    assert np.all(values > 0)
    assert np.all(np.isfinite(values))
    zero = diagonal_preconditioner(jnp.zeros(3))
    assert np.all(np.isfinite(zero(jnp.ones(3))))
    nothing = nystrom_preconditioner(lambda x: 0.0 * x, jnp.ones(3), 2, damping=0.0, key=KEY)
    np.testing.assert_allclose(as_matrix(nothing, 3), np.eye(3), rtol=1e-12, atol=1e-12)


def test_under_vmap_each_has_its_own():
    system = spd()
    keys = jax.random.split(KEY, 3)

    def apply(key):
        return nystrom_preconditioner(system.matvec, system.b, 3, damping=0.1, key=key)(system.b)

    together = jax.vmap(apply)(keys)
    for index in range(3):
        np.testing.assert_allclose(together[index], apply(keys[index]), rtol=1e-10)


def test_refuses_what_it_cannot_use():
    system = spd()
    with pytest.raises(TypeError, match="typed PRNG key"):
        nystrom_preconditioner(system.matvec, system.b, 3, damping=0.1, key=jax.random.PRNGKey(0))
    with pytest.raises(TypeError, match="typed PRNG key"):
        nystrom_preconditioner(system.matvec, system.b, 3, damping=0.1, key=None)
    with pytest.raises(ValueError, match="rank"):
        nystrom_preconditioner(system.matvec, system.b, 0, damping=0.1, key=KEY)
    with pytest.raises(ValueError, match="damping"):
        nystrom_preconditioner(system.matvec, system.b, 2, damping=-0.1, key=KEY)
    with pytest.raises(TypeError, match="diagonal"):
        diagonal_preconditioner(jnp.arange(3))
    with pytest.raises(ValueError, match="no leaves"):
        diagonal_preconditioner({})
    with pytest.raises(ValueError, match="eps"):
        adam_preconditioner(jnp.ones(3), eps=-1.0)
    with pytest.raises(ValueError, match="the diagonal"):
        diagonal_preconditioner(jnp.ones(3))(jnp.ones(4))
