import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from auxjax import BilevelProblem
from auxjax.hypergrad import finite_difference, one_step
from tests.helpers.bilevel_problems import estimate, flat_array, ridge, split
from tests.helpers.look_ahead import curved, run, split_over_replicas


def equal_trees(came, wanted, **tolerances):
    for a, b in zip(jax.tree.leaves(came), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, **tolerances)


@pytest.mark.parametrize(
    "name", [pytest.param("plain", marks=pytest.mark.slow), pytest.param("momentum", marks=pytest.mark.slow), "adam"]
)
def test_is_the_one_step_hypergradient_up_to_the_square_of_epsilon(name, ordinary_promotion):
    """Half the displacement, a quarter of the error, in the gradient and in the residual; everything else is equal."""
    optimizer = {"plain": 0.4, "momentum": optax.sgd(0.4, momentum=0.9), "adam": optax.adam(0.05, eps_root=1e-8)}[name]
    point = curved()
    exact, exact_info = run(one_step(optimizer), point)
    errors, residual_errors = [], []
    for epsilon in (0.04, 0.02, 0.01):
        grad, info = run(finite_difference(optimizer, epsilon=epsilon), point)
        errors.append(np.linalg.norm(grad - exact))
        residual_errors.append(abs(info.relative_residual - exact_info.relative_residual))
        for field in ("direct_norm", "inner_grad_norm", "solution"):
            equal_trees(getattr(info, field), getattr(exact_info, field), rtol=1e-10)
        assert info.num_matvecs == 0
    for series in (errors, residual_errors):
        np.testing.assert_allclose([series[0] / series[1], series[1] / series[2]], 4, rtol=0.02)
    assert errors[2] < 1e-3 * exact_info.implicit_norm


def test_the_error_stays_below_its_bound():
    point, epsilon = curved(), 0.05
    exact, info = run(one_step(0.4), point)
    grad, _ = run(finite_difference(0.4, epsilon=epsilon), point)
    size = np.linalg.norm(flat_array(info.solution))
    unit = jax.tree.map(lambda leaf: leaf / size, info.solution)

    @jax.jit
    @jax.vmap
    def third(s):
        """d/d meta of the third derivative of the inner loss along the unit vector, s away from params."""

        def along(meta, s):
            moved = jax.tree.map(lambda p, n: p + s * n, point.params, unit)
            return point.problem.inner(moved, meta, point.inner_batch)

        derivative = along
        for _ in range(3):
            derivative = jax.grad(derivative, argnums=1)
        return jnp.linalg.norm(jax.grad(derivative)(point.meta, s))

    bound = epsilon**2 / 6 * size * jnp.max(third(jnp.linspace(-epsilon, epsilon, 21)))
    error = np.linalg.norm(grad - exact)
    assert 0.1 * bound < error <= bound


def test_is_exact_where_the_third_derivative_vanishes():
    """Ridge is quadratic in the params; the direct part is counted."""
    point = ridge(explicit=0.3)._replace(params=split(np.linspace(-1.0, 1.0, 6)))
    exact = run(one_step(0.2), point)
    grad, info = run(finite_difference(0.2), point)
    np.testing.assert_allclose(grad, exact[0], rtol=1e-10)
    np.testing.assert_allclose(info.relative_residual, exact[1].relative_residual, rtol=1e-9)
    np.testing.assert_allclose(info.min_curvature, exact[1].min_curvature, rtol=1e-9)
    without, _ = run(finite_difference(0.2), ridge()._replace(params=point.params))
    np.testing.assert_allclose(grad - without, 0.3 * point.meta, rtol=1e-9)


@pytest.mark.slow
def test_jit_changes_nothing_and_vmap_is_a_loop():
    points = [curved(seed=seed) for seed in range(3)]
    estimator = finite_difference(0.4)
    alone = [run(estimator, point) for point in points]
    equal_trees(estimate(estimator, points[0]), alone[0], rtol=1e-9, atol=1e-12)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[point[1:] for point in points])
    together = jax.jit(jax.vmap(lambda *point: estimator(points[0].problem, *point)))(*stacked)
    equal_trees(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone), rtol=1e-9, atol=1e-12)


def test_replicas_with_a_reduction_take_the_global_derivative():
    point = ridge(explicit=0.3)._replace(params=split(np.linspace(-1.0, 1.0, 6)))
    wanted = run(finite_difference(0.2), point)
    came = split_over_replicas(finite_difference(0.2), point)
    for replica in range(4):
        equal_trees(jax.tree.map(lambda leaf, r=replica: leaf[r], came), wanted, rtol=1e-9, atol=1e-12)


def test_no_outer_gradient_in_params_means_the_direct_part_alone():
    point = curved()
    problem = BilevelProblem(inner=point.problem.inner, outer=lambda params, meta, batch: jnp.sum(meta**2))
    grad, info = run(finite_difference(0.3), point._replace(problem=problem))
    np.testing.assert_allclose(grad, 2 * point.meta, rtol=1e-14)
    assert info.relative_residual == 0
    assert info.implicit_norm == 0


def test_losses_without_forward_mode_are_welcome():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, cotangent: (2 * x * cotangent,))
    plain = BilevelProblem(inner=lambda p, m, b: jnp.sum(m * p**2), outer=lambda p, m, b: jnp.sum(p**2))
    custom = BilevelProblem(inner=lambda p, m, b: jnp.sum(m * square(p)), outer=plain.outer)
    arguments = (jnp.asarray([0.3, -1.0]), jnp.asarray([1.0, 2.0]), None, None)
    grad, _ = finite_difference(0.1)(custom, *arguments)
    np.testing.assert_allclose(grad, one_step(0.1)(plain, *arguments)[0], rtol=1e-10)


def test_single_precision_keeps_three_digits(single_precision):
    point = ridge(dtype=jnp.float32)._replace(params=split(np.linspace(-1.0, 1.0, 6), jnp.float32))
    grad, _ = run(finite_difference(0.2), point)
    exact, _ = run(one_step(0.2), point)
    assert grad.dtype == jnp.float32
    assert np.linalg.norm(grad - exact) < 1e-3 * np.linalg.norm(exact)


def test_what_does_not_fit_is_refused():
    point = curved("update_field")
    with pytest.raises(ValueError, match=r"update_field=.*one_step"):
        run(finite_difference(0.1), point)
    for epsilon in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="epsilon"):
            finite_difference(0.1, epsilon=epsilon)
    with pytest.raises(TypeError, match=r"finite_difference\(optimizer=\)"):
        finite_difference("sgd")
    point = curved()
    with pytest.raises(ValueError, match="opt_state"):
        run(finite_difference(0.1, opt_state=optax.sgd(0.1, momentum=0.9).init(point.params)), point)
    with pytest.raises(TypeError, match="typed PRNG key"):
        run(finite_difference(0.1), point, key=jnp.zeros(2, jnp.uint32))


def test_half_precision_is_refused():
    point = curved()
    half = point._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), point.params))
    with pytest.raises(ValueError, match=r"bfloat16 rounds away\. Use one_step"):
        run(finite_difference(0.4), half)
