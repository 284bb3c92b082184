import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from auxjax import BilevelProblem, identity, implicit
from auxjax.hypergrad import one_step, unrolled
from tests.helpers.bilevel_problems import estimate, flat_array, module_scaled_field, ridge, split, true_residual
from tests.helpers.look_ahead import central_differences, curved, outer_after_training, run, split_over_replicas

LOOK_AHEADS = {
    "plain": ("inner", optax.sgd(0.4)),
    "field": ("update_field", optax.sgd(0.1)),
    "momentum": ("inner", optax.sgd(0.4, momentum=0.9)),
    "adam": ("update_field", optax.adam(0.05, eps_root=1e-8)),
}


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def equal_trees(came, wanted, **tolerances):
    for a, b in zip(jax.tree.leaves(came), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, **tolerances)


def moving_state(optimizer, params):
    """The optimiser's state after two steps along gradients that have nothing to do with the problem."""
    state = optimizer.init(params)
    for t in range(2):
        _, state = optimizer.update(jax.tree.map(lambda x, t=t: jnp.sin(x + t), params), state, params)
    return state


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("momentum", "plain"))) for name in LOOK_AHEADS]
)
def test_is_the_derivative_of_the_outer_loss_after_a_real_step(name, ordinary_promotion):
    """The direct part at the new params included, and equal to one unrolled step in all but where J is measured."""
    kind, optimizer = LOOK_AHEADS[name]
    point = curved(kind)
    state = moving_state(optimizer, point.params)
    value = outer_after_training(point, 1, optimizer, opt_state=state)
    grad, info = run(one_step(optimizer, opt_state=state), point)
    np.testing.assert_allclose(flat(grad), central_differences(value, point.meta), rtol=1e-8)
    assert jax.tree.structure(grad) == jax.tree.structure(point.meta)
    unrolled_grad, unrolled_info = run(unrolled(1, optimizer, opt_state=state), point)
    np.testing.assert_allclose(flat(grad), flat(unrolled_grad), rtol=1e-12)
    for field in ("direct_norm", "implicit_norm", "solution"):
        equal_trees(getattr(info, field), getattr(unrolled_info, field), rtol=1e-10)
    assert info.num_matvecs == 1


def test_the_state_of_the_optimiser_matters():
    point, optimizer = curved(), optax.sgd(0.4, momentum=0.9)
    with_state, _ = run(one_step(optimizer, opt_state=moving_state(optimizer, point.params)), point)
    fresh, info = run(one_step(optimizer), point)
    assert np.linalg.norm(with_state - fresh) > 0.05 * info.implicit_norm
    plain, _ = run(one_step(0.4), point)
    np.testing.assert_allclose(fresh, plain, rtol=1e-12)


def test_the_factory_can_be_called_inside_a_compiled_step():
    """With a traced state and a traced step size."""
    point, optimizer = curved(), optax.sgd(0.4, momentum=0.9)
    state = moving_state(optimizer, point.params)

    @jax.jit
    def step(opt_state, step_size):
        by_state, _ = one_step(optimizer, opt_state=opt_state)(point.problem, *point[1:])
        by_size, _ = one_step(step_size)(point.problem, *point[1:])
        return by_state, by_size

    by_state, by_size = step(state, jnp.float32(0.4))
    np.testing.assert_allclose(by_state, run(one_step(optimizer, opt_state=state), point)[0], rtol=1e-12)
    np.testing.assert_allclose(by_size, run(one_step(0.4), point)[0], rtol=1e-6)


@pytest.mark.parametrize("make", [ridge, module_scaled_field])
def test_at_a_fixed_point_it_is_the_identity_in_place_of_the_inverse(make):
    """There the params do not move: u = step v, and the residual is the identity solver's."""
    solved = make()
    grad, info = run(one_step(0.1), solved)
    wanted, identity_info = run(implicit(identity(scale=0.1)), solved)
    np.testing.assert_allclose(grad, wanted, rtol=1e-9)
    np.testing.assert_allclose(flat_array(info.solution), 0.1 * solved.outer_gradient, rtol=1e-9)
    np.testing.assert_allclose(info.relative_residual, true_residual(solved, info.solution), rtol=1e-9)
    np.testing.assert_allclose(info.relative_residual, identity_info.relative_residual, rtol=1e-9)
    assert not info.converged


def test_the_residual_is_measured_at_the_old_params_with_the_gradient_at_the_new_ones():
    solved = ridge()
    there = solved._replace(params=split(np.linspace(-1.0, 1.0, 6)))
    _, info = run(one_step(0.1), there)
    v = flat_array(info.solution) / 0.1
    left = v - solved.jacobian @ (0.1 * v)
    np.testing.assert_allclose(info.relative_residual, np.linalg.norm(left) / np.linalg.norm(v), rtol=1e-10)
    gradient = jax.grad(solved.problem.inner)(there.params, there.meta, there.inner_batch)
    np.testing.assert_allclose(info.inner_grad_norm, np.linalg.norm(flat_array(gradient)), rtol=1e-10)


