"""VGG: its layers by the paper's count, names, an example by hand, normalisation, second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax._internal.tree_math import all_finite, vdot
from auxjax.formulas.partition import mask_by_path
from auxjax.models import VGG, layers

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32, 32, 2)))
SMALL = {"heads": {"a": 2, "b": 1}, "depth": 11, "width": 2, "hidden": (5,), "param_dtype": jnp.float64}


def make(x=X, **options):
    """A model and variables of the right sizes, drawn by NumPy: compiling the initialisation takes longer than a test.

    Kernels keep the scale of what passes through; what stands in for biases, scales and statistics is positive.
    """
    model = VGG(**SMALL | options)
    rng = np.random.default_rng(0)

    def draw(leaf):
        if len(leaf.shape) == 1:
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape))
        return jnp.asarray(rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape))

    return model, jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(1), x))


@pytest.mark.parametrize(("depth", "weights"), [(11, 9_220_480), (13, 9_404_992), (16, 14_714_688), (19, 20_024_384)])
def test_the_published_networks_by_their_number_of_weights(depth, weights):
    model = VGG(heads={"a": 20, "b": 100}, depth=depth, norm="none")
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 32, 32, 3), jnp.float32))
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(layer)) for name, layer in variables["params"].items()}
    heads = {"head_a_hidden_0": 512 * 513, "head_a": 513 * 20, "head_b_hidden_0": 512 * 513, "head_b": 513 * 100}
    assert {name: size for name, size in sizes.items() if name.startswith("head_")} == heads
    assert sum(size for name, size in sizes.items() if name.startswith("trunk_conv_")) == weights
    assert sum(sizes.values()) == weights + sum(heads.values())


@pytest.mark.parametrize("norm", ["none", "group", "batch"])
def test_shapes_names_and_trunk(norm):
    model, variables = make(norm=norm, depth=13, hidden=(5, 4))
    out = jax.eval_shape(model.apply, variables, X)
    assert out.features.shape == (3, 16)
    assert {task: values.shape for task, values in out.heads.items()} == {"a": (3, 2), "b": (3, 1)}
    kinds = ["conv"] if norm == "none" else ["conv", "norm"]
    trunk = {f"trunk_{kind}_{block}_{i}" for kind in kinds for block in range(5) for i in range(2)}
    heads = {f"head_{task}{layer}" for task in "ab" for layer in ("", "_hidden_0", "_hidden_1")}
    assert set(variables["params"]) == trunk | heads
    mask = mask_by_path(variables["params"], lambda path: "trunk_" in path)
    assert {name for name in mask if any(jax.tree.leaves(mask[name]))} == trunk


def test_linear_heads():
    assert {name for name in make(hidden=())[1]["params"] if "head" in name} == {"head_a", "head_b"}


@pytest.mark.slow
def test_kernels_that_copy_by_hand():
    """All layers pass on the first channel: the largest pixel of every 32x32 tile, then the mean over tiles."""
    x = jax.random.normal(jax.random.key(2), (2, 70, 33, 2))
    model, variables = make(x, norm="none", width=1)
    params = {
        name: {"kernel": jnp.zeros_like(layer["kernel"]).at[1, 1, 0, 0].set(1.0), "bias": jnp.zeros_like(layer["bias"])}
        if name.startswith("trunk_")
        else layer
        for name, layer in variables["params"].items()
    }
    out = model.apply({"params": params}, x)
    tiles = np.asarray(x)[:, :64, :32, 0].reshape(2, 2, 32, 32)
    np.testing.assert_allclose(out.features[:, 0], tiles.max((2, 3)).mean(1), rtol=1e-13)
    np.testing.assert_array_equal(out.features[:, 1:], 0)
    hidden, last = (jax.tree.map(np.asarray, params[name]) for name in ("head_a_hidden_0", "head_a"))
    by_hand = (
        np.maximum(np.asarray(out.features) @ hidden["kernel"] + hidden["bias"], 0) @ last["kernel"] + last["bias"]
    )
    np.testing.assert_allclose(out.heads["a"], by_hand, rtol=1e-12)


@pytest.mark.slow
def test_batch_norm_updates_its_statistics_only_in_training():
    model, variables = make()
    still, state = model.apply(variables, X, mutable=["batch_stats"])
    last = variables["batch_stats"]["trunk_norm_4_1"]["mean"]
    np.testing.assert_array_equal(state["batch_stats"]["trunk_norm_4_1"]["mean"], last)
    moving, state = model.apply(variables, X, train=True, mutable=["batch_stats"])
    assert np.all(state["batch_stats"]["trunk_norm_4_1"]["mean"] != last)
    assert np.any(still.features != moving.features)


@pytest.mark.parametrize("norm", ["none", "group"])
def test_examples_do_not_see_each_other(norm):
    model, variables = make(norm=norm)
    apply = jax.jit(lambda x: model.apply(variables, x, train=True).features)
    alone = jnp.concatenate([apply(X[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(apply(X), alone, rtol=1e-10, atol=1e-12)


def problem(norm, x):
    """A loss of the params that no layer leaves flat, and a direction."""
    model, variables = make(norm=norm)
    params = variables.pop("params")

    def loss(params):
        out, _ = model.apply({"params": params, **variables}, x, train=True, mutable=["batch_stats"])
        return sum(jnp.sum(jnp.sin(scores)) for scores in out.heads.values())

    keys = iter(jax.random.split(jax.random.key(3), len(jax.tree.leaves(params))))
    return loss, params, jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape, leaf.dtype), params)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [pytest.param("none", marks=pytest.mark.slow), "batch"])
def test_products_with_the_hessian(norm):
    """Forward over reverse, reverse over reverse and differences of the gradient agree, through ReLU and maximum."""
    loss, params, direction = problem(norm, X)
    gradient = jax.grad(loss)

    @jax.jit
    def products(params):
        forward = jax.jvp(gradient, (params,), (direction,))[1]
        return forward, jax.grad(lambda params: vdot(gradient(params), direction))(params)

    @jax.jit
    def at(step):
        return gradient(jax.tree.map(lambda leaf, change: leaf + step * change, params, direction))

    forward, reverse = products(params)
    step = 1e-7
    differences = jax.tree.map(lambda more, less: (more - less) / (2 * step), at(step), at(-step))
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(forward))
    assert scale > 0
    for name, found in forward.items():
        for part, value in found.items():
            np.testing.assert_allclose(value, reverse[name][part], rtol=1e-9, atol=1e-11 * scale)
            np.testing.assert_allclose(value, differences[name][part], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [pytest.param("group", marks=pytest.mark.slow), "batch"])
def test_products_stay_finite_where_all_pixels_are_equal(norm):
    loss, params, direction = problem(norm, jnp.zeros_like(X))
    found = jax.jit(lambda params: jax.jvp(jax.grad(loss), (params,), (direction,)))(params)
    assert all_finite(found)


def test_max_pooling():
    x = jnp.arange(2.0 * 5 * 3 * 2).reshape(2, 5, 3, 2).at[0, 1, 0, 1].set(99.0)
    expected = np.asarray(x)[:, :4, :2].reshape(2, 2, 2, 1, 2, 2).max((2, 4))
    np.testing.assert_array_equal(layers.max_pool(x), expected)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert np.isnan(layers.max_pool(jnp.zeros((1, 2, 2, 1)).at[0, row, column, 0].set(np.nan))).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow)])
def test_max_pooling_behind_normalisations_has_the_same_gradient_compiled(dtype):
    """The gradient of `jnp.max` does not: it compares what it kept with what the compiler computes anew."""
    x = jax.random.normal(jax.random.key(0), (12, 4), dtype)

    def normal(x):
        mean = jnp.mean(x, axis=0, keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=0, keepdims=True) - jnp.square(mean)
        return (x - mean) * jax.lax.rsqrt(variance + jnp.asarray(1e-5, dtype))

    def loss(x):
        return jnp.sum(jnp.sin(layers.max_pool(normal(normal(x)).reshape(12, 2, 2, 1))))

    tolerance = 1e-4 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), jax.grad(loss)(x), rtol=0, atol=tolerance)


def test_dtypes(single_precision):
    model = VGG(heads={"a": 2}, depth=11, width=2, hidden=(3,), dtype=jnp.bfloat16)
    images = jnp.ones((2, 32, 32, 3), jnp.uint8)
    out, variables = jax.eval_shape(lambda key: model.init_with_output(key, images, train=True), jax.random.key(0))
    assert out.heads["a"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("message", "options", "shape"),
    [
        (r"VGG\(depth=12\): expected 11, 13, 16 or 19\.", {"depth": 12}, (1, 32, 32, 1)),
        (r"VGG\(norm='layer'\): expected 'none', 'group' or 'batch'", {"norm": "layer"}, (1, 32, 32, 1)),
        (r"VGG\(x\) has shape \(1, 32, 31, 1\); expected .* at least 32, .* use ConvNet", {}, (1, 32, 31, 1)),
        (r"VGG\(x\) has shape \(32, 32, 1\); expected \[n, h, w, c\]", {}, (32, 32, 1)),
        (r"VGG\(heads\['a'\]\) is 0; expected the number of outputs", {"heads": {"a": 0}}, (1, 32, 32, 1)),
    ],
)
def test_mistakes_are_named(message, options, shape):
    model = VGG(**SMALL | options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.ones(shape))
