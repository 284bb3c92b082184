import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax import BilevelProblem, cg, dense, gauss_newton, identity, implicit, neumann, normal_cg
from tests.helpers.bilevel_problems import (
    estimate,
    finite_difference_of_solved,
    flat_array,
    flatten,
    module_scaled_field,
    ridge,
    split,
    true_residual,
    weighted_least_squares,
)
from tests.helpers.fixed_points import as_field

PROBLEMS = {
    "ridge": ridge,
    "ridge with one regulariser": lambda: ridge(scalar=True),
    "ridge with an explicit term": lambda: ridge(explicit=0.3),
    "module-scaled field": module_scaled_field,
    "example weights": weighted_least_squares,
    "scheduler": lambda: weighted_least_squares(scheduler=True),
}


@pytest.fixture(params=PROBLEMS)
def solved(request):
    return PROBLEMS[request.param]()


def quick_for(*names):
    """Every problem, the others in slow tests: `test_dense_is_the_closed_form` has them all at once."""
    cases = [pytest.param(name, marks=[pytest.mark.slow] * (name not in names)) for name in PROBLEMS]
    return pytest.mark.parametrize("solved", cases, indirect=True)


def run(solver, solved, **options):
    """The estimator, compiled."""

    def call(params, meta, inner_batch, outer_batch):
        return implicit(solver)(solved.problem, params, meta, inner_batch, outer_batch, **options)

    return jax.jit(call)(solved.params, solved.meta, solved.inner_batch, solved.outer_batch)


def test_dense_is_the_closed_form(solved):
    grad, info = run(dense(), solved)
    np.testing.assert_allclose(np.ravel(grad), solved.hypergradient, rtol=1e-10)
    np.testing.assert_allclose(flat_array(info.solution), solved.solution, rtol=1e-10)
    assert grad.shape == solved.meta.shape
    assert info.converged
    assert info.relative_residual < 1e-12
    assert info.inner_grad_norm < 1e-12


@quick_for("ridge", "module-scaled field", "scheduler")
def test_converged_iterations_are_the_closed_form(solved):
    symmetric = solved.problem.inner is not None
    for solver in [neumann(3000, rtol=1e-11)] + ([cg(max_steps=40, rtol=1e-12)] if symmetric else []):
        grad, info = run(solver, solved)
        np.testing.assert_allclose(np.ravel(grad), solved.hypergradient, rtol=1e-9)
        assert info.converged


def test_cg_on_ridge_is_the_closed_form_to_ten_digits():
    solved = ridge()
    grad, _ = run(cg(max_steps=40, rtol=1e-13), solved)
    np.testing.assert_allclose(grad, solved.hypergradient, rtol=1e-10)


def test_is_the_finite_difference_of_the_solved_inner_problem(solved):
    grad, _ = run(dense(), solved)
    np.testing.assert_allclose(np.ravel(grad), finite_difference_of_solved(solved), rtol=1e-6, atol=1e-9)


def test_the_transposed_jacobian_is_used_for_update_fields():
    """Solving with J instead is wrong by far more than the solver's error."""
    solved = module_scaled_field()
    grad, _ = run(dense(), solved)
    wrong = -np.linalg.solve(solved.jacobian, solved.outer_gradient) * (-solved.hypergradient / solved.solution)
    exact = finite_difference_of_solved(solved)
    assert np.linalg.norm(wrong - exact) > 0.05 * np.linalg.norm(exact)
    assert np.linalg.norm(grad - exact) < 1e-7 * np.linalg.norm(exact)


@pytest.mark.slow
def test_scheduled_losses_with_the_exact_jacobian_agree_with_finite_differences():
    """The weights depend on the params through stop-gradiented losses: the update is not a gradient field."""
    solved = weighted_least_squares(scheduler=True)
    inputs, targets, features = solved.inner_batch

    def update_field(params, phi, batch):
        del batch
        # Each example is weighed by another one's loss: by its own, the field would still be a gradient.
        losses = jnp.roll((inputs @ flatten(params) - targets) ** 2, 1)

        def loss(variables):
            weights = jax.nn.sigmoid(features @ phi - 0.3 * losses)
            fit = jnp.mean(weights * (inputs @ flatten(variables) - targets) ** 2) / 2
            return fit + 0.05 * jnp.sum(flatten(variables) ** 2)

        return jax.grad(loss)(params)

    def field(w, phi):
        return flatten(update_field(split(w), phi, None))

    start = flatten(solved.params)

    @jax.jit
    def fixed_point(phi):
        w = start
        for _ in range(12):
            w = w - jnp.linalg.solve(jax.jacfwd(field)(w, phi), field(w, phi))
        return w

    w = fixed_point(solved.meta)
    assert jnp.linalg.norm(field(w, solved.meta)) < 1e-14
    jacobian = jax.jacfwd(field)(w, solved.meta)
    assert jnp.linalg.norm(jacobian - jacobian.T) > 1e-2 * jnp.linalg.norm(jacobian)
    problem = BilevelProblem(update_field=update_field, outer=solved.problem.outer)
    there = solved._replace(
        problem=problem, params=split(w), solve_inner=lambda phi: np.asarray(fixed_point(jnp.asarray(phi)))
    )
    grad, _ = run(dense(), there)
    np.testing.assert_allclose(grad, finite_difference_of_solved(there), rtol=1e-6)


