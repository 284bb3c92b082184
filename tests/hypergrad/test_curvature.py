import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from auxjax import BilevelProblem, cg, dense, fisher, gauss_newton, implicit
from tests.helpers.bilevel_problems import estimate, ridge
from tests.helpers.look_ahead import Point, run

CLASSES = 3


def outputs(params, meta, batch):
    del meta
    return jnp.tanh(batch["x"] @ params["first"]) @ params["second"]


def decay(params):
    return 0.01 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def each(params, meta, batch):
    """Cross-entropy, `[n]`."""
    picked = jax.nn.log_softmax(outputs(params, meta, batch)) * jax.nn.one_hot(batch["y"], CLASSES, dtype=float)
    return -jnp.sum(picked, axis=1)


def weigh(losses, params, meta, batch):
    del batch
    return jnp.mean(jax.nn.sigmoid(meta) * losses) + decay(params)


def loss_of_outputs(z, params, meta, batch):
    picked = jax.nn.log_softmax(z) * jax.nn.one_hot(batch["y"], CLASSES, dtype=float)
    return weigh(-jnp.sum(picked, axis=1), params, meta, batch)


def network(seed=0, examples=7) -> Point:
    """A small untrained classifier with one weight per example; its Hessian has both signs."""
    rng = np.random.default_rng(seed)

    def batch():
        return {
            "x": jnp.asarray(rng.normal(size=(examples, 2))),
            "y": jnp.asarray(rng.integers(0, CLASSES, examples), jnp.int32),
        }

    params = {"first": jnp.asarray(2 * rng.normal(size=(2, 2))), "second": jnp.asarray(rng.normal(size=(2, CLASSES)))}
    problem = BilevelProblem(
        inner=lambda p, m, b: loss_of_outputs(outputs(p, m, b), p, m, b),
        outer=lambda p, m, b: jnp.mean(each(p, m, b)) + 0.1 * jnp.sum(m**2),
    )
    return Point(problem, params, jnp.asarray(rng.normal(size=examples)), batch(), batch())


def matrix_of(curvature, point) -> np.ndarray:
    """The matrix, column by column, by way of the estimator's own system."""
    flat, restore = ravel_pytree(point.params)
    columns = []

    def solver(matvec, b, *, init=None, key=None):
        columns.append(jax.vmap(lambda e: ravel_pytree(matvec(restore(e)))[0], out_axes=1)(jnp.eye(flat.size)))
        return dense()(matvec, b, init=init, key=key)

    @jax.jit
    def columns_of(params):
        estimate(implicit(solver, curvature=curvature), point._replace(params=params))
        return columns[0]

    return np.asarray(columns_of(point.params))


def flat_functions(point):
    flat, restore = ravel_pytree(point.params)
    return flat, lambda function: lambda w: function(restore(w), point.meta, point.inner_batch)


@pytest.mark.slow
def test_gauss_newton_is_the_product_of_its_dense_parts():
    point = network()
    flat, of = flat_functions(point)
    jacobian = np.asarray(jax.jacobian(of(outputs))(flat)).reshape(-1, flat.size)
    z = of(outputs)(flat)
    hessian = jax.hessian(lambda z: loss_of_outputs(z, point.params, point.meta, point.inner_batch))(z)
    expected = jacobian.T @ np.asarray(hessian).reshape(z.size, z.size) @ jacobian + 0.02 * np.eye(flat.size)
    found = matrix_of(gauss_newton(outputs, loss_of_outputs), point)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13)
    assert np.linalg.eigvalsh(found)[0] >= 0.02 - 1e-12
    assert np.linalg.eigvalsh(jax.hessian(of(point.problem.inner))(flat))[0] < -1e-3


def test_fisher_is_the_weighted_sum_of_outer_products_of_gradients():
    point = network()
    flat, of = flat_functions(point)
    gradients = np.asarray(jax.jit(jax.jacobian(of(each)))(flat))
    slopes = np.asarray(jax.nn.sigmoid(point.meta)) / len(gradients)
    expected = gradients.T @ (slopes[:, None] * gradients) + 0.02 * np.eye(flat.size)
    np.testing.assert_allclose(matrix_of(fisher(each, weigh), point), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_fisher_over_labels_from_the_model_is_gauss_newton():
    """Every label of every example, weighted by the probability that the model gives it."""
    point = network()
    probabilities = jax.nn.softmax(outputs(point.params, None, point.inner_batch)).reshape(-1)
    count = len(point.meta)
    enumerated = {
        "x": jnp.repeat(point.inner_batch["x"], CLASSES, axis=0),
        "y": jnp.tile(jnp.arange(CLASSES, dtype=jnp.int32), count),
    }

    def weigh_labels(losses, params, meta, batch):
        del batch
        return jnp.sum(jnp.repeat(jax.nn.sigmoid(meta), CLASSES) * probabilities * losses) / count + decay(params)

    expected = matrix_of(gauss_newton(outputs, loss_of_outputs), point)
    problem = BilevelProblem(
        inner=lambda p, m, b: weigh_labels(each(p, m, b), p, m, b),
        outer=lambda p, m, b: jnp.mean(each(p, m, point.outer_batch)),
    )
    changed = point._replace(problem=problem, inner_batch=enumerated)
    found = matrix_of(fisher(each, weigh_labels), changed)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13)


