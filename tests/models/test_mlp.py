"""The MLP against its matrix products, and the names of its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax.formulas.partition import mask_by_path
from auxjax.models import MLP, Outputs

MODEL = MLP(heads={"species": 3, "rotation": 4}, hidden=(5, 6), param_dtype=jnp.float64)
X = jnp.asarray(np.random.default_rng(0).normal(size=(7, 2, 2)))
VARIABLES = jax.jit(MODEL.init)(jax.random.key(1), X)


def test_equals_its_matrix_products():
    p = VARIABLES["params"]
    x = X.reshape(7, 4)
    for name in ("trunk_0", "trunk_1"):
        x = jnp.maximum(x @ p[name]["kernel"] + p[name]["bias"][None, :], 0.0)
    out = jax.jit(MODEL.apply)(VARIABLES, X)
    assert isinstance(out, Outputs)
    np.testing.assert_allclose(out.features, x, rtol=1e-13)
    for task in ("species", "rotation"):
        head = p[f"head_{task}"]
        np.testing.assert_allclose(out.heads[task], x @ head["kernel"] + head["bias"][None, :], rtol=1e-12)


def test_trunk_is_found_by_path():
    mask = mask_by_path(VARIABLES, lambda path: "/trunk" in path)["params"]
    assert {name for name, flags in mask.items() if all(jax.tree.leaves(flags))} == {"trunk_0", "trunk_1"}
    assert set(mask) == {"trunk_0", "trunk_1", "head_species", "head_rotation"}


def test_heads_get_no_gradient_from_other_tasks():
    grads = jax.grad(lambda v: jnp.sum(MODEL.apply(v, X).heads["species"] ** 2))(VARIABLES)["params"]
    np.testing.assert_array_equal(grads["head_rotation"]["kernel"], np.zeros((6, 4)))


def test_without_hidden_layers_it_is_linear():
    model = MLP(heads={"a": 1}, hidden=(), param_dtype=jnp.float64)
    out, _ = model.init_with_output(jax.random.key(0), X)
    np.testing.assert_array_equal(out.features, X.reshape(7, 4))


def test_default_is_float32_and_computation_may_be_half(single_precision):
    model = MLP(heads={"a": 2}, hidden=(3,), dtype=jnp.bfloat16)
    out, variables = model.init_with_output(jax.random.key(0), jnp.ones((2, 4), jnp.uint8), train=True)
    assert out.features.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("piece", "heads", "shape"),
    [("outputs", {"a": 0}, (2, 3)), ("separates", {"a/b": 1}, (2, 3)), (r"\(3,\)", {"a": 1}, (3,))],
)
def test_mistakes_are_named(piece, heads, shape):
    with pytest.raises(ValueError, match=piece):
        MLP(heads=heads).init(jax.random.key(0), jnp.ones(shape, jnp.float32))