@pytest.mark.slow
def test_a_gradient_given_as_an_update_field_gives_the_same():
    solved = ridge(explicit=0.3)
    problem = as_field(solved).problem
    for solver in (dense(), neumann(7), cg()):
        by_loss, loss_info = run(solver, solved)
        by_field, field_info = run(solver, solved._replace(problem=problem))
        np.testing.assert_allclose(by_field, by_loss, rtol=1e-10)
        np.testing.assert_allclose(field_info.relative_residual, loss_info.relative_residual, rtol=1e-7, atol=1e-13)


def test_explicit_terms_of_the_outer_loss_are_added():
    without, with_term = ridge(), ridge(explicit=0.3)
    grad, info = run(dense(), without)
    both, both_info = run(dense(), with_term)
    np.testing.assert_allclose(both - grad, 0.3 * without.meta, rtol=1e-10)
    assert info.direct_norm == 0
    np.testing.assert_allclose(both_info.direct_norm, 0.3 * np.linalg.norm(without.meta), rtol=1e-12)
    np.testing.assert_allclose(both_info.implicit_norm, np.linalg.norm(without.hypergradient), rtol=1e-10)


def test_neumann_stays_below_its_analytic_bound():
    solved = ridge()
    low, high = np.linalg.eigvalsh(solved.jacobian)[[0, -1]]
    mixed = np.abs(solved.hypergradient / solved.solution)  # diagonal here: one regulariser per feature
    for terms in (0, 3, 10):
        grad, info = run(neumann(terms, 1 / high), solved)
        bound = (1 - low / high) ** (terms + 1) * np.linalg.norm(solved.solution)
        assert np.linalg.norm(flat_array(info.solution) - solved.solution) <= bound
        assert np.linalg.norm(grad - solved.hypergradient) <= np.max(mixed) * bound


@pytest.mark.slow
def test_residual_is_the_one_computed_outside():
    diverging = 3 / np.linalg.eigvalsh(ridge().jacobian)[-1]
    solvers = [
        neumann(4),
        neumann(9, damping=0.2, unroll=1),
        neumann(25, diverging, unroll=1),
        cg(max_steps=2),
        cg(max_steps=30, damping=0.5),
        identity(),
        dense(damping=0.5),
    ]
    for solver in solvers:
        solved = ridge()
        grad, info = run(solver, solved)
        assert np.all(np.isfinite(grad))
        np.testing.assert_allclose(info.relative_residual, true_residual(solved, info.solution), rtol=1e-10)
    solved = module_scaled_field()
    for solver in (neumann(9, unroll=1), neumann(25, 3.0, unroll=1), dense(damping=0.5)):
        _, info = run(solver, solved)
        np.testing.assert_allclose(info.relative_residual, true_residual(solved, info.solution), rtol=1e-10)


def test_a_neumann_step_too_large_is_reported_and_finite():
    solved = ridge()
    grad, info = run(neumann(60, 3 / np.linalg.eigvalsh(solved.jacobian)[-1]), solved)
    assert np.all(np.isfinite(grad))
    assert not info.converged
    np.testing.assert_allclose(info.relative_residual, true_residual(solved, info.solution), rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-6, pytest.param(1e6, marks=pytest.mark.slow)])
def test_the_scale_of_the_losses_is_only_a_scale_in_single_precision(scale, single_precision):
    for solver in (neumann(20, unroll=1), cg(), dense()):
        plain, plain_info = run(solver, ridge(dtype=jnp.float32))
        scaled, info = run(solver, ridge(dtype=jnp.float32, scale=scale))
        np.testing.assert_allclose(scaled / scale, plain, rtol=3e-5)
        assert info.converged == plain_info.converged
        assert info.relative_residual.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("solved", list(PROBLEMS), indirect=True)