def test_gauss_newton_of_a_linear_model_is_the_hessian():
    solved = ridge(explicit=0.2)

    def predictions(params, meta, batch):
        del meta
        return batch[0] @ jnp.concatenate([params["kernel"].reshape(-1), params["bias"]])

    def loss(z, params, meta, batch):
        w = jnp.concatenate([params["kernel"].reshape(-1), params["bias"]])
        return jnp.mean((z - batch[1]) ** 2) / 2 + jnp.sum(jnp.exp(meta) * w**2) / 2

    grad, info = estimate(implicit(cg(max_steps=30, rtol=1e-13), curvature=gauss_newton(predictions, loss)), solved)
    np.testing.assert_allclose(grad, solved.hypergradient, rtol=1e-9)
    assert info.relative_residual < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(
    "curvature", [gauss_newton(outputs, loss_of_outputs), fisher(each, weigh)], ids=["gauss_newton", "fisher"]
)
def test_far_from_a_minimum_it_converges_and_the_residual_is_still_that_of_the_hessian(curvature):
    point = network()
    flat, of = flat_functions(point)
    hessian = np.asarray(jax.hessian(of(point.problem.inner))(flat))
    grad, info = run(implicit(cg(max_steps=25, rtol=1e-9), curvature=curvature), point)
    assert np.all(np.isfinite(grad))
    assert info.converged
    u = np.asarray(ravel_pytree(info.solution)[0])
    v = np.asarray(ravel_pytree(jax.grad(point.problem.outer)(point.params, point.meta, point.outer_batch))[0])
    np.testing.assert_allclose(np.linalg.solve(matrix_of(curvature, point), v), u, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(info.relative_residual, np.linalg.norm(v - hessian @ u) / np.linalg.norm(v), rtol=1e-9)
    assert info.min_curvature <= u @ hessian @ u / (u @ u) + 1e-12
    along = jax.grad(
        lambda m: jax.jvp(lambda p: point.problem.inner(p, m, point.inner_batch), (point.params,), (info.solution,))[1]
    )(point.meta)
    np.testing.assert_allclose(grad, 0.2 * np.asarray(point.meta) - np.asarray(along), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_masked_leaves_are_left_out_and_replicas_agree():
    point = network(examples=8)
    curvature = gauss_newton(outputs, loss_of_outputs)
    masked = BilevelProblem(inner=point.problem.inner, outer=point.problem.outer, mask={"first": True, "second": False})
    whole = matrix_of(curvature, point)
    part = point._replace(problem=masked)
    _, info = estimate(implicit(dense(), curvature=curvature), part)
    v = jax.grad(point.problem.outer)(point.params, point.meta, point.outer_batch)["first"]
    size = v.size
    expected = np.linalg.solve(whole[:size, :size], np.asarray(v).ravel())
    np.testing.assert_allclose(np.asarray(info.solution["first"]).ravel(), expected, rtol=1e-9)
    np.testing.assert_array_equal(info.solution["second"], np.zeros_like(point.params["second"]))

    shared = point._replace(meta=jnp.asarray(0.3))
    expected, _ = estimate(implicit(dense(), curvature=curvature), shared)
    averaged = BilevelProblem(
        inner=point.problem.inner, outer=point.problem.outer, reduce=lambda tree: jax.lax.pmean(tree, "device")
    )
    split = jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[1:]), (point.inner_batch, point.outer_batch))
    grads, _ = jax.vmap(
        lambda a, b: implicit(dense(), curvature=curvature)(averaged, point.params, shared.meta, a, b),
        axis_name="device",
    )(*split)
    np.testing.assert_allclose(grads, np.full(4, expected), rtol=1e-9)


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="gauss_newton"):
        gauss_newton(outputs, 3.0)
    with pytest.raises(TypeError, match="fisher"):
        fisher(None, weigh)
    with pytest.raises(TypeError, match="curvature"):
        implicit(dense(), curvature="hessian")
    with pytest.raises(ValueError, match="stacked"):
        implicit(dense(), curvature=fisher(each, weigh), batches="stacked")
    whole_numbers = gauss_newton(lambda p, m, b: jnp.arange(3), loss_of_outputs)
    with pytest.raises(TypeError, match="int"):
        estimate(implicit(dense(), curvature=whole_numbers), network())
    not_reduced = fisher(each, lambda losses, params, meta, batch: losses)
    with pytest.raises(ValueError, match="one number"):
        estimate(implicit(dense(), curvature=not_reduced), network())


def test_a_wrapper_that_takes_anything_is_no_solver():
    made = gauss_newton(outputs, loss_of_outputs)
    seen = []

    def watched(*arguments, **keywords):
        seen.append(arguments)
        return made(*arguments, **keywords)

    point = network()
    run(implicit(dense(), curvature=watched), point)
    assert len(seen) == 1
