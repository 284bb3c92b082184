import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from auxjax import BilevelProblem, OptimizerPoint, dense, gmres, implicit, neumann, unrolled
from auxjax.hypergrad import optimizer_field, optimizer_fixed_point
from tests.helpers.bilevel_problems import estimate, ridge


def come_to_rest(optimizer, solved, meta=None, steps=4000, start=None):
    """Params and optimiser state after many updates."""
    meta = solved.meta if meta is None else meta
    lower = solved.problem.update_field or jax.grad(solved.problem.inner)
    point = (solved.params, optimizer.init(solved.params)) if start is None else start

    def update(point, _):
        updates, state = optimizer.update(lower(point[0], meta, solved.inner_batch), point[1], point[0])
        return (optax.apply_updates(point[0], updates), state), None

    return jax.jit(lambda p: jax.lax.scan(update, p, length=steps)[0])(point)


def differences(optimizer, solved, start, steps=4000, step=1e-4):
    """Central differences of the outer loss where the optimiser comes to rest."""

    def value(meta):
        params, _ = come_to_rest(optimizer, solved, meta, steps, start)
        return solved.problem.outer(params, meta, solved.outer_batch)

    return np.asarray([(value(solved.meta + e) - value(solved.meta - e)) / (2 * step) for e in step * np.eye(6)])


OPTIMIZERS = {
    "decoupled decay": optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.2)),
    "momentum": optax.chain(optax.trace(0.8), optax.add_decayed_weights(0.3), optax.scale(-0.05)),
    "adamw": optax.chain(optax.scale_by_adam(0.8, 0.9, eps=0.5), optax.add_decayed_weights(0.3), optax.scale(-0.02)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "momentum" else pytest.mark.slow) for name in OPTIMIZERS]
)
def test_fixed_points_in_params_and_state_agree_with_differences_of_the_trained_problem(name, ordinary_promotion):
    """Where momentum and second moments do not vanish, their own change counts."""
    solved, optimizer = ridge(), OPTIMIZERS[name]
    start = come_to_rest(optimizer, solved)
    point = OptimizerPoint(*start)
    problem = optimizer_fixed_point(solved.problem, optimizer)
    here = solved._replace(problem=problem, params=point)
    expected = differences(optimizer, solved, start)
    grad, info = estimate(implicit(dense()), here)
    np.testing.assert_allclose(grad, expected, rtol=1e-6)
    assert info.inner_grad_norm < 1e-9
    by_gmres, info = estimate(implicit(gmres(max_steps=30, rtol=1e-11)), here)
    np.testing.assert_allclose(by_gmres, grad, rtol=1e-8)
    assert info.converged
    # The params' own gradient does not vanish there: without the optimiser the answer is another one.
    plain, _ = estimate(implicit(dense()), solved._replace(params=point.params))
    assert np.linalg.norm(plain - grad) > 0.05 * np.linalg.norm(grad)


@pytest.mark.slow
def test_neumann_series_of_step_one_is_the_derivative_of_the_last_updates(ordinary_promotion):
    solved, optimizer = ridge(), OPTIMIZERS["adamw"]
    params, state = come_to_rest(optimizer, solved)
    here = solved._replace(
        problem=optimizer_fixed_point(solved.problem, optimizer), params=OptimizerPoint(params, state)
    )
    for terms in (0, 3, 7):
        grad, _ = estimate(implicit(neumann(terms, step_size=1.0, keep="all")), here)
        loop, _ = estimate(unrolled(terms + 1, optimizer, opt_state=state), solved._replace(params=params))
        np.testing.assert_allclose(grad, loop, rtol=1e-7)


@pytest.mark.slow
def test_adam_as_a_preconditioner_cancels_where_the_gradient_vanishes(ordinary_promotion):
    """And makes the series converge on a badly scaled problem, on which plain steps do not."""
    solved = ridge(scale=1.0)
    adam = optax.adam(1.0, b1=0.0, eps=1e-8)
    scales = jnp.asarray([1e-3, 1.0, 1.0, 1.0, 1.0, 1e3])

    def rescaled(function):
        def call(params, meta, batch):
            flat = jnp.concatenate([params["kernel"].reshape(-1), params["bias"]]) * scales
            return function({"kernel": flat[:4].reshape(2, 2), "bias": flat[4:]}, meta, batch)

        return call

    problem = BilevelProblem(inner=rescaled(solved.problem.inner), outer=rescaled(solved.problem.outer))
    flat = jnp.concatenate([solved.params["kernel"].reshape(-1), solved.params["bias"]]) / scales
    params = {"kernel": flat[:4].reshape(2, 2), "bias": flat[4:]}
    here = solved._replace(problem=problem, params=params)
    second = {"kernel": scales[:4].reshape(2, 2) ** 4, "bias": scales[4:] ** 4}
    state = jax.tree.map(jnp.asarray, adam.init(params))
    state = (state[0]._replace(nu=jax.tree.map(lambda x: 4.0 * x, second), count=jnp.int32(10**6)), *state[1:])
    seen = optimizer_field(problem, adam, state)
    grad, _ = estimate(implicit(dense()), here._replace(problem=seen))
    np.testing.assert_allclose(grad, solved.hypergradient, rtol=1e-6)
    preconditioned, _ = estimate(implicit(neumann(60)), here._replace(problem=seen))
    plain, _ = estimate(implicit(neumann(60)), here)
    size = np.linalg.norm(solved.hypergradient)
    assert np.linalg.norm(preconditioned - solved.hypergradient) < 1e-3 * size
    assert np.linalg.norm(plain - solved.hypergradient) > 0.1 * size


