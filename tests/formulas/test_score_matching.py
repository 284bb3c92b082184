"""ARML's gradient by two passes against gradients written out one by one, and against automatic differentiation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax.formulas.partition import mask_by_path
from auxjax.formulas.score_matching import fisher_divergence, score_matching_gradient, score_matching_value_and_gradient
from auxjax.formulas.simplex import project_simplex, simplex_quadratic_program

K = 4
INPUTS = jnp.asarray(np.random.default_rng(1).normal(size=(7, 3)))
TARGETS = jnp.asarray(np.random.default_rng(2).normal(size=(7, K + 1)))
PARAMS = {
    "trunk": {"w": jax.random.normal(jax.random.key(3), (3, 5)), "b": jnp.zeros(5)},
    "head": jax.random.normal(jax.random.key(4), (5, K + 1)),
}
WEIGHTS = jnp.array([0.7, -0.2, 1.3, 0.0])
TRUNK = {"trunk": True, "head": False}


def losses(params):
    hidden = jnp.tanh(INPUTS @ params["trunk"]["w"] + params["trunk"]["b"][None, :])
    return jnp.mean(jnp.square(hidden @ params["head"] - TARGETS), axis=0)


def dense_gradients(trunk):
    """`[K + 1, p]`: all gradients as rows, by reverse mode, on the chosen leaves."""
    jacobian = jax.jit(jax.jacrev(losses))(PARAMS)
    kept = jacobian if trunk is None else jacobian["trunk"]
    return jnp.concatenate([leaf.reshape(K + 1, -1) for leaf in jax.tree.leaves(kept)], axis=1)


@pytest.mark.parametrize("trunk", [None, TRUNK])
def test_equals_the_gradients_one_by_one(trunk):
    rows = dense_gradients(trunk)
    residual = rows[0] - WEIGHTS @ rows[1:]
    result = jax.jit(lambda w: score_matching_value_and_gradient(losses, PARAMS, w, trunk=trunk))(WEIGHTS)
    np.testing.assert_allclose(result.divergence, residual @ residual, rtol=1e-13)
    np.testing.assert_allclose(result.products, rows @ residual, rtol=1e-12)
    np.testing.assert_allclose(result.gradient, -2 * rows[1:] @ residual, rtol=1e-12)
    np.testing.assert_allclose(result.losses, losses(PARAMS), rtol=1e-14)
    alone = score_matching_gradient(losses, PARAMS, WEIGHTS, trunk=trunk)
    np.testing.assert_allclose(alone, result.gradient, rtol=1e-12)


def test_equals_automatic_differentiation_of_the_divergence():
    jacobian = jax.jacrev(losses)(PARAMS)
    primary, tasks = jax.tree.map(lambda leaf: leaf[0], jacobian), jax.tree.map(lambda leaf: leaf[1:], jacobian)
    value, gradient = jax.value_and_grad(fisher_divergence, argnums=2)(primary, tasks, WEIGHTS)
    result = score_matching_value_and_gradient(losses, PARAMS, WEIGHTS)
    np.testing.assert_allclose(result.divergence, value, rtol=1e-13)
    np.testing.assert_allclose(result.gradient, gradient, rtol=1e-12)


def test_is_the_gram_form():
    rows = dense_gradients(None)
    gram, linear = rows[1:] @ rows[1:].T, rows[1:] @ rows[0]
    np.testing.assert_allclose(
        score_matching_gradient(losses, PARAMS, WEIGHTS), 2 * (gram @ WEIGHTS - linear), rtol=1e-12
    )


def test_trunk_by_path_and_by_full_mask_are_alike():
    by_path = mask_by_path(PARAMS, lambda path: path.startswith("trunk/"))
    np.testing.assert_array_equal(
        score_matching_gradient(losses, PARAMS, WEIGHTS, trunk=by_path),
        score_matching_gradient(losses, PARAMS, WEIGHTS, trunk=TRUNK),
    )


def test_fisher_divergence_by_hand():
    primary = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    tasks = {"a": jnp.array([[1.0, 0.0], [0.0, 1.0]]), "b": jnp.array([1.0, 1.0])}
    assert fisher_divergence(primary, tasks, jnp.array([0.5, 1.0])) == 0.5**2 + 1.0**2 + 1.5**2


def test_is_zero_with_zero_gradient_where_an_auxiliary_task_equals_the_primary_one():
    twin = lambda params: jnp.stack([losses(params)[0]] * 2)  # noqa: E731
    result = score_matching_value_and_gradient(twin, PARAMS, jnp.ones(1))
    assert result.divergence == 0.0
    np.testing.assert_array_equal(result.gradient, [0.0])
    jacobian = jax.jacrev(twin)(PARAMS)
    parts = [jax.tree.map(lambda leaf, s=s: leaf[s], jacobian) for s in (0, slice(1, None))]
    np.testing.assert_array_equal(jax.grad(fisher_divergence, argnums=2)(*parts, jnp.ones(1)), [0.0])


def test_jit_and_vmap_agree_with_plain_calls():
    batch = jnp.stack([WEIGHTS, 2 * WEIGHTS, jnp.ones(K)])
    function = lambda w: score_matching_value_and_gradient(losses, PARAMS, w, trunk=TRUNK)  # noqa: E731
    mapped = jax.jit(jax.vmap(function))(batch)
    loop = jax.tree.map(lambda *parts: jnp.stack(parts), *[function(w) for w in batch])
    chex.assert_trees_all_close(mapped, loop, rtol=1e-12)


@pytest.mark.slow
def test_vmap_over_params():
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), PARAMS)
    mapped = jax.vmap(lambda p: score_matching_gradient(losses, p, WEIGHTS))(batch)
    loop = [score_matching_gradient(losses, jax.tree.map(lambda leaf, i=i: leaf[i], batch), WEIGHTS) for i in range(2)]
    np.testing.assert_allclose(mapped, jnp.stack(loop), rtol=1e-12)


def test_is_differentiable_itself():
    """The gradient of a quadratic is linear in the weights: its Jacobian is twice the Gram matrix."""
    rows = dense_gradients(None)[1:]
    jacobian = jax.jit(jax.jacfwd(lambda w: score_matching_gradient(losses, PARAMS, w)))(WEIGHTS)
    np.testing.assert_allclose(jacobian, 2 * rows @ rows.T, rtol=1e-11)
    reverse = jax.jit(jax.jacrev(lambda w: score_matching_gradient(losses, PARAMS, w)))(WEIGHTS)
    np.testing.assert_allclose(reverse, jacobian, rtol=1e-11)


def test_losses_are_traced_once():
    traced = chex.assert_max_traces(losses, n=1)
    jax.jit(lambda w: score_matching_gradient(traced, PARAMS, w))(WEIGHTS)


def test_number_of_operations_does_not_grow_with_the_number_of_tasks():
    """The trunk is as wide as it is; only the last layer may grow with K, far less than K gradients would."""

    def flops(tasks):
        head = jnp.ones((32, tasks + 1))

        def many(trunk):
            return jnp.mean(jnp.tanh(jnp.tanh(jnp.ones((64, 256)) @ trunk["a"]) @ trunk["b"]) @ head, axis=0)

        params = {"a": jnp.ones((256, 256)), "b": jnp.ones((256, 32))}
        function = jax.jit(lambda p, w: score_matching_gradient(many, p, w))
        return function.lower(params, jnp.ones(tasks)).compile().cost_analysis()["flops"]

    assert flops(64) < 1.2 * flops(2)


def test_scan_inside_the_losses():
    def scanned(params):
        body = lambda h, w: (jnp.tanh(w @ h), None)  # noqa: E731
        return jax.lax.scan(body, jnp.ones(3), params["w"])[0]

    params = {"w": jax.random.normal(jax.random.key(5), (4, 3, 3)), "steps": jnp.array(3)}
    rows = jax.jacrev(lambda w: scanned({"w": w}))(params["w"]).reshape(3, -1)
    weights = jnp.array([0.5, 2.0])
    expected = -2 * rows[1:] @ (rows[0] - weights @ rows[1:])
    np.testing.assert_allclose(score_matching_gradient(scanned, params, weights), expected, rtol=1e-12)


def test_half_precision_leaves_are_accumulated_in_float32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)

    def low(p):
        return losses(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), p)).astype(jnp.float32)

    result = score_matching_value_and_gradient(low, params, WEIGHTS.astype(jnp.float32))
    assert result.divergence.dtype == result.gradient.dtype == jnp.float32
    primary = {"a": jnp.full(4096, 1.0, jnp.bfloat16)}
    tasks = {"a": jnp.zeros((1, 4096), jnp.bfloat16)}
    assert fisher_divergence(primary, tasks, jnp.ones(1, jnp.bfloat16)) == 4096.0


def test_plain_float32(single_precision):
    params = {"a": np.array([1.0, -2.0]), "n": np.array(3)}
    gradient = jax.jit(score_matching_gradient, static_argnums=0)(
        lambda p: jnp.stack([p["a"][0] ** 2, p["a"] @ p["a"]]), params, np.ones(1)
    )
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, [-2 * (2 * 0 + -4 * 4)], rtol=1e-6)


def test_regression_with_a_helpful_and_a_harmful_task():
    """Primary and helpful task share the solution (1, 1), the harmful one has (-1, -4): all weight goes to the helper.

    The regression problem of Shamsian et al. (AuxiNash, ICML 2023), without its noise.
    """
    x = jax.random.normal(jax.random.key(6), (1000, 2))
    solutions = jnp.array([[1.0, 1.0], [1.0, 1.0], [-1.0, -4.0]])

    def regressions(theta):
        return jnp.mean(jnp.square(x @ (theta[:, None] - solutions.T)), axis=0)

    theta = jnp.array([0.3, -2.0])

    def step(_, weights):
        gradient = score_matching_gradient(regressions, theta, weights)
        return project_simplex(weights - 0.002 * gradient, 1.0)

    weights = jax.lax.fori_loop(0, 300, step, jnp.array([0.5, 0.5]))
    rows = jax.jacrev(regressions)(theta)
    exact = simplex_quadratic_program(rows[1:] @ rows[1:].T, rows[1:] @ rows[0], 1.0)
    np.testing.assert_allclose(exact, [1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(weights, [1.0, 0.0], atol=1e-12)


@pytest.mark.parametrize(
    ("error", "piece", "call"),
    [
        (ValueError, "5 losses for 3 weights", lambda: score_matching_gradient(losses, PARAMS, jnp.ones(3))),
        (ValueError, "stack", lambda: score_matching_gradient(lambda p: losses(p)[0], PARAMS, WEIGHTS)),
        (ValueError, "tuple", lambda: score_matching_gradient(lambda p: tuple(losses(p)), PARAMS, WEIGHTS)),
        (ValueError, "weights", lambda: score_matching_gradient(losses, PARAMS, jnp.ones((1, K)))),
        (ValueError, "weights", lambda: score_matching_gradient(losses, PARAMS, jnp.ones(K, int))),
        (ValueError, "no leaf", lambda: score_matching_gradient(losses, PARAMS, WEIGHTS, trunk=False)),
        (TypeError, "int", lambda: score_matching_gradient(lambda p: losses(p).astype(int), PARAMS, WEIGHTS)),
        (ValueError, r"\(2, 3\)", lambda: fisher_divergence(jnp.ones(3), jnp.ones((3, 3)), jnp.ones(2))),
        (ValueError, "structure", lambda: fisher_divergence([jnp.ones(3)], jnp.ones((2, 3)), jnp.ones(2))),
    ],
)
def test_mistakes_are_named(error, piece, call):
    with pytest.raises(error, match=piece):
        call()
