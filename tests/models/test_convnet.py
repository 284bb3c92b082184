"""The ConvNet: shapes and names, an example by hand, normalisation and its state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax.formulas.partition import mask_by_path
from auxjax.models import ConvNet

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9, 8, 2)))


def make(**options):
    options = {"heads": {"a": 2, "b": 1}, "channels": (4, 6), "param_dtype": jnp.float64, **options}
    model = ConvNet(**options)
    return model, model.init(jax.random.key(1), X)


@pytest.mark.parametrize("norm", ["none", pytest.param("group", marks=pytest.mark.slow), "batch"])
def test_shapes_names_and_trunk(norm):
    model, variables = make(norm=norm, dense=(5,))
    out = jax.jit(model.apply)(variables, X)
    assert out.features.shape == (3, 5)
    assert {task: values.shape for task, values in out.heads.items()} == {"a": (3, 2), "b": (3, 1)}
    names = {"trunk_conv_0", "trunk_conv_1", "trunk_dense_0", "head_a", "head_b"}
    names |= set() if norm == "none" else {"trunk_norm_0", "trunk_norm_1"}
    assert set(variables["params"]) == names
    mask = mask_by_path(variables["params"], lambda path: path.startswith("trunk_"))
    assert {name for name in mask if any(jax.tree.leaves(mask[name]))} == names - {"head_a", "head_b"}


def test_one_stage_by_hand():
    """A kernel that copies the first channel: ReLU, then the mean over the (even part of the) image."""
    model, variables = make(channels=(1,), heads={"a": 1})
    kernel = jnp.zeros((3, 3, 2, 1)).at[1, 1, 0, 0].set(1.0)
    params = {**variables["params"], "trunk_conv_0": {"kernel": kernel, "bias": jnp.zeros(1)}}
    features = model.apply({"params": params}, X).features
    np.testing.assert_allclose(features[:, 0], np.maximum(X[:, :8, :, 0], 0).mean((1, 2)), rtol=1e-13)


def test_batch_norm_updates_its_statistics_only_in_training():
    model, variables = make(norm="batch", momentum=0.5)
    still, state = model.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_array_equal(state["batch_stats"]["trunk_norm_0"]["mean"], np.zeros(4))
    moving, state = model.apply(variables, X, train=True, mutable=["batch_stats"])
    assert np.all(state["batch_stats"]["trunk_norm_0"]["mean"] != 0)
    assert np.any(still.features != moving.features)


@pytest.mark.parametrize("norm", ["none", "group"])
def test_examples_do_not_see_each_other(norm):
    model, variables = make(norm=norm)
    alone = jnp.concatenate([model.apply(variables, X[i : i + 1], train=True).features for i in range(3)])
    np.testing.assert_allclose(model.apply(variables, X, train=True).features, alone, rtol=1e-12)


def test_group_norm_does_not_see_the_scale_of_its_input():
    model, variables = make(norm="group", channels=(4,))
    np.testing.assert_allclose(
        model.apply(variables, 1e3 * X).features, model.apply(variables, 1e4 * X).features, rtol=1e-6
    )


def test_dtypes(single_precision):
    model = ConvNet(heads={"a": 2}, channels=(4,), norm="batch", dtype=jnp.bfloat16)
    out, variables = model.init_with_output(jax.random.key(0), jnp.ones((2, 4, 4, 3), jnp.uint8), train=True)
    assert out.heads["a"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("piece", "options", "shape"),
    [
        ("layer", {"norm": "layer"}, (1, 8, 8, 1)),
        ("at least 8", {"channels": (1, 1, 1)}, (1, 8, 7, 1)),
        ("expected", {}, (8, 8, 1)),
    ],
)
def test_mistakes_are_named(piece, options, shape):
    with pytest.raises(ValueError, match=piece):
        ConvNet(heads={"a": 1}, **options).init(jax.random.key(0), jnp.ones(shape, jnp.float32))