def test_plain_steps_and_a_given_field_change_nothing():
    solved = ridge()
    for problem in (
        solved.problem,
        BilevelProblem(update_field=jax.grad(solved.problem.inner), outer=solved.problem.outer),
    ):
        grad, _ = estimate(implicit(dense()), solved._replace(problem=optimizer_field(problem, 0.1)))
        np.testing.assert_allclose(grad, solved.hypergradient, rtol=1e-10)


@pytest.mark.slow
def test_masks_aux_and_counters_are_kept(ordinary_promotion):
    solved, optimizer = ridge(), optax.adam(0.1, eps=1e-3)
    params = {**solved.params, "count": jnp.int32(3)}

    def inner(p, m, b):
        return solved.problem.inner({k: p[k] for k in ("kernel", "bias")}, m, b), "aux"

    def outer(p, m, b):
        return solved.problem.outer({k: p[k] for k in ("kernel", "bias")}, m, b), p["count"]

    for mask in (lambda path: path != "bias", {"kernel": True, "bias": False, "count": True}):
        problem = BilevelProblem(inner=inner, outer=outer, has_aux=True, mask=mask)
        expected, _ = estimate(implicit(dense()), solved._replace(problem=problem, params=params))
        seen = optimizer_field(problem, 0.1)
        grad, info = estimate(implicit(dense()), solved._replace(problem=seen, params=params))
        np.testing.assert_allclose(grad, expected, rtol=1e-9)
        assert info.aux == 3
        theta = {"kernel": params["kernel"], "bias": None, "count": None}
        point = OptimizerPoint(params, optimizer.init(theta))
        joint = optimizer_fixed_point(problem, optimizer)
        _, info = estimate(implicit(gmres(max_steps=5)), solved._replace(problem=joint, params=point))
        assert isinstance(info.solution, OptimizerPoint)
        np.testing.assert_array_equal(info.solution.params["bias"], np.zeros(2))


@pytest.mark.slow
def test_replicas_follow_the_optimiser_of_the_mean_gradient(ordinary_promotion):
    """Adam is not linear in the gradient: the mean of the replicas' updates would be another field."""
    solved = ridge(scalar=True)
    optimizer = optax.adam(0.1, eps=0.3)
    state = optimizer.init(solved.params)
    whole = optimizer_field(solved.problem, optimizer, state)
    expected, _ = estimate(implicit(dense()), solved._replace(problem=whole))
    parts = BilevelProblem(
        inner=solved.problem.inner, outer=solved.problem.outer, reduce=lambda tree: jax.lax.pmean(tree, "device")
    )
    split = jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), (solved.inner_batch, solved.outer_batch))
    grads, _ = jax.vmap(
        lambda a, b: implicit(dense())(optimizer_field(parts, optimizer, state), solved.params, solved.meta, a, b),
        axis_name="device",
    )(*split)
    np.testing.assert_allclose(grads, np.full(4, expected), rtol=1e-9)


def test_updates_too_small_for_the_params_are_still_a_field():
    """A difference of params would be rounded to zero, and the report would say that the point is at rest."""
    problem = BilevelProblem(inner=lambda w, m, b: jnp.sum((w - m) ** 2) / 2, outer=lambda w, m, b: jnp.sum(w**2))
    w = jnp.ones(3, jnp.float32)
    for made in (optimizer_field(problem, 1e-9), optimizer_fixed_point(problem, 1e-9)):
        params = w if made.outer is problem.outer else OptimizerPoint(w, optax.EmptyState())
        _, info = implicit(dense())(made, params, jnp.zeros(3, jnp.float32), None, None)
        np.testing.assert_allclose(info.inner_grad_norm, 1e-9 * np.sqrt(3), rtol=1e-5)


def test_what_does_not_fit_is_refused():
    solved = ridge()
    with pytest.raises(TypeError, match="BilevelProblem"):
        optimizer_field(solved.problem.inner, 0.1)
    with pytest.raises(TypeError, match="optimizer"):
        optimizer_fixed_point(solved.problem, "adam")
    with pytest.raises(TypeError, match="OptimizerPoint"):
        estimate(implicit(dense()), solved._replace(problem=optimizer_fixed_point(solved.problem, 0.1)))
    wrong = optimizer_field(solved.problem, optax.sgd(0.1, momentum=0.9), optax.adam(0.1).init(solved.params))
    with pytest.raises(ValueError, match="opt_state"):
        estimate(implicit(dense()), solved._replace(problem=wrong))