def test_jit_changes_nothing(solved):
    for solver in (neumann(6), dense()):
        eager = estimate(implicit(solver), solved)
        for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(run(solver, solved)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("solver", [neumann(6), pytest.param(cg(rtol=1e-6), marks=pytest.mark.slow), dense()])
def test_vmap_of_eight_problems_is_a_loop(solver):
    problems = [ridge(seed) for seed in range(8)]
    arguments = [(p.params, p.meta, p.inner_batch, p.outer_batch) for p in problems]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arguments)

    def call(params, meta, inner_batch, outer_batch):
        return implicit(solver)(problems[0].problem, params, meta, inner_batch, outer_batch)

    together = jax.jit(jax.vmap(call))(*stacked)
    alone = [jax.jit(call)(*argument) for argument in arguments]
    looped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_the_estimator_can_be_differentiated():
    solved = ridge()

    def size(solver, meta):
        grad, _ = estimate(implicit(solver), solved._replace(meta=meta))
        return jnp.sum(grad**2)

    exact = jax.jit(jax.grad(lambda meta: size(dense(), meta)))(solved.meta)
    step = 1e-5
    evaluate = jax.jit(lambda meta: size(dense(), meta))
    differences = [(evaluate(solved.meta + e) - evaluate(solved.meta - e)) / (2 * step) for e in step * jnp.eye(6)]
    np.testing.assert_allclose(exact, differences, rtol=1e-6)
    for solver in (cg(max_steps=40, rtol=1e-13), neumann(3000, 0.05)):
        grad = jax.jit(jax.grad(lambda meta, solver=solver: size(solver, meta)))(solved.meta)
        np.testing.assert_allclose(grad, exact, rtol=1e-7)
    assert np.all(np.isfinite(jax.jit(jax.grad(lambda meta: size(neumann(6), meta)))(solved.meta)))


def test_a_warm_start_from_the_solution_is_already_there():
    solved = ridge()
    _, info = run(dense(), solved)
    for solver, most in ((cg(rtol=1e-8, unroll=False), 2), (neumann(0), 2)):
        grad, again = run(solver, solved, init=info.solution)
        assert again.relative_residual < 1e-12
        assert again.num_matvecs <= most
        assert again.converged
        np.testing.assert_allclose(grad, solved.hypergradient, rtol=1e-9)


def test_solutions_warm_start_a_scan_over_outer_steps():
    """The info passes scan; the residual falls from step to step with a few terms each."""
    solved = ridge()

    def outer_step(init, _):
        _, info = estimate(implicit(neumann(2, unroll=1)), solved, init=init)
        return info.solution, info

    _, infos = jax.lax.scan(outer_step, jax.tree.map(jnp.zeros_like, solved.params), length=6)
    assert np.all(np.diff(infos.relative_residual) < 0)


def test_no_outer_gradient_in_params_means_no_implicit_part():
    solved = ridge()
    problem = BilevelProblem(inner=solved.problem.inner, outer=lambda params, meta, batch: jnp.sum(meta**2))
    for solver in (neumann(4), neumann(4, 0.1), cg(), dense(), identity()):
        grad, info = run(solver, solved._replace(problem=problem))
        np.testing.assert_allclose(grad, 2 * solved.meta, rtol=1e-14)
        assert info.relative_residual == 0
        assert info.implicit_norm == 0
        assert info.converged


def test_negative_curvature_is_seen():
    def saddle(params, meta, batch):
        del batch
        return jnp.sum(meta * jnp.asarray([1.0, -1.0]) * params**2) / 2

    problem = BilevelProblem(inner=saddle, outer=lambda params, meta, batch: jnp.sum((params - 1.0) ** 2))
    for solver in (neumann(5), neumann(5, 0.3), dense()):
        grad, info = implicit(solver)(problem, jnp.zeros(2), jnp.asarray([1.0, 2.0]), None, None)
        assert np.all(np.isfinite(grad))
        assert info.min_curvature < 0


