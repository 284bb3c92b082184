"""Every solver and estimator against the dense solve, differences of the re-solved problem, and long unrolling.

Norms of differences, relative, below 1e-8 wherever the mathematics says that two routes lead to the same number.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from auxjax import bicgstab, cg, dense, gmres, identity, implicit, minres, neumann, normal_cg, nystrom
from auxjax.hypergrad import finite_difference, one_step, unrolled
from auxjax.solvers.preconditioners import diagonal_preconditioner, nystrom_preconditioner
from tests.helpers.bilevel_problems import (
    flat_array,
    flatten,
    module_scaled_field,
    ridge,
    split,
    true_residual,
    weighted_least_squares,
)
from tests.helpers.fixed_points import as_field, five_point_differences, logistic, newton_step, two_modules
from tests.helpers.look_ahead import run

TOLERANCE = 1e-8
SYMMETRIC = {
    "ridge": lambda: ridge(explicit=0.3),
    "ridge as a field": lambda: as_field(ridge(explicit=0.3)),
    "example weights": weighted_least_squares,
    "scheduler": lambda: weighted_least_squares(scheduler=True),
    "logistic": logistic,
}
OTHERS = {"scaled variables": module_scaled_field, "scaled modules": two_modules}
PROBLEMS = SYMMETRIC | OTHERS


@functools.cache
def problem_of(name):
    return PROBLEMS[name]()


def sketch(solved):
    """A Nystrom preconditioner of half the size."""
    matrix = jnp.asarray(solved.jacobian)

    def matvec(x):
        return split(matrix @ flatten(x))

    return nystrom_preconditioner(matvec, solved.params, 3, damping=0.0, key=jax.random.key(3))


def jacobi(solved):
    return diagonal_preconditioner(split(np.diag(solved.jacobian)))


EXACT = {"max_steps": 60, "rtol": 1e-12}
# name: (solver for a problem, whether J must be symmetric, the problem of the quick tests)
SOLVERS = {
    "dense": (lambda s: dense(rtol=1e-10), False, "scaled variables"),
    "neumann": (lambda s: neumann(1000, rtol=1e-10), False, "scaled variables"),
    "neumann, step by hand": (
        lambda s: neumann(1000, 1 / np.linalg.norm(s.jacobian, 2), rtol=1e-10),
        False,
        "example weights",
    ),
    "cg": (lambda s: cg(**EXACT), True, "logistic"),
    "cg, written out": (lambda s: cg(max_steps=7, rtol=1e-10), True, "ridge"),
    "cg, diagonal": (lambda s: cg(**EXACT, preconditioner=jacobi(s)), True, "scheduler"),
    "cg, sketch": (lambda s: cg(**EXACT, preconditioner=sketch(s)), True, "ridge as a field"),
    "normal_cg": (lambda s: normal_cg(max_steps=60, rtol=1e-11), False, "scaled variables"),
    "gmres": (lambda s: gmres(**EXACT), False, "scaled variables"),
    "gmres, restarted": (lambda s: gmres(max_steps=200, rtol=1e-11, restart=4), False, "scaled variables"),
    "gmres, diagonal": (lambda s: gmres(**EXACT, preconditioner=jacobi(s)), False, "scaled variables"),
    "bicgstab": (lambda s: bicgstab(**EXACT), False, "scaled modules"),
    "minres": (lambda s: minres(**EXACT), True, "logistic"),
    "minres, diagonal": (lambda s: minres(**EXACT, preconditioner=jacobi(s)), True, "example weights"),
    "nystrom": (lambda s: nystrom(6, damping=1e-11, rtol=1e-8), True, "logistic"),
}
QUICK = {"cg", "normal_cg", "gmres", "bicgstab", "minres", "nystrom", "neumann", "dense"}


def error(came, wanted) -> float:
    came = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(came)])
    return np.linalg.norm(came - wanted) / np.linalg.norm(wanted)


def pairs(fitting):
    """(solver, problem) for which the solver is made, or for which it is not."""
    found = []
    for name, (_, needs_symmetry, quick) in SOLVERS.items():
        for problem in PROBLEMS:
            fits = not needs_symmetry or problem in SYMMETRIC
            if fits == fitting:
                at_once = name in QUICK and (problem == quick if fits else problem == "scaled variables")
                marks = () if at_once else pytest.mark.slow
                found.append(pytest.param(name, problem, marks=marks, id=f"{name}-{problem}"))
    return found


@pytest.mark.parametrize(
    "problem", [pytest.param(name, marks=[pytest.mark.slow] * (name == "scaled modules")) for name in PROBLEMS]
)
def test_closed_form_dense_solve_and_differences_of_the_re_solved_problem(problem):
    solved = problem_of(problem)
    grad, info = run(implicit(dense(rtol=1e-10)), solved)
    assert error(five_point_differences(solved), solved.hypergradient) < TOLERANCE
    assert error(grad, solved.hypergradient) < 1e-11
    assert error(flat_array(info.solution), solved.solution) < 1e-11
    assert info.converged
    assert info.inner_grad_norm < 1e-13


@pytest.mark.parametrize(("name", "problem"), pairs(True))
def test_solvers_agree_where_they_converge(name, problem):
    solved = problem_of(problem)
    grad, info = run(implicit(SOLVERS[name][0](solved)), solved, key=jax.random.key(1))
    assert info.converged
    assert error(grad, solved.hypergradient) < TOLERANCE
    assert error(flat_array(info.solution), solved.solution) < TOLERANCE
    np.testing.assert_allclose(info.relative_residual, true_residual(solved, info.solution), rtol=1e-6, atol=1e-13)


def of_a_plain_function(solver):
    """The solver, without what the operator says about itself."""
    return lambda matvec, b, **options: solver(lambda x: matvec(x), b, **options)


@pytest.mark.parametrize(("name", "problem"), pairs(False))
def test_solvers_for_symmetric_matrices_report_that_they_fail_on_others(name, problem):
    """Refused as an update field. Where nobody says so the answer is wrong; it is finite, `converged` is False, and the
    residual is that of the dense Jacobian."""
    solved = problem_of(problem)
    solver = SOLVERS[name][0](solved)
    with pytest.raises(ValueError, match="expected a symmetric matrix"):
        run(implicit(solver), solved, key=jax.random.key(1))
    grad, info = run(implicit(of_a_plain_function(solver)), solved, key=jax.random.key(1))
    assert not info.converged
    assert error(grad, solved.hypergradient) > TOLERANCE
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grad))
    np.testing.assert_allclose(info.relative_residual, true_residual(solved, info.solution), rtol=1e-8)


@pytest.mark.parametrize("problem", ["ridge", pytest.param("scaled modules", marks=pytest.mark.slow)])
def test_the_identity_is_no_inverse_and_says_so(problem):
    solved = problem_of(problem)
    _, info = run(implicit(identity(scale=0.3)), solved)
    assert not info.converged
    np.testing.assert_allclose(info.relative_residual, true_residual(solved, info.solution), rtol=1e-10)


def away_from(solved, distance):
    """The same problem, the params that many units away from the solution."""
    direction = np.random.default_rng(7).normal(size=6)
    moved = flat_array(solved.params) + distance * direction / np.linalg.norm(direction)
    return solved._replace(params=split(moved))


UNROLLINGS = {
    "reverse": {},
    "forward": {"mode": "forward"},
    "truncated": {"truncate": 600},
    "keeping all": {"remat": False},
    "truncated, forward": {"mode": "forward", "truncate": 600},
}


def unrollings():
    found = []
    for name in UNROLLINGS:
        for problem in PROBLEMS:
            at_once = (name, problem) in {("reverse", "scaled modules"), ("truncated", "logistic")}
            marks = () if at_once else pytest.mark.slow
            found.append(pytest.param(name, problem, marks=marks, id=f"{name}-{problem}"))
    return found


@pytest.mark.parametrize(("name", "problem"), unrollings())
def test_long_unrolling_from_elsewhere_agrees(name, problem):
    """The training loop finds the fixed point by itself, and its derivative there is the implicit one."""
    solved = problem_of(problem)
    step = 1 / np.linalg.norm(solved.jacobian, 2)
    estimator = unrolled(900, step, unroll=1, rtol=1e-8, **UNROLLINGS[name])
    grad, info = run(estimator, away_from(solved, 0.5))
    assert error(grad, solved.hypergradient) < TOLERANCE
    assert info.inner_grad_norm < 1e-9
    if "forward" not in name:
        assert error(flat_array(info.solution), solved.solution) < TOLERANCE
        assert info.converged


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["ridge", "scaled modules"])
@pytest.mark.parametrize("momentum", [0.5, 0.8])
def test_long_unrolling_with_momentum_agrees(problem, momentum):
    solved = problem_of(problem)
    optimizer = optax.sgd(0.5 / np.linalg.norm(solved.jacobian, 2), momentum=momentum)
    grad, _ = run(unrolled(900, optimizer, unroll=1), away_from(solved, 0.3))
    assert error(grad, solved.hypergradient) < TOLERANCE


@pytest.mark.parametrize("problem", PROBLEMS)
def test_one_newton_step_ahead_is_implicit_differentiation(problem):
    """With -J^{-1} g as the update, u = J^{-T} v."""
    solved = problem_of(problem)
    estimator = one_step(newton_step(solved.jacobian), rtol=1e-10)
    grad, info = run(estimator, solved)
    assert error(grad, solved.hypergradient) < TOLERANCE
    assert info.converged


@pytest.mark.parametrize("problem", ["ridge", "example weights", "logistic"])
def test_differences_along_a_newton_step_are_implicit_differentiation(problem):
    """Exact in the displacement where the inner loss is quadratic; else with an error of its square."""
    solved = problem_of(problem)
    optimizer = newton_step(solved.jacobian)
    grad, info = run(finite_difference(optimizer, epsilon=2e-5, rtol=1e-8), solved)
    assert error(grad, solved.hypergradient) < TOLERANCE
    assert info.converged
