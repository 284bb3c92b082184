"""Stacks of mini-batches as the lower level's batch, and Neumann series with a fresh one per term."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax import BilevelProblem, cg, dense, implicit, neumann
from tests.helpers.bilevel_problems import flat_array, ridge, split, weighted_least_squares
from tests.helpers.look_ahead import Point, run

PARTS = 4


def estimate(estimator, solved, **options):
    """The estimator, compiled."""
    return run(estimator, Point(*solved[:5]), **options)


def stacked(solved, parts=PARTS):
    """The same problem with its inner batch cut into mini-batches of one size."""
    cut = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), solved.inner_batch)
    return solved._replace(inner_batch=cut)


def hessians(solved, parts=PARTS):
    """Those of the mini-batches."""
    inputs = np.asarray(stacked(solved, parts).inner_batch[0])
    return [x.T @ x / len(x) + np.diag(np.exp(np.asarray(solved.meta))) for x in inputs]


@pytest.mark.parametrize("kind", ["inner", "update_field"])
@pytest.mark.parametrize(
    "solver",
    [dense(), pytest.param(cg(max_steps=20, rtol=1e-12, unroll=False), marks=pytest.mark.slow)],
    ids=["dense", "cg"],
)
def test_a_stack_is_its_mean(kind, solver):
    solved = ridge()
    lower = solved.problem.inner if kind == "inner" else jax.grad(solved.problem.inner)
    problem = BilevelProblem(**{kind: lower}, outer=solved.problem.outer, symmetric=True)
    grad, info = estimate(implicit(solver, batches="stacked"), stacked(solved._replace(problem=problem)))
    np.testing.assert_allclose(grad, solved.hypergradient, rtol=1e-9)
    assert info.relative_residual < 1e-10
    with_aux = BilevelProblem(
        **{kind: lambda p, m, b: (lower(p, m, b), {"metric": 1.0})},
        outer=lambda p, m, b: (solved.problem.outer(p, m, b), 3),
        has_aux=True,
        symmetric=True,
    )
    again, info = estimate(implicit(solver, batches="stacked"), stacked(solved._replace(problem=with_aux)))
    np.testing.assert_allclose(again, grad, rtol=1e-12)
    assert info.aux == 3


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("damping", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_every_term_multiplies_with_its_own_mini_batch(start, damping):
    solved, step, terms = ridge(), 0.2, 6
    matrices, v = hessians(solved), solved.outer_gradient
    guess = np.linspace(-1, 1, 6) if start else None
    x, order = (guess, range(terms + 1)) if start else (step * v, range(terms))
    for index in order:
        x = x + step * (v - matrices[index % PARTS] @ x - damping * x)
    solver = neumann(terms, step, damping=damping, fresh_batches=True)
    options = {"init": split(guess)} if start else {}
    _, info = estimate(implicit(solver, batches="stacked"), stacked(solved), **options)
    np.testing.assert_allclose(flat_array(info.solution), x, rtol=1e-10)
    left = v - solved.jacobian @ x
    np.testing.assert_allclose(info.relative_residual, np.linalg.norm(left) / np.linalg.norm(v), rtol=1e-9)
    assert info.num_matvecs == len(order) + 1


def test_its_mean_over_all_orders_is_near_the_series_of_the_mean():
    """Exactly so for independent draws; here over all sequences of mini-batches of length 3."""
    solved, step, parts = ridge(), 0.2, 3
    solved = solved._replace(inner_batch=jax.tree.map(lambda leaf: leaf[:18], solved.inner_batch))
    mean_matrix = sum(hessians(solved, parts)) / parts
    cut = stacked(solved, parts)
    estimator = implicit(neumann(3, step, fresh_batches=True), batches="stacked")

    @jax.jit
    def solution(order):
        batch = jax.tree.map(lambda leaf: leaf[order], cut.inner_batch)
        return estimator(cut.problem, cut.params, cut.meta, batch, cut.outer_batch)[1].solution

    orders = jnp.asarray(list(itertools.product(range(parts), repeat=3)), jnp.int32)
    solutions = [flat_array(solution(order)) for order in orders]
    x = step * solved.outer_gradient
    for _ in range(3):
        x = x + step * (solved.outer_gradient - mean_matrix @ x)
    np.testing.assert_allclose(np.mean(solutions, axis=0), x, rtol=1e-10)
    assert np.std(solutions, axis=0).max() > 1e-3


def test_equal_mini_batches_are_the_plain_series_with_its_automatic_step():
    solved = ridge()
    same = solved._replace(inner_batch=jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), solved.inner_batch))
    _, info = estimate(implicit(neumann(400, fresh_batches=True), batches="stacked"), same)
    np.testing.assert_allclose(flat_array(info.solution), solved.solution, rtol=1e-6)
    assert info.converged


@pytest.mark.parametrize(
    "step", [pytest.param(1e3, marks=pytest.mark.slow), pytest.param(1e20, marks=pytest.mark.slow), None]
)
def test_answers_are_finite_whatever_the_step(step):
    for solved in (ridge(), ridge(scale=1e-30), ridge(scale=1e30)):
        grad, info = estimate(implicit(neumann(50, step, fresh_batches=True), batches="stacked"), stacked(solved))
        assert np.all(np.isfinite(grad))
        assert np.isfinite(info.relative_residual)
        assert info.converged == (info.relative_residual <= 1e-3)


def test_under_jit_and_with_loops_the_numbers_are_the_same():
    solved = stacked(ridge())
    wanted, _ = estimate(implicit(neumann(6, 0.2, fresh_batches=True), batches="stacked"), solved)
    estimator = implicit(neumann(6, 0.2, fresh_batches=True, unroll=1), batches="stacked")
    found, _ = jax.jit(lambda p, b: estimate(estimator, solved._replace(params=p, inner_batch=b)))(
        solved.params, solved.inner_batch
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_what_does_not_fit_is_refused():
    solved = weighted_least_squares()
    with pytest.raises(ValueError, match="stacked"):
        estimate(implicit(neumann(3, fresh_batches=True)), solved)
    ragged = (jnp.ones((3, 2)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="mini-batches"):
        estimate(implicit(dense(), batches="stacked"), solved._replace(inner_batch=ragged))
    with pytest.raises(ValueError, match="mini-batches"):
        estimate(implicit(dense(), batches="stacked"), solved._replace(inner_batch=None))
    with pytest.raises(ValueError, match="batches"):
        implicit(dense(), batches="fresh")