@pytest.mark.parametrize(
    "solver", [neumann(4, unroll=1), pytest.param(cg(max_steps=3, rtol=0.0), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", ["inner", "update_field"])
def test_replicas_with_a_reduction_solve_the_global_system(solver, kind):
    """Every replica sees a quarter of the batch; the mean over replicas is applied in every product."""
    solved = ridge(explicit=0.3)
    whole_problem = solved.problem if kind == "inner" else as_field(solved).problem
    problem = dataclasses.replace(whole_problem, reduce=lambda tree: jax.lax.pmean(tree, "device"))
    whole, whole_info = run(solver, solved)

    def local(inner_batch, outer_batch):
        return implicit(solver)(problem, solved.params, solved.meta, inner_batch, outer_batch)

    batches = jax.tree.map(lambda x: x.reshape(4, 5, *x.shape[1:]), (solved.inner_batch, solved.outer_batch))
    grads, info = jax.jit(jax.vmap(local, axis_name="device"))(*batches)
    for replica in range(4):
        np.testing.assert_allclose(grads[replica], whole, rtol=1e-9)
        for name in ("relative_residual", "num_matvecs", "direct_norm", "implicit_norm"):
            np.testing.assert_allclose(getattr(info, name)[replica], getattr(whole_info, name), rtol=1e-9)
        np.testing.assert_allclose(info.inner_grad_norm[replica], 0, atol=1e-12)


def test_half_precision_params_get_single_precision_algebra():
    def inner(params, meta, batch):
        del batch
        return jnp.mean((params["w"].astype(jnp.float32) * meta - 1.0) ** 2)

    problem = BilevelProblem(inner=inner, outer=lambda p, m, b: jnp.mean((p["w"].astype(jnp.float32) - 2.0) ** 2))
    params, meta = {"w": jnp.ones(4, jnp.bfloat16)}, jnp.linspace(0.5, 1.5, 4, dtype=jnp.float32)
    for solver in (neumann(30, unroll=1), cg(), dense()):
        grad, info = jax.jit(lambda p, m, s=solver: implicit(s)(problem, p, m, None, None))(params, meta)
        assert grad.dtype == jnp.float32
        assert info.solution["w"].dtype == jnp.bfloat16
        assert info.relative_residual.dtype == jnp.float32
        # By hand, w = 1: v = (w - 2) / 2, H = m^2 / 2, d_m d_w inner = (2 m w - 1) / 2.
        expected = 0.5 / (0.5 * meta**2) * (2 * meta - 1) / 2
        np.testing.assert_allclose(grad, expected, rtol=0.03, atol=0.02)


def test_weights_that_enter_linearly_cost_no_second_reverse_pass():
    """The mixed product is one forward-mode pass, about two passes' worth of operations."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(64, 32)))
    params = [jnp.asarray(rng.normal(size=shape)) for shape in ((32, 48), (48, 48), (48, 1))]

    def inner(params, weights, batch):
        del batch
        hidden = inputs
        for matrix in params:
            hidden = jnp.tanh(hidden @ matrix)
        return jnp.mean(jax.nn.sigmoid(weights) * hidden[:, 0] ** 2)

    def flops(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    weights = jnp.zeros(64)
    forward = flops(lambda p, w: inner(p, w, None), params, weights)
    gradient = flops(jax.grad(lambda p, w: inner(p, w, None)), params, weights)

    def backwards(p, w):
        """The other order: the transposed derivative in the weights of the gradient in the params."""
        v = jax.grad(lambda q: inner(q, w, None))(p)
        return jax.vjp(lambda m: jax.grad(lambda q: inner(q, m, None))(p), w)[1](v)[0]

    problem = BilevelProblem(inner=inner, outer=inner)
    ours = flops(lambda p, w: implicit(identity())(problem, p, w, None, None)[0], params, weights)
    # XLA drops the residual's product, since only the hypergradient is asked for: a gradient and a tangent pass remain.
    assert ours <= gradient + 2.1 * forward
    assert ours <= flops(backwards, params, weights) + 0.1 * forward


@pytest.mark.parametrize("kind", ["same", "stacked", "curvature"])
def test_a_mean_over_replicas_hides_the_transpose_and_normal_cg_says_so(kind):
    x, y = jax.random.normal(jax.random.key(0), (4, 8, 3)), jnp.ones((4, 8))
    problem = BilevelProblem(
        inner=lambda w, m, b: jnp.mean((b[0] @ w - b[1]) ** 2) + jnp.exp(m) * jnp.sum(w**2),
        outer=lambda w, m, b: jnp.sum(w**2),
        reduce=lambda tree: tree,
    )
    curvature = gauss_newton(
        lambda w, m, b: b[0] @ w, lambda z, w, m, b: jnp.mean((z - b[1]) ** 2) + jnp.exp(m) * jnp.sum(w**2)
    )
    options = {"same": {}, "stacked": {"batches": "stacked"}, "curvature": {"curvature": curvature}}[kind]
    batch = (x, y) if kind == "stacked" else (x[0], y[0])
    with pytest.raises(ValueError, match="transposed matrix"):
        implicit(normal_cg(), **options)(problem, jnp.ones(3), jnp.array(0.1), batch, None)
