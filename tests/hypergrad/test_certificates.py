"""The report on a hypergradient is true: its residual and `converged`, for every solver, whatever goes wrong.

Quadratic lower levels with the matrix as data; what is reported is compared with NumPy in extended precision.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax import bicgstab, cg, dense, gmres, identity, implicit, minres, neumann, normal_cg, nystrom
from auxjax.hypergrad import finite_difference, one_step, unrolled
from tests.helpers.quadratics import FIELD, LOSS, compiled, flat, residual, with_spectrum

SIZE = 6
KEY = jax.random.key(5)
RTOL = 1e-6
V = np.random.default_rng(1).normal(size=SIZE)
POSITIVE = with_spectrum(np.geomspace(0.3, 3, SIZE))
SYMMETRIC = {
    "positive": (POSITIVE, V),
    "indefinite": (with_spectrum([-2.0, -0.3, 0.2, 0.7, 1.5, 3.0]), V),
    "negative": (-POSITIVE, V),
    "singular": (with_spectrum([0.0, 0.0, 0.5, 1.0, 2.0, 3.0]), V),
    "zero": (np.zeros((SIZE, SIZE)), V),
    "1e-30": (1e-30 * POSITIVE, V),
    "1e30": (1e30 * POSITIVE, V),
    "1e-30 and 1e30": (with_spectrum([1e-30, 1e-10, 1.0, 1.0, 1e10, 1e30]), V),
    "breakdown": (np.diag([1.0, -1.0] * 3), np.ones(SIZE)),  # <v, A v> = 0
    "no right-hand side": (POSITIVE, np.zeros(SIZE)),
}
SKEW = np.triu(np.ones((SIZE, SIZE)), 1)
OTHERS = {
    "not symmetric": (1.5 * np.eye(SIZE) + 0.3 * np.random.default_rng(3).normal(size=(SIZE, SIZE)), V),
    "rotation": (SKEW - SKEW.T, V),  # <x, A x> = 0 for every x
    "shift": (np.roll(np.eye(SIZE), 1, axis=0), np.eye(SIZE)[0]),  # nothing falls before the last step
    "nilpotent": (np.triu(np.ones((SIZE, SIZE)), 1), V),
}

# name: (factory, options when it is to converge, options with a fixed small count)
SOLVERS = {
    "dense": (dense, {}, {}),
    "identity": (identity, {"scale": 0.5}, {}),
    "neumann": (neumann, {"num_terms": 300}, {"num_terms": 2}),
    "neumann, step by hand": (neumann, {"num_terms": 300, "step_size": 0.3}, {"num_terms": 2, "step_size": 0.3}),
    "cg": (cg, {"max_steps": 40}, {"max_steps": 3}),
    "normal_cg": (normal_cg, {"max_steps": 60}, {"max_steps": 3}),
    "gmres": (gmres, {"max_steps": 40}, {"max_steps": 3}),
    "bicgstab": (bicgstab, {"max_steps": 40}, {"max_steps": 3}),
    "minres": (minres, {"max_steps": 40}, {"max_steps": 3}),
    "nystrom": (nystrom, {"rank": SIZE, "damping": 1e-9}, {"rank": 3, "damping": 1e-9}),
}
ANY_MATRIX = ("dense", "identity", "neumann", "neumann, step by hand", "normal_cg", "gmres", "bicgstab")


def slow_unless(quick, value):
    return pytest.param(value, marks=() if quick else pytest.mark.slow, id=str(value))


LOOK_AROUND = ("dense", "neumann", "neumann, step by hand", "gmres", "minres", "nystrom")
KINDS = [slow_unless(kind == "converge", kind) for kind in ("converge", "fixed", "damped")]


@functools.cache
def solver(name, kind, problem=LOSS):
    """One of the table's solvers behind `implicit`, compiled, and its damping."""
    factory, many, few = SOLVERS[name]
    options = dict(many if kind == "converge" else few)
    if kind == "damped" and name != "identity":
        options["damping"] = 0.4
    if kind == "fixed" and name not in ("dense", "identity", "nystrom"):
        options["rtol"] = 0.0
    else:
        options["rtol"] = RTOL
    return compiled(implicit(factory(**options)), problem, key=KEY), options.get("damping", 0.0), options["rtol"]


