"""The initial guess of an iterative solver: the solution does not depend on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax import bicgstab, cg, gmres, minres, neumann, normal_cg
from tests.helpers.linear_systems import spd

SOLVERS = {"cg": cg, "minres": minres, "gmres": gmres, "bicgstab": bicgstab, "normal_cg": normal_cg}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "cg")) for name in SOLVERS])
def test_the_derivative_in_the_guess_is_zero(name):
    """With and without one in the right-hand side, and that in one leaf of the right-hand side alone."""
    diagonal = jnp.array([1.0, 2.0, 3.0])
    looped = {"unroll": False} if name in ("cg", "minres", "gmres") else {}
    solve = SOLVERS[name](max_steps=3, rtol=0.0, **looped)

    def total(one, two, start):
        x, _ = solve(
            lambda v: {"one": diagonal * v["one"], "two": 2.0 * v["two"]}, {"one": one, "two": two}, init=start
        )
        return jnp.sum(x["one"]) + jnp.sum(x["two"])

    @jax.jit
    def slopes(one, two, start):
        both = jax.grad(total, argnums=(0, 2))(one, two, start)
        return both, jax.grad(total, argnums=2)(one, two, start), jax.grad(total)(one, two, start)

    start = {"one": jnp.array([1.0, 0.0, 2.0]), "two": jnp.ones(1)}
    (in_one, in_guess), in_guess_alone, in_one_alone = slopes(jnp.ones(3), jnp.ones(1), start)
    for leaf in jax.tree.leaves((in_guess, in_guess_alone)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
    for found in (in_one, in_one_alone):
        np.testing.assert_allclose(found, [1, 1 / 2, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize("solve", [cg(unroll=False), neumann(5, 0.2, unroll=1)])
def test_a_guess_that_is_not_finite_is_none(solve):
    """What a bad batch left in a carried solution must not stay there."""
    system = spd()
    x, info = solve(system.matvec, system.b, init=jnp.full_like(system.b, jnp.nan))
    zero, _ = solve(system.matvec, system.b, init=jnp.zeros_like(system.b))
    np.testing.assert_array_equal(x, zero)
    assert np.isfinite(info.relative_residual)
