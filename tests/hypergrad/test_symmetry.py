"""Who says that a system is symmetric: a loss is, an update field is not unless the problem says so."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from auxjax import BilevelProblem, amortise, cg, dense, gauss_newton, implicit, minres, nystrom, warm_started
from auxjax.hypergrad import fisher, optimizer_field, optimizer_fixed_point
from auxjax.hypergrad.fixed_point import OptimizerPoint
from auxjax.solvers import nystrom_preparation
from auxjax.solvers.base import Operator
from tests.helpers.bilevel_problems import module_scaled_field, ridge
from tests.helpers.fixed_points import as_field
from tests.helpers.look_ahead import run

KEY = jax.random.key(2)
SOLVERS = {"cg": cg(max_steps=2), "minres": minres(max_steps=2), "nystrom": nystrom(2, damping=0.1)}
REFUSED = "expected a symmetric matrix, got one with symmetric=False.*gmres"


def stacked(solved):
    cut = jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), solved.inner_batch)
    return solved._replace(inner_batch=cut)


def seen(solved, **options):
    """The operator that a solver gets."""
    found = []

    def solver(matvec, b, *, init=None, key=None):
        found.append(matvec)
        return dense()(matvec, b)

    run(implicit(solver, **options), solved)
    return found[0]


@pytest.mark.check
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("batches", ["same", "stacked"])
def test_update_fields_are_refused(name, batches):
    solved = ridge()
    field = dataclasses.replace(as_field(solved).problem, symmetric=False)
    solved = solved._replace(problem=field)
    with pytest.raises(ValueError, match=f"{name}.*{REFUSED}"):
        run(implicit(SOLVERS[name], batches=batches), stacked(solved) if batches == "stacked" else solved, key=KEY)


def test_estimators_with_state_refuse_them_as_well():
    solved = module_scaled_field()
    point = solved[:5]
    carried = warm_started(implicit(cg()))
    with pytest.raises(ValueError, match=REFUSED):
        carried.update(*point, carried.init(*point))
    carried = amortise(cg())
    with pytest.raises(ValueError, match=REFUSED):
        carried.update(*point, carried.init(*point))
    sketching = amortise(lambda sketch: cg(preconditioner=sketch), prepare=nystrom_preparation(2, damping=0.1))
    with pytest.raises(ValueError, match=REFUSED):
        sketching.init(*point, key=KEY)


@pytest.mark.slow
@pytest.mark.parametrize("batches", ["same", pytest.param("stacked", marks=pytest.mark.slow)])
def test_a_field_that_is_said_to_be_a_gradient_is_taken(batches):
    solved = ridge(explicit=0.3)
    found = [
        run(implicit(cg(max_steps=30, rtol=1e-12), batches=batches), stacked(s) if batches == "stacked" else s)[0]
        for s in (solved, as_field(solved))
    ]
    np.testing.assert_allclose(found[1], solved.hypergradient, rtol=1e-9)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-10)


@pytest.mark.parametrize("batches", ["same", "stacked"])
def test_every_operator_says_what_is_known(batches):
    plain = ridge()
    field = dataclasses.replace(as_field(plain).problem, symmetric=False)
    for solved, symmetric in ((plain, True), (as_field(plain), True), (plain._replace(problem=field), False)):
        if batches == "stacked":
            solved = stacked(solved)
        operator = seen(solved, batches=batches)
        assert operator.symmetric is symmetric
        assert (operator.entry is not None) == (batches == "stacked")


def test_the_optimisers_fixed_point_is_not_that_of_a_gradient():
    solved = as_field(ridge())
    assert not optimizer_field(solved.problem, 0.1).symmetric
    joint = optimizer_fixed_point(solved.problem, 0.1)
    assert not joint.symmetric
    with pytest.raises(ValueError, match=REFUSED):
        run(implicit(cg()), solved._replace(problem=joint, params=OptimizerPoint(solved.params, optax.EmptyState())))


def squared_errors(params, meta, batch):
    return (batch[0] @ params - batch[1]) ** 2


@pytest.mark.slow
def test_given_curvatures_are_symmetric_and_others_are_asked():
    x, y = jax.random.normal(KEY, (8, 3)), jnp.ones(8)
    problem = BilevelProblem(
        update_field=lambda w, m, b: jax.grad(lambda p: jnp.mean(squared_errors(p, m, b)))(w) + m * w,
        outer=lambda w, m, b: jnp.sum(w**2),
    )
    point = (problem, jnp.ones(3), jnp.array(0.1), (x, y), None)
    for curvature in (
        gauss_newton(lambda w, m, b: b[0] @ w, lambda z, w, m, b: jnp.mean((z - b[1]) ** 2)),
        fisher(squared_errors, lambda losses, w, m, b: jnp.mean(losses)),
        lambda level, batch: lambda u: u,
    ):
        implicit(cg(damping=0.1), curvature=curvature)(*point)
        carried = amortise(cg(damping=0.1), curvature=curvature)
        carried.update(*point, carried.init(*point))
    with pytest.raises(ValueError, match=REFUSED):
        implicit(cg(), curvature=lambda level, batch: Operator(lambda u: u, symmetric=False))(*point)


def test_the_option_is_a_bool():
    with pytest.raises(TypeError, match=r"symmetric=.*expected True or False, got str"):
        BilevelProblem(inner=squared_errors, outer=squared_errors, symmetric="yes")
