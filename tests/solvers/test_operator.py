"""What an operator says about itself, and which solvers listen: symmetry, and the transposed product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax.solvers import (
    bicgstab,
    cg,
    dense,
    gmres,
    identity,
    minres,
    neumann,
    normal_cg,
    nystrom,
    nystrom_preconditioner,
    nystrom_preparation,
)
from auxjax.solvers.base import Operator
from auxjax.solvers.galerkin import galerkin
from tests.helpers.linear_systems import nonsymmetric, spd

KEY = jax.random.key(0)


def prepared(matvec, b, **options):
    return nystrom_preparation(3, damping=0.1)(matvec, b, None, KEY)


def preconditioner(matvec, b, **options):
    return nystrom_preconditioner(matvec, b, 3, damping=0.1, key=KEY)


NEED_SYMMETRY = {
    "cg": cg(),
    "minres": minres(),
    "nystrom": nystrom(4, damping=0.1),
    "nystrom_preconditioner": preconditioner,
    "nystrom_preparation": prepared,
}
TAKE_ANY = {
    "gmres": gmres(),
    "bicgstab": bicgstab(max_steps=2),
    "normal_cg": normal_cg(max_steps=2),
    "dense": dense(),
    "neumann": neumann(2),
    "identity": identity(),
    "galerkin": lambda matvec, b, key: galerkin(matvec, b, [b]),
}


@pytest.mark.check
@pytest.mark.parametrize("name", NEED_SYMMETRY)
def test_a_matrix_known_not_to_be_symmetric_is_refused_before_any_product(name):
    def never(x):
        raise AssertionError("a product")

    system = nonsymmetric()
    with pytest.raises(
        ValueError,
        match=f"{name.removesuffix('_preparation')}.*expected a symmetric matrix, got .*; use gmres, bicgstab",
    ) as caught:
        NEED_SYMMETRY[name](Operator(never, symmetric=False), system.b, key=KEY)
    for alternative in ("gmres", "bicgstab", "normal_cg", "dense", "neumann"):
        assert alternative in str(caught.value)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("minres", "nystrom"))) for name in NEED_SYMMETRY]
)
def test_plain_functions_and_matrices_that_are_or_may_be_symmetric_pass(name):
    system = spd()
    plain = jax.tree.leaves(NEED_SYMMETRY[name](system.matvec, system.b, key=KEY))
    for symmetric in (True, None):
        operator = Operator(system.matvec, symmetric=symmetric)
        found = jax.tree.leaves(NEED_SYMMETRY[name](operator, system.b, key=KEY))
        for came, wanted in zip(found, plain, strict=True):
            np.testing.assert_array_equal(came, wanted)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "gmres")) for name in TAKE_ANY]
)
def test_the_other_solvers_take_any_matrix(name):
    system = nonsymmetric()
    found = TAKE_ANY[name](Operator(system.matvec, symmetric=False), system.b, key=KEY)
    x = found if name == "galerkin" else found[0]
    left = jnp.linalg.norm(system.b - system.matvec(x)) / jnp.linalg.norm(system.b)
    assert jnp.isfinite(left)
    if name != "galerkin":
        np.testing.assert_allclose(found[1].relative_residual, left, rtol=1e-6, atol=1e-12)


def replicated(transpose: bool):
    """Matrices of four replicas, whose mean is to be inverted, and their operator inside of `vmap`."""
    matrices = jnp.asarray(nonsymmetric().matrix)[None] + 0.1 * jax.random.normal(KEY, (4, 8, 8))

    def mean(product):
        return lambda x: jax.lax.pmean(product(x), "device")

    def operator(matrix):
        given = mean(lambda x: matrix.T @ x) if transpose else None
        return Operator(mean(lambda x: matrix @ x), averages=True, transpose=given)

    return matrices, operator


def test_normal_cg_needs_the_transpose_of_a_mean_over_replicas():
    matrices, operator = replicated(transpose=False)
    with pytest.raises(ValueError, match=r"transposed matrix.*transpose="):
        jax.vmap(lambda a: normal_cg()(operator(a), nonsymmetric().b)[0], axis_name="device")(matrices)


def test_normal_cg_and_its_derivative_use_the_transpose_that_is_given():
    matrices, operator = replicated(transpose=True)
    b, c = nonsymmetric().b, jnp.arange(8.0)
    solve = normal_cg(max_steps=60, rtol=1e-12)

    def run(matrix):
        x, info = solve(operator(matrix), b)
        return x, info, jax.grad(lambda right: jnp.vdot(c, solve(operator(matrix), right)[0]))(b)

    x, info, slope = jax.jit(jax.vmap(run, axis_name="device"))(matrices)
    mean = np.mean(matrices, axis=0)
    assert np.all(info.converged)
    np.testing.assert_allclose(x, np.tile(np.linalg.solve(mean, b), (4, 1)), rtol=1e-8)
    np.testing.assert_allclose(slope, np.tile(np.linalg.solve(mean.T, c), (4, 1)), rtol=1e-8)


def test_a_transpose_of_another_form_is_named():
    system = nonsymmetric()
    with pytest.raises(ValueError, match=r"transpose.*shape \(2,\)"):
        normal_cg()(Operator(system.matvec, transpose=lambda x: x[:2]), system.b)