def check_report(grad, info, matrix, v, damping=0.0, rtol=RTOL):
    """The residual is the true one up to rounding, and `converged` says whether the damped system's is below rtol."""
    u = flat(info.solution)
    usable = np.all(np.isfinite(np.asarray(grad)))
    assert usable or not info.converged
    if not np.all(np.isfinite(u)):
        assert not info.converged
        assert not info.relative_residual <= rtol
        return
    if not np.any(v):
        assert info.relative_residual == 0
        assert info.converged
        return
    eps = float(np.finfo(v.dtype).eps)
    true = residual(matrix, v, u)
    if true > float(np.finfo(v.dtype).max):  # there is no such number in this precision
        assert not info.converged
        assert not np.isfinite(info.relative_residual)
        return
    # That of the product A^T u, which is what a residual can be known to.
    rounding = 20 * eps * (1 + residual(np.abs(matrix), 0 * v, np.abs(u), np.linalg.norm(v)))
    np.testing.assert_allclose(info.relative_residual, true, rtol=1e3 * eps, atol=rounding)
    solved = residual(matrix + damping * np.eye(len(v)), v, u)
    if abs(solved - rtol) > rounding + 1e-3 * rtol:
        assert info.converged == (solved < rtol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", [slow_unless(name not in ("normal_cg", "gmres", "bicgstab"), name) for name in SOLVERS]
)
def test_reports_are_true_on_symmetric_matrices(name, kind):
    call, damping, rtol = solver(name, kind)
    for matrix, v in SYMMETRIC.values():
        check_report(*call(matrix, v), matrix, v, damping, rtol)
    _, info = call(*SYMMETRIC["positive"])
    assert info.converged == (name == "dense" or (kind == "converge" and name != "identity"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [slow_unless(name in ("gmres", "bicgstab"), name) for name in ANY_MATRIX])
def test_reports_are_true_on_other_matrices(name, kind):
    call, damping, rtol = solver(name, kind, FIELD)
    for matrix, v in OTHERS.values():
        check_report(*call(matrix, v), matrix, v, damping, rtol)


@pytest.mark.parametrize("name", SOLVERS)
def test_negative_curvature_is_reported(name):
    """By every solver where it is negative along the solution; on a saddle by those that look at other directions."""
    call, _, _ = solver(name, "converge")
    _, info = call(*SYMMETRIC["negative"])
    assert info.min_curvature < 0
    if name in LOOK_AROUND:
        _, info = call(*SYMMETRIC["indefinite"])
        assert info.min_curvature < 0


@pytest.mark.parametrize("precision", [np.float32, slow_unless(False, np.float64)])
@pytest.mark.parametrize("step", [slow_unless(False, 1e-12), slow_unless(False, 1e6), 1e30])
def test_absurd_steps_of_the_series_are_finite_and_reported(step, precision):
    call = compiled(implicit(neumann(12, step, unroll=1, rtol=RTOL)))
    for matrix, v in SYMMETRIC.values():
        matrix, v = matrix.astype(precision), v.astype(precision)
        grad, info = call(matrix, v)
        assert np.all(np.isfinite(grad))
        check_report(grad, info, matrix, v)


LOOK_AHEADS = {
    "one_step": lambda step: one_step(step, rtol=RTOL),
    "finite_difference": lambda step: finite_difference(step, rtol=RTOL),
    "unrolled": lambda step: unrolled(12, step, unroll=1, rtol=RTOL),
    "unrolled forward": lambda step: unrolled(12, step, mode="forward", unroll=1, rtol=RTOL),
}


@pytest.mark.parametrize("name", [slow_unless(name != "unrolled forward", name) for name in LOOK_AHEADS])
def test_absurd_steps_of_look_aheads_are_finite_or_reported(name):
    """And where u is finite the residual is the true one; forward mode knows no u and no residual."""

    @jax.jit
    def call(matrix, v, step):
        params = {"first": v[:4], "second": v[4:].reshape(1, -1)}
        return LOOK_AHEADS[name](step)(LOSS, params, v, (matrix, jnp.ones((), v.dtype)), v)

    for precision in (np.float32, np.float64):
        for step in (1e-12, 0.3, 1e6, 1e30):
            for matrix, v in SYMMETRIC.values():
                matrix, v = matrix.astype(precision), v.astype(precision)
                grad, info = call(jnp.asarray(matrix), jnp.asarray(v), jnp.asarray(step, precision))
                assert np.all(np.isfinite(grad)) or not info.converged
                if name == "unrolled forward":
                    assert not info.converged
                    assert np.isnan(info.relative_residual)
                elif name != "finite_difference":  # whose residual is a difference, too
                    check_report(grad, info, matrix, v)


# Solvers for the change of scale; a damping and a step by hand change with it.
SCALED = {
    "dense": lambda scale: dense(),
    "identity": lambda scale: identity(scale=0.5 / scale),
    "neumann": lambda scale: neumann(200, rtol=1e-4),
    "neumann, step by hand": lambda scale: neumann(200, 0.3 / scale, rtol=1e-4),
    "cg": lambda scale: cg(max_steps=40, rtol=0.05),
    "cg, written out": lambda scale: cg(max_steps=4, rtol=0.0),
    "cg, damped": lambda scale: cg(max_steps=40, rtol=0.05, damping=0.2 * scale),
    "normal_cg": lambda scale: normal_cg(max_steps=40, rtol=0.05),
    "gmres": lambda scale: gmres(max_steps=40, rtol=0.05),
    "bicgstab": lambda scale: bicgstab(max_steps=40, rtol=0.05),
    "minres": lambda scale: minres(max_steps=40, rtol=0.05),
    "nystrom": lambda scale: nystrom(4, damping=0.1 * scale),
}
DEPEND_ON_SCALE = ("identity", "neumann, step by hand", "cg, damped", "nystrom")
SCALED_ESTIMATORS = {
    "one_step": lambda scale: one_step(0.3 / scale),
    "finite_difference": lambda scale: finite_difference(0.3 / scale),
    "unrolled": lambda scale: unrolled(20, 0.3 / scale, unroll=1),
    "unrolled forward": lambda scale: unrolled(20, 0.3 / scale, mode="forward", unroll=1),
}


def distance(came, wanted) -> float:
    return np.linalg.norm(came - wanted) / max(np.linalg.norm(wanted), 1e-30)


def check_scale(make, depends):
    """Losses times 1e-6 and 1e6: the hypergradient is that many times larger, and nothing else changes."""
    matrix, v = POSITIVE.astype(np.float32), V.astype(np.float32)
    meta = np.linspace(-1, 1, SIZE, dtype=np.float32)
    plain = compiled(make(1.0), key=KEY)
    wanted, wanted_info = plain(matrix, v, 1.0, v, meta)
    assert wanted.dtype == jnp.float32
    for scale in (1e-6, 1e6):
        call = compiled(make(scale), key=KEY) if depends else plain
        grad, info = call(np.float32(scale) * matrix, np.float32(scale) * v, scale, v, meta)
        assert distance(grad / np.float32(scale), wanted) < 1e-4
        np.testing.assert_allclose(info.relative_residual, wanted_info.relative_residual, rtol=1e-3, atol=3e-6)
        assert distance(flat(info.solution), flat(wanted_info.solution)) < 1e-4
        assert info.converged == wanted_info.converged
        assert info.num_matvecs == wanted_info.num_matvecs
        np.testing.assert_allclose(info.min_curvature / scale, wanted_info.min_curvature, rtol=1e-3)


@pytest.mark.parametrize("name", [slow_unless(name in ("dense", "neumann", "cg"), name) for name in SCALED])
def test_the_scale_of_the_losses_is_only_a_scale_to_solvers(name, single_precision):
    check_scale(lambda scale: implicit(SCALED[name](scale)), name in DEPEND_ON_SCALE)


@pytest.mark.parametrize("name", [slow_unless(name == "one_step", name) for name in SCALED_ESTIMATORS])
def test_the_scale_of_the_losses_is_only_a_scale_to_estimators(name, single_precision):
    check_scale(SCALED_ESTIMATORS[name], True)
