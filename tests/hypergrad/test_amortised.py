import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax import BilevelProblem, amortise, cg, dense, implicit, neumann, single_loop, warm_started
from auxjax.solvers import nystrom_preparation, power_iteration
from tests.helpers.bilevel_problems import estimate, flat_array, ridge, split, weighted_least_squares

KEY = jax.random.key(0)


def arguments(solved, meta=None):
    return solved.problem, solved.params, solved.meta if meta is None else meta, solved.inner_batch, solved.outer_batch


def compiled(amortised, solved):
    """`state, key -> amortised.update(...)` at the solved point."""
    return jax.jit(lambda state, key=None: amortised.update(*arguments(solved), state, key=key))


def follow(amortised, solved, metas, key=KEY):
    """Updates along a path of `meta`, in one scan: gradients and reports."""
    state = amortised.init(*arguments(solved, metas[0]), key=key)

    def step(state, meta):
        gradient, info, state = amortised.update(*arguments(solved, meta), state, key=key)
        return state, (gradient, info)

    return jax.jit(lambda s, m: jax.lax.scan(step, s, m))(state, metas)


def path(solved, steps=5):
    """A few nearby points."""
    return jnp.stack([solved.meta + 0.01 * k for k in range(steps)])


@pytest.mark.parametrize(
    "amortised",
    [
        warm_started(implicit(cg(max_steps=30, rtol=1e-11, unroll=False))),
        pytest.param(amortise(cg(max_steps=30, rtol=1e-11, unroll=False)), marks=pytest.mark.slow),
        pytest.param(
            amortise(
                lambda sketch: cg(max_steps=30, rtol=1e-11, preconditioner=sketch, unroll=False),
                prepare=nystrom_preparation(4, damping=0.0),
                every=3,
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            amortise(lambda estimate: neumann(400, step_size=1 / estimate.bound), prepare=power_iteration()),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            amortise(cg(max_steps=30, rtol=1e-11, unroll=False), warm_start="project"), marks=pytest.mark.slow
        ),
    ],
    ids=["warm_started", "cg", "nystrom", "neumann", "projected"],
)
def test_converged_solvers_give_the_hypergradient_of_every_point(amortised):
    solved = ridge()
    metas = path(solved)
    _, (gradients, info) = follow(amortised, solved, metas)
    for gradient, meta in zip(gradients, metas, strict=True):
        alone, _ = estimate(implicit(dense()), solved._replace(meta=meta))
        np.testing.assert_allclose(gradient, alone, rtol=1e-8)
    assert np.all(info.relative_residual < 1e-9)


@pytest.mark.slow
def test_warm_starts_save_products():
    """And extrapolated ones, on a smooth path, more of them."""
    solved = ridge()
    spent = []
    for warm_start in (False, True, "extrapolate"):
        made = amortise(cg(max_steps=30, rtol=1e-3, unroll=False), warm_start=warm_start)
        _, (_, info) = follow(made, solved, path(solved, steps=8))
        assert np.all(info.converged)
        spent.append(int(np.sum(info.num_matvecs[2:])))
    assert spent[2] < spent[1] < spent[0]


@pytest.mark.slow
@pytest.mark.parametrize("damping", [pytest.param(0.0, marks=pytest.mark.slow), 0.01])
@pytest.mark.usefixtures("single_precision")
def test_projected_starts_save_more_products_than_they_cost_where_solves_are_long(damping):
    """In float32, along a path that bends: 40 params with curvatures from 1e-3 to 1."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    matrix = jnp.asarray((basis * np.geomspace(1e-3, 1, 40)) @ basis.T)
    targets = jnp.asarray(rng.standard_normal((3, 40)))
    problem = BilevelProblem(
        inner=lambda w, m, b: 0.5 * jnp.vdot(w, matrix @ w) - jnp.vdot(w, m),
        outer=lambda w, m, b: jnp.vdot(w, targets[0] + b * targets[1] + b**2 * targets[2]),
    )
    spent = []
    for warm_start in (False, True, "project"):
        solver = cg(max_steps=500, rtol=1e-4, damping=damping)
        made = amortise(solver, warm_start=warm_start, damping=damping)
        state = made.init(problem, jnp.zeros(40), jnp.zeros(40), None, 0.0)
        update = jax.jit(lambda b, state, made=made: made.update(problem, jnp.zeros(40), jnp.zeros(40), None, b, state))
        products = 0
        for t in range(12):
            _, info, state = update(0.02 * t, state)
            assert info.converged
            products += int(info.num_matvecs) if t > 2 else 0
        spent.append(products)
    assert spent[2] < 0.75 * spent[1] < spent[0], spent


def test_extrapolation_starts_from_the_last_change_once_more():
    solved = ridge()
    made = amortise(neumann(0, step_size=1e-9), warm_start="extrapolate")
    state = made.init(*arguments(solved))
    u0, u1 = jax.tree.map(jnp.ones_like, solved.params), jax.tree.map(lambda x: 3 * jnp.ones_like(x), solved.params)
    state = state._replace(solution=u1, changes=(jax.tree.map(jnp.subtract, u1, u0),), count=jnp.int32(2))
    _, info, after = made.update(*arguments(solved), state)
    np.testing.assert_allclose(flat_array(info.solution), np.full(6, 5.0), rtol=1e-6)
    np.testing.assert_allclose(flat_array(after.changes[0]), np.full(6, 2.0), rtol=1e-6)
    first = made.init(*arguments(solved))
    for _ in range(2):
        np.testing.assert_array_equal(flat_array(first.changes[0]), np.zeros(6))
        _, _, first = made.update(*arguments(solved), first)


def test_a_projected_start_is_the_galerkin_solution_among_the_last_solutions():
    solved = ridge()
    made = amortise(neumann(0, step_size=1e-9), warm_start="project", history=3)
    state = made.init(*arguments(solved))
    rng = np.random.default_rng(0)
    like = [jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), solved.params) for _ in range(3)]
    state = state._replace(solution=like[0], changes=tuple(like[1:]), count=jnp.int32(3))
    _, info, after = made.update(*arguments(solved), state)
    span = np.stack([flat_array(u) for u in like], axis=1)
    wanted = span @ np.linalg.solve(span.T @ solved.jacobian @ span, span.T @ solved.outer_gradient)
    np.testing.assert_allclose(flat_array(info.solution), wanted, rtol=1e-6)
    assert info.num_matvecs == 3 + 2
    moved = flat_array(info.solution) - flat_array(like[0])
    np.testing.assert_allclose(flat_array(after.changes[0]), moved, rtol=1e-12)
    np.testing.assert_array_equal(flat_array(after.changes[1]), flat_array(like[1]))


def test_from_the_first_step_on_a_projection_has_only_what_is_known():
    """Zero at first; then the last solution scaled, which for a right-hand side twice as large is the solution."""
    solved = ridge()
    made = amortise(cg(max_steps=30, rtol=1e-11, unroll=False), warm_start="project")
    _, info, state = made.update(*arguments(solved), made.init(*arguments(solved)))
    np.testing.assert_array_equal(flat_array(state.changes), np.zeros(12))
    twice = BilevelProblem(inner=solved.problem.inner, outer=lambda p, m, b: 2 * solved.problem.outer(p, m, b))
    _, info, _ = made.update(twice, *arguments(solved)[1:], state)
    assert info.converged
    assert info.num_matvecs == 3 + 2


@pytest.mark.slow
def test_the_preconditioner_is_made_anew_every_so_many_steps():
    solved = ridge()
    made = amortise(lambda sketch: cg(preconditioner=sketch), prepare=nystrom_preparation(3, damping=0.1), every=2)
    state = made.init(*arguments(solved), key=KEY)
    sketches, counts = [flat_array(state.prepared)], []
    update = compiled(made, solved)
    for number in range(5):
        _, _, state = update(state, jax.random.key(number + 1))
        sketches.append(flat_array(state.prepared))
        counts.append(int(state.count))
    changed = [not np.array_equal(a, b) for a, b in itertools.pairwise(sketches)]
    assert changed == [False, False, True, False, True]
    assert counts == [1, 2, 3, 4, 5]


def test_power_iteration_finds_the_largest_curvature_over_the_steps():
    solved = ridge()
    largest = np.linalg.eigvalsh(solved.jacobian)[-1]
    made = amortise(lambda estimate: neumann(3, 1 / estimate.bound), prepare=power_iteration(1, first_steps=2))
    state = made.init(*arguments(solved))
    start = abs(float(state.prepared.bound) - largest)
    update = compiled(made, solved)
    for _ in range(60):
        _, _, state = update(state)
    assert abs(float(state.prepared.bound) - largest) < 1e-6 * largest < start


def test_power_iteration_starts_again_from_the_right_hand_side():
    """After a zero matrix, a product that is not finite, or a vector that is not."""
    matrix, b = jnp.diag(jnp.asarray([1.0, 3.0])), jnp.asarray([1.0, 0.5])
    prepare = power_iteration(num_steps=40)
    for broken in (0.0, jnp.nan, jnp.inf):
        estimate_ = prepare(lambda x, broken=broken: broken * x, b, None, None)
        assert np.all(np.isfinite(estimate_.vector))
        assert estimate_.bound == 0
        again = prepare(lambda x: matrix @ x, b, estimate_, None)
        np.testing.assert_allclose(again.bound, 3.0, rtol=1e-6)
    lost = estimate_._replace(vector=jnp.full(2, jnp.nan))
    np.testing.assert_allclose(prepare(lambda x: matrix @ x, b, lost, None).bound, 3.0, rtol=1e-6)


@pytest.mark.parametrize("step_size", [0.2, None])
def test_single_loop_is_one_richardson_step_per_outer_step(step_size):
    solved = ridge()
    loop = single_loop(step_size)
    state = loop.init(*arguments(solved))
    u = np.zeros(6)
    largest = np.linalg.eigvalsh(solved.jacobian)[-1]
    update = compiled(loop, solved)
    for _ in range(60):
        _, info, state = update(state)
        step = step_size or 1 / float(state.prepared.bound)
        assert step_size or step >= 1 / largest - 1e-12
        u = u + step * (solved.outer_gradient - solved.jacobian @ u)
        np.testing.assert_allclose(flat_array(info.solution), u, rtol=1e-9)
        assert info.num_matvecs == 2
    assert info.relative_residual < 0.05


def test_single_loop_trains_params_solution_and_meta_together():
    """To the minimum of the outer loss over the solved lower level, which a quasi-Newton search finds as well."""
    from scipy.optimize import minimize

    solved = ridge(explicit=0.05)

    def outer_of(meta):
        return solved.outer_value(solved.solve_inner(meta), meta)

    smallest = minimize(outer_of, np.asarray(solved.meta), method="BFGS", tol=1e-8).fun
    loop = single_loop()
    state = loop.init(*arguments(solved))

    def step(carry, _):
        params, meta, state = carry
        slope = jax.grad(solved.problem.inner)(params, meta, solved.inner_batch)
        params = jax.tree.map(lambda p, g: p - 0.2 * g, params, slope)
        point = (solved.problem, params, meta, solved.inner_batch, solved.outer_batch)
        gradient, info, state = loop.update(*point, state)
        return (params, meta - gradient, state), info.relative_residual

    start = (jax.tree.map(jnp.zeros_like, solved.params), solved.meta, state)
    (_, meta, _), residuals = jax.jit(lambda s: jax.lax.scan(step, s, length=1500))(start)
    at_start = outer_of(np.asarray(solved.meta))
    assert outer_of(np.asarray(meta)) - smallest < 1e-3 * (at_start - smallest)
    assert residuals[-1] < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("warm_start", [pytest.param("extrapolate", marks=pytest.mark.slow), "project"])
def test_states_pass_checkpoints(tmp_path, warm_start):
    from auxjax.training import checkpoint

    solved = weighted_least_squares()
    prepare = nystrom_preparation(3, damping=0.1)
    made = amortise(lambda sketch: cg(preconditioner=sketch), prepare=prepare, every=2, warm_start=warm_start)
    state = made.init(*arguments(solved), key=KEY)
    update = compiled(made, solved)
    _, _, state = update(state, KEY)
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save(manager, 1, state)
    with checkpoint.open_checkpoints(tmp_path) as manager:
        restored = checkpoint.restore(manager, jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(restored.tree) == jax.tree.structure(state)
    again, wanted = update(restored.tree, KEY), update(state, KEY)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_where_no_curvature_is_met_nothing_raises_with_and_without_jit():
    problem = BilevelProblem(inner=lambda w, m, b: jnp.sum((w - m) ** 2), outer=lambda w, m, b: jnp.sum((w - 1.0) ** 2))
    carried = amortise(lambda estimate: neumann(3, step_size=1 / estimate.bound), prepare=power_iteration())
    for made in (single_loop(), carried):
        for w in (jnp.ones(3), jnp.full(3, jnp.nan)):
            point = (problem, w, w, None, None)
            state = made.init(*point)
            eager, info, _ = made.update(*point, state)
            compiled_, _, _ = jax.jit(lambda s, p=point, m=made: m.update(*p, s))(state)
            np.testing.assert_array_equal(eager, compiled_)
            assert np.all(np.isfinite(eager)) or np.isnan(w[0])
            assert info.converged == np.isfinite(w[0])


def test_a_state_of_another_history_is_refused():
    solved = ridge()
    state = amortise(cg(), warm_start="project", history=3).init(*arguments(solved))
    with pytest.raises(ValueError, match="keeps 4 changes of the solution and got a state with 2"):
        amortise(cg(), warm_start="project", history=5).update(*arguments(solved), state)


@pytest.mark.slow
def test_nothing_is_differentiated_through_a_projected_start():
    """The derivative of the hypergradient is the one with this start handed over as numbers."""
    solved = ridge()
    made = amortise(neumann(2, step_size=0.05), warm_start="project")
    state = made.init(*arguments(solved))
    for _ in range(3):
        _, _, state = compiled(made, solved)(state)
    _, _, after = made.update(*arguments(solved), state)
    start = galerkin_start(solved, state)

    def through(meta):
        return jnp.sum(made.update(*arguments(solved, meta), state)[0] ** 2)

    def held(meta):
        estimator = implicit(neumann(2, step_size=0.05))
        return jnp.sum(estimator(*arguments(solved, meta), init=start)[0] ** 2)

    assert after.count == 4
    np.testing.assert_allclose(jax.grad(through)(solved.meta), jax.grad(held)(solved.meta), rtol=1e-8)


def galerkin_start(solved, state):
    """Where a projected solve starts, as a pytree like the params."""
    known = np.stack([flat_array(u) for u in (state.solution, *state.changes)], axis=1)
    basis = np.linalg.svd(known / np.linalg.norm(known, axis=0), full_matrices=False)[0]
    start = basis @ np.linalg.solve(basis.T @ solved.jacobian @ basis, basis.T @ solved.outer_gradient)
    return split(jnp.asarray(start))


def test_what_does_not_fit_is_refused():
    solved = ridge()
    with pytest.raises(TypeError, match="solver"):
        amortise("cg")
    with pytest.raises(TypeError, match="prepare"):
        amortise(cg, prepare=3)
    with pytest.raises(ValueError, match="warm_start"):
        amortise(cg(), warm_start="last")
    with pytest.raises(ValueError, match="every"):
        amortise(cg(), every=0)
    with pytest.raises(ValueError, match="history"):
        amortise(cg(), warm_start="project", history=0)
    with pytest.raises(ValueError, match="damping"):
        amortise(cg(), damping=-1.0)
    with pytest.raises(TypeError, match="estimator"):
        warm_started(None)
    with pytest.raises(ValueError, match="num_steps"):
        power_iteration(0)
    with pytest.raises(TypeError, match="key"):
        amortise(cg()).init(*arguments(solved), key=jnp.zeros(2, jnp.uint32))
    with pytest.raises(ValueError, match="step_size"):
        single_loop(-1.0)
    with pytest.raises(ValueError, match="damping"):
        single_loop(damping=-1.0)
    with pytest.raises(TypeError, match="BilevelProblem"):
        warm_started(implicit(dense())).init(*(None, *arguments(solved)[1:]))
    assert isinstance(solved.problem, BilevelProblem)