def test_an_inner_loss_of_unit_curvature_is_solved():
    problem = BilevelProblem(
        inner=lambda params, meta, batch: jnp.sum((params - meta) ** 2) / 2,
        outer=lambda params, meta, batch: jnp.sum(jnp.sin(params)),
    )
    meta = jnp.asarray([0.3, -1.2])
    grad, info = one_step(1.0)(problem, jnp.zeros(2), meta, None, None)
    np.testing.assert_allclose(grad, np.cos(meta), rtol=1e-12)
    assert info.converged
    assert info.relative_residual < 1e-12


@pytest.mark.slow
def test_jit_changes_nothing_and_vmap_is_a_loop():
    points = [curved(seed=seed) for seed in range(3)]
    estimator = one_step(optax.sgd(0.4, momentum=0.5))
    alone = [run(estimator, point) for point in points]
    equal_trees(estimate(estimator, points[0]), alone[0], rtol=1e-10, atol=1e-13)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[point[1:] for point in points])
    together = jax.jit(jax.vmap(lambda *point: estimator(points[0].problem, *point)))(*stacked)
    equal_trees(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["inner", pytest.param("update_field", marks=pytest.mark.slow)])
def test_replicas_with_a_reduction_take_the_global_derivative(kind):
    solved = ridge(explicit=0.3) if kind == "inner" else curved(kind)
    point = solved._replace(params=split(np.linspace(-1.0, 1.0, 6)))
    wanted = run(one_step(0.2), point)
    came = split_over_replicas(one_step(0.2), point)
    for replica in range(4):
        equal_trees(jax.tree.map(lambda leaf, r=replica: leaf[r], came), wanted, rtol=1e-9, atol=1e-12)


def test_the_estimator_can_be_differentiated():
    point = curved()

    def size(meta):
        return jnp.sum(one_step(0.4)(point.problem, point.params, meta, *point[3:])[0] ** 2)

    np.testing.assert_allclose(jax.jit(jax.grad(size))(point.meta), central_differences(size, point.meta), rtol=1e-8)


def test_leaves_of_params_that_are_not_floating_are_held_fixed():
    point = curved()
    params = {**point.params, "count": jnp.int32(3), "key": jax.random.key(1)}
    grad, info = run(one_step(optax.sgd(0.3, momentum=0.9)), point._replace(params=params))
    np.testing.assert_allclose(grad, run(one_step(0.3), point)[0], rtol=1e-12)
    assert set(info.solution) == set(params)


def test_single_precision(single_precision):
    point = ridge(dtype=jnp.float32)
    grad, info = run(one_step(optax.adam(0.01, eps_root=1e-8)), point)
    assert grad.dtype == jnp.float32
    assert info.relative_residual.dtype == jnp.float32
    assert np.all(np.isfinite(grad))


@pytest.mark.slow
def test_half_precision_params_get_single_precision_algebra():
    problem = BilevelProblem(
        inner=lambda p, m, b: jnp.mean((p.astype(jnp.float32) * m - 1.0) ** 2),
        outer=lambda p, m, b: jnp.mean((p.astype(jnp.float32) - 2.0) ** 2),
    )
    meta = jnp.linspace(0.5, 1.5, 4, dtype=jnp.float32)
    grad, info = one_step(0.5)(problem, jnp.ones(4, jnp.bfloat16), meta, None, None)
    # By hand, w = 1: g = m (m - 1) / 2, v = (w - g / 2 - 2) / 2, d_m g = (2 m - 1) / 2.
    v = (-1 - meta * (meta - 1) / 4) / 2
    np.testing.assert_allclose(grad, -0.5 * v * (2 * meta - 1) / 2, rtol=0.02, atol=1e-3)
    assert info.solution.dtype == jnp.bfloat16
    assert info.relative_residual.dtype == jnp.float32


def test_what_does_not_fit_is_refused():
    point = curved()
    with pytest.raises(TypeError, match=r"one_step\(optimizer=\).*NoneType"):
        one_step(None)
    with pytest.raises(TypeError, match="bool"):
        one_step(True)
    with pytest.raises(ValueError, match="step size > 0"):
        one_step(float("nan"))
    with pytest.raises(ValueError, match="rtol"):
        one_step(0.1, rtol=-1.0)
    with pytest.raises(TypeError, match="BilevelProblem"):
        one_step(0.1)(point.problem.inner, *point[1:])
    with pytest.raises(ValueError, match="opt_state"):
        run(one_step(0.1, opt_state=optax.sgd(0.1, momentum=0.9).init(point.params)), point)
    with pytest.raises(TypeError, match="typed PRNG key"):
        run(one_step(0.1), point, key=jnp.zeros(2, jnp.uint32))
    with pytest.raises(ValueError, match="init"):
        run(one_step(0.1), point, init={"kernel": jnp.zeros((2, 2))})


def test_a_broken_outer_gradient_is_not_hidden_where_the_gradient_is_zero():
    problem = BilevelProblem(
        inner=lambda w, m, batch: 0.5 * m * w[0] ** 2 + 0.0 * w[1],
        outer=lambda w, m, batch: w[0] + jnp.sqrt(w[1] - 5.0),
    )
    _, info = one_step(optax.sgd(0.1))(problem, jnp.ones(2), jnp.array(1.0), None, None)
    assert np.isnan(info.solution[1])
