"""weighted_loss against sums written out by hand, its safety under masks, and its messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax.formulas.losses import known_targets, masked_mean, masked_means, weighted_loss

LOSSES = {"a": jnp.array([1.0, 2.0, 4.0]), "b": jnp.array([3.0, 5.0])}


def test_sums_task_means_by_hand():
    total = weighted_loss(LOSSES, {"a": 3.0, "b": jnp.array([2.0, 0.5])})
    np.testing.assert_allclose(total, 3 * 7 / 3 + (2 * 3 + 0.5 * 5) / 2, rtol=1e-15)


def test_mean_is_over_labelled_examples():
    masks = {"a": jnp.array([True, False, True])}
    total = weighted_loss(LOSSES, {"a": jnp.array([1.0, 10.0, 2.0]), "b": 1}, masks=masks)
    np.testing.assert_allclose(total, (1 + 8) / 2 + 4, rtol=1e-15)
    np.testing.assert_allclose(weighted_loss(LOSSES, {"a": 2.0}, masks=masks), 5.0, rtol=1e-15)


def test_task_without_weight_is_not_used():
    bad = {**LOSSES, "c": jnp.array([jnp.nan])}
    np.testing.assert_allclose(weighted_loss(bad, {"b": 1.0}), 4.0, rtol=1e-15)


def test_none_mask_and_full_mask_are_alike():
    full = {"a": jnp.ones(3, bool), "b": jnp.ones(2, bool)}
    weights = {"a": 0.3, "b": jnp.array([0.1, 0.7])}
    expected = weighted_loss(LOSSES, weights)
    np.testing.assert_allclose(weighted_loss(LOSSES, weights, masks=full), expected, rtol=1e-15)
    np.testing.assert_allclose(weighted_loss(LOSSES, weights, masks={"a": None}), expected, rtol=1e-15)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_unlabelled_values_reach_neither_value_nor_gradients(bad):
    losses, weights = {"a": jnp.array([1.0, bad])}, {"a": jnp.array([2.0, bad])}
    masks = {"a": jnp.array([True, False])}
    value, grads = jax.value_and_grad(lambda ls, ws: weighted_loss(ls, ws, masks=masks), argnums=(0, 1))(
        losses, weights
    )
    assert value == 2.0
    np.testing.assert_array_equal(grads[0]["a"], [2.0, 0.0])
    np.testing.assert_array_equal(grads[1]["a"], [1.0, 0.0])
    scalar = jax.grad(lambda w: weighted_loss(losses, {"a": w}, masks=masks))(jnp.asarray(3.0))
    assert scalar == 1.0


def test_unlabelled_task_contributes_nothing():
    masks = {"a": jnp.zeros(3, bool)}
    weights = {"a": jnp.array([1.0, 2.0, 3.0]), "b": 1.0}
    value, grads = jax.value_and_grad(lambda ls: weighted_loss(ls, weights, masks=masks))(LOSSES)
    assert value == 4.0
    np.testing.assert_array_equal(grads["a"], np.zeros(3))
    np.testing.assert_array_equal(grads["b"], [0.5, 0.5])


def test_empty_task_contributes_nothing():
    assert weighted_loss({"a": jnp.zeros((0,))}, {"a": 1.0}) == 0.0


def test_gradient_in_weights_is_the_loss_over_the_count():
    masks = {"a": jnp.array([True, True, False])}
    grad = jax.grad(lambda w: weighted_loss(LOSSES, {"a": w}, masks=masks))(jnp.ones(3))
    np.testing.assert_allclose(grad, [0.5, 1.0, 0.0], rtol=1e-15)


def test_jit_and_vmap_agree_with_plain_calls():
    weights = {"a": jnp.array([[1.0], [2.0]]) * jnp.ones((2, 3)), "b": jnp.array([0.5, 3.0])}
    masks = {"a": jnp.array([True, False, True])}
    mapped = jax.vmap(jax.jit(lambda w: weighted_loss(LOSSES, w, masks=masks)))(weights)
    loop = [weighted_loss(LOSSES, jax.tree.map(lambda leaf, i=i: leaf[i], weights), masks=masks) for i in range(2)]
    np.testing.assert_allclose(mapped, jnp.stack(loop), rtol=1e-15)


def test_half_precision_is_summed_in_float32():
    losses = {"a": jnp.full((4096,), 1.0078125, jnp.bfloat16)}
    total = weighted_loss(losses, {"a": 1.0})
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, 1.0078125, rtol=1e-6)


def test_widest_dtype_wins_and_is_kept():
    assert weighted_loss({"a": jnp.ones(2, jnp.float32)}, {"a": 1.0}).dtype == jnp.float32
    mixed = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.float64)}
    assert weighted_loss(mixed, {"a": 1.0, "b": 1.0}).dtype == jnp.float64


def test_plain_float32_with_numpy_arguments(single_precision):
    total = weighted_loss({"a": np.array([1.0, 2.0])}, {"a": np.array([1.0, 3.0])}, masks={"a": np.ones(2, bool)})
    assert total.dtype == jnp.float32
    assert total == 3.5


def test_masked_mean():
    values = jnp.array([1.0, jnp.nan, 3.0])
    mask = jnp.array([True, False, True])
    assert masked_mean(values, mask) == 2.0
    assert masked_mean(values, jnp.zeros(3, bool)) == 0.0
    assert masked_mean(jnp.array([1.0, 2.0])) == 1.5
    np.testing.assert_array_equal(jax.grad(masked_mean)(values, mask), [0.5, 0.0, 0.5])


def test_means_of_tasks_that_can_and_cannot_be_stacked():
    """In the order given, whatever the number of examples, masks and weights; gradients as task by task."""
    keys = jax.random.split(jax.random.key(0), 6)
    sizes = {"z": 4, "b": 3, "a": 4, "c": 4, "d": 3, "e": 4}
    losses = {task: jax.random.normal(key, (n,)) for key, (task, n) in zip(keys, sizes.items(), strict=True)}
    masks = {"a": jnp.array([True, False, True, False]), "c": jnp.zeros(4, bool), "d": jnp.array([True, True, False])}
    weights = {"z": 0.5, "a": jnp.arange(4.0), "c": jnp.ones(4), "d": 2.0, "e": jnp.array([0.0, 1.0, 0.0, 2.0])}
    alone = {task: masked_mean(value, masks.get(task)) for task, value in losses.items()}
    np.testing.assert_allclose(masked_means(losses, masks), list(alone.values()), rtol=1e-14)

    def task_by_task(losses):
        return sum(weighted_loss(losses, {task: weight}, masks=masks) for task, weight in weights.items())

    def together(losses):
        return weighted_loss(losses, weights, masks=masks)

    np.testing.assert_allclose(together(losses), task_by_task(losses), rtol=1e-14)
    expected, found = jax.grad(task_by_task)(losses), jax.grad(together)(losses)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), expected, found)


def test_many_tasks_are_few_operations():
    """Rows of one matrix, taken apart by `jnp.unstack`, are put together again, and nothing is done task by task."""
    names = [f"task_{k}" for k in range(100)]

    def loss(values, mask, weights):
        by_task = [dict(zip(names, jnp.unstack(array), strict=True)) for array in (values, weights, mask)]
        return weighted_loss(by_task[0], by_task[1], masks=by_task[2])

    program = jax.make_jaxpr(loss)(jnp.ones((100, 4)), jnp.ones((100, 4), bool), jnp.ones(100))
    assert len(program.jaxpr.eqns) < 50


@pytest.mark.parametrize(
    ("error", "pieces", "arguments"),
    [
        (
            ValueError,
            ["weights", "rotaton", "Did you mean", "'rotation'"],
            ({"rotation": jnp.ones(2)}, {"rotaton": 1.0}, None),
        ),
        (ValueError, ["masks", "'z'"], (LOSSES, {"a": 1.0}, {"z": jnp.ones(3, bool)})),
        (ValueError, ["one loss per example, not a mean", "()"], ({"a": jnp.ones(())}, {"a": 1.0}, None)),
        (ValueError, ["losses['a']", "(3, 2)"], ({"a": jnp.ones((3, 2))}, {"a": 1.0}, None)),
        (TypeError, ["losses['a']", "int32"], ({"a": jnp.ones(3, jnp.int32)}, {"a": 1.0}, None)),
        (ValueError, ["weights['a']", "(2,)", "(3,)"], (LOSSES, {"a": jnp.ones(2)}, None)),
        (ValueError, ["weights['a']", "(1,)"], (LOSSES, {"a": jnp.ones(1)}, None)),
        (ValueError, ["masks['a']", "(2,)"], (LOSSES, {"a": 1.0}, {"a": jnp.ones(2, bool)})),
        (ValueError, ["masks['a']", "(1,)"], (LOSSES, {"a": jnp.ones(3)}, {"a": jnp.ones(1, bool)})),
        (TypeError, ["masks['a']", "bool"], (LOSSES, {"a": 1.0}, {"a": jnp.ones(3)})),
        (ValueError, ["weights", "empty"], (LOSSES, {}, None)),
        (TypeError, ["losses", "mapping"], (jnp.ones(3), {"a": 1.0}, None)),
        (TypeError, ["weights", "mapping"], (LOSSES, jnp.ones(2), None)),
    ],
)
def test_mistakes_are_named(error, pieces, arguments):
    losses, weights, masks = arguments
    with pytest.raises(error) as caught:
        weighted_loss(losses, weights, masks=masks)
    for piece in ["weighted_loss", *pieces]:
        assert piece in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "options", "clean", "known"),
    [
        ([1.0, np.nan, 3.0], {}, [1.0, 0.0, 3.0], [True, False, True]),
        ([1.0, np.nan, np.inf], {"fill": 0.5}, [1.0, 0.5, np.inf], [True, False, True]),
        ([[1.0, np.nan], [2.0, 3.0]], {}, [[1.0, 0.0], [2.0, 3.0]], [False, True]),
        (np.array([2, -1, 0]), {"missing": -1}, [2, 0, 0], [True, False, True]),
        ([7.0, 999.0], {"missing": 999, "fill": 1}, [7.0, 1.0], [True, False]),
        (np.zeros((0, 2)), {}, np.zeros((0, 2)), []),
    ],
)
def test_known_targets(targets, options, clean, known):
    found, mask = known_targets(targets, **options)
    assert found.dtype == jnp.asarray(targets).dtype
    assert mask.dtype == bool
    np.testing.assert_array_equal(found, clean)
    np.testing.assert_array_equal(mask, known)


def test_known_targets_keep_a_gradient_finite_where_a_mask_alone_does_not():
    targets = jnp.array([1.0, jnp.nan, 3.0])

    def loss(output, targets, mask):
        return weighted_loss({"a": (output - targets) ** 2}, {"a": 1.0}, masks={"a": mask})

    assert jnp.isnan(jax.grad(loss)(2.5, targets, ~jnp.isnan(targets)))
    np.testing.assert_allclose(jax.grad(loss)(2.5, *known_targets(targets)), (3.0 - 1.0) / 2, rtol=1e-15)


def test_known_targets_messages():
    for targets, options in (
        (np.array([True, False]), {"missing": -1}),
        (np.array([1, -1]), {"missing": -1.5}),
        (np.array([1, -1]), {"missing": -1, "fill": 0.7}),
        (np.array([1, 2], np.uint8), {"missing": -1}),
    ):
        with pytest.raises(ValueError, match=r"expected a number that \w+ can hold"):
            known_targets(targets, **options)
    with pytest.raises(TypeError, match=r"known_targets\(missing=\): expected a number, got None"):
        known_targets([1.0], missing=None)
    with pytest.raises(TypeError, match=r"known_targets\(targets=\): int64 has no NaN.*missing=-1"):
        known_targets(np.array([0, -1]))
    with pytest.raises(ValueError, match=r"known_targets\(targets=\): expected \[n\]"):
        known_targets(jnp.nan)
