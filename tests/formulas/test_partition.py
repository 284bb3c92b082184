"""Leaves taken out by a mask and put back, and masks made from paths."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax.formulas.partition import checked_mask, mask_by_path, partition

PARAMS = {
    "params": {
        "trunk_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)},
        "head_a": {"kernel": jnp.full((3, 1), 2.0)},
        "list": [jnp.array(4.0), jnp.array(5.0)],
    }
}


def test_selects_in_the_order_of_leaves_and_merges_back():
    mask = mask_by_path(PARAMS, lambda path: "trunk" in path)
    selected, merge = partition(PARAMS, mask)
    chex.assert_trees_all_equal(selected, [PARAMS["params"]["trunk_0"]["bias"], PARAMS["params"]["trunk_0"]["kernel"]])
    chex.assert_trees_all_equal(merge(selected), PARAMS)
    replaced = merge([leaf + 1 for leaf in selected])
    np.testing.assert_array_equal(replaced["params"]["trunk_0"]["bias"], np.ones(3))
    chex.assert_trees_all_equal(replaced["params"]["head_a"], PARAMS["params"]["head_a"])


def test_prefixes_and_single_bools():
    assert len(partition(PARAMS, True)[0]) == 5
    selected, _ = partition(PARAMS, {"params": {"trunk_0": True, "head_a": False, "list": [False, np.True_]}})
    assert [leaf.shape for leaf in selected] == [(), (3,), (2, 3)]
    assert selected[0] == 5.0


def test_paths_are_joined_by_slashes():
    paths = []
    mask_by_path(PARAMS, lambda path: paths.append(path) or True)
    assert paths == [
        "params/head_a/kernel",
        "params/list/0",
        "params/list/1",
        "params/trunk_0/bias",
        "params/trunk_0/kernel",
    ]


def test_gradient_of_the_selected_is_that_part_of_the_whole_gradient():
    def loss(params):
        p = params["params"]
        return jnp.sum((jnp.sin(p["trunk_0"]["kernel"]) @ p["head_a"]["kernel"]) ** 2) * p["list"][1]

    selected, merge = partition(PARAMS, mask_by_path(PARAMS, lambda path: path.endswith("kernel")))
    part = jax.jit(jax.grad(lambda leaves: loss(merge(leaves))))(selected)
    whole = jax.grad(loss)(PARAMS)["params"]
    chex.assert_trees_all_close(part, [whole["head_a"]["kernel"], whole["trunk_0"]["kernel"]], rtol=1e-14)


def test_works_on_traced_params_under_jit_and_vmap():
    def total(params):
        selected, merge = partition(params, {"params": {"trunk_0": True, "head_a": False, "list": False}})
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(merge([2 * leaf for leaf in selected])))

    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), PARAMS)
    expected = [total(PARAMS), total(jax.tree.map(lambda leaf: leaf + 1, PARAMS))]
    np.testing.assert_allclose(jax.jit(jax.vmap(total))(batch), jnp.stack(expected), rtol=1e-15)


@pytest.mark.parametrize(
    ("error", "piece", "call"),
    [
        (ValueError, "params/trunk_0/bias", lambda: mask_by_path(PARAMS, lambda path: "Dense" in path)),
        (ValueError, "params/head_a/kernel", lambda: partition(PARAMS, False)),
        (ValueError, "prefix", lambda: partition(PARAMS, {"weights": True})),
        (TypeError, "bool", lambda: partition(PARAMS, 1)),
        (TypeError, "outside", lambda: jax.jit(lambda mask: partition(PARAMS, mask)[0])(True)),
        (ValueError, "no leaves", lambda: mask_by_path({}, lambda path: True)),
        (ValueError, "got 1 leaves", lambda: partition(PARAMS, True)[1]([jnp.ones(())])),
    ],
)
def test_mistakes_are_named(error, piece, call):
    with pytest.raises(error, match=piece):
        call()


def test_long_lists_of_paths_are_cut():
    with pytest.raises(ValueError, match="and 20 more"):
        mask_by_path([jnp.zeros(())] * 60, lambda path: False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A pytree that can be called, as modules are."""

    kernel: object
    bias: object

    def __call__(self, x):
        return x @ self.kernel + self.bias


def test_bools_in_a_module_are_bools_and_no_predicate():
    params = Module(jnp.ones((2, 2)), jnp.zeros(2))
    assert checked_mask("trunk", params, Module(True, False)) == Module(True, False)
    with pytest.raises(ValueError, match="trunk chooses no leaf"):
        checked_mask("trunk", params, Module(False, False))
