"""Soft labels against numbers by hand and by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from auxjax.formulas.soft_labels import (
    block_of,
    focal_losses,
    in_block,
    masked_softmax,
    mean_entropy,
    mean_label,
    negative_entropy,
)

LABELS = jnp.array([1, 0, 2, 1], jnp.int32)


def logits_of(scale=1.0, dtype=jnp.float64):
    return jnp.array(scale * np.random.default_rng(0).normal(size=(4, 6)), dtype)


def test_masked_softmax_is_the_softmax_of_the_block():
    found = np.asarray(masked_softmax(logits_of(), LABELS, 2))
    for row, logits, label in zip(found, np.asarray(logits_of()), LABELS, strict=True):
        inside = np.exp(logits[2 * label : 2 * label + 2])
        wanted = np.zeros(6)
        wanted[2 * label : 2 * label + 2] = inside / inside.sum()
        np.testing.assert_allclose(row, wanted, rtol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1e4, -1e4, 5e37])
def test_rows_sum_to_one_inside_the_block_for_huge_logits(scale, dtype):
    found = masked_softmax(logits_of(scale, dtype), LABELS, 2)
    assert np.all(np.isfinite(found))
    inside = block_of(found, LABELS, 2)
    np.testing.assert_allclose(jnp.sum(inside, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(in_block(inside, LABELS, 3), found)


def test_a_block_far_below_the_others_does_not_vanish():
    logits = jnp.array([[1e4, 1e4, -1e4, -1e4 + 1.0]], jnp.float32)
    found = masked_softmax(logits, jnp.array([1], jnp.int32), 2)
    np.testing.assert_allclose(found[0], [0, 0, 1 / (1 + np.e), np.e / (1 + np.e)], rtol=1e-6)


def test_masked_softmax_has_finite_derivatives_at_huge_logits():
    gradient = jax.grad(lambda z: jnp.sum(masked_softmax(z, LABELS, 2) ** 2))(logits_of(1e4))
    assert np.all(np.isfinite(gradient))


def test_focal_losses_by_hand():
    probabilities = np.array([0.5, 0.3, 0.2])
    found = focal_losses(jnp.log(jnp.array(probabilities))[None, :])
    np.testing.assert_allclose(found[0], -((1 - probabilities) ** 2) * np.log(probabilities), rtol=1e-12)
    cross_entropy = focal_losses(logits_of(), gamma=0)
    wanted = optax.softmax_cross_entropy(logits_of(), jax.nn.one_hot(LABELS, 6, dtype=jnp.float64))
    np.testing.assert_allclose(jnp.take_along_axis(cross_entropy, LABELS[:, None], 1)[:, 0], wanted, rtol=1e-12)


def test_focal_losses_of_sure_predictions_are_finite_and_so_are_their_derivatives():
    logits = jnp.array([[200.0, 0.0], [0.0, 0.0]], jnp.float32)
    for order in (
        lambda z: jnp.sum(focal_losses(z)),
        lambda z: jnp.sum(jax.grad(lambda y: jnp.sum(focal_losses(y)))(z)),
    ):
        assert np.all(np.isfinite(jax.grad(order)(logits)))
    assert focal_losses(logits)[0, 0] == 0


def test_entropies():
    labels = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.2, 0.3, 0.5]])
    mask = jnp.array([True, True, False])
    np.testing.assert_allclose(mean_label(labels, mask), [0.5, 0.25, 0.25])
    np.testing.assert_allclose(mean_entropy(labels, mask), np.log(2) / 2, rtol=1e-12)
    np.testing.assert_allclose(negative_entropy(mean_label(labels, mask)), 0.5 * np.log(0.5) + 0.5 * np.log(0.25))
    assert mean_entropy(labels[:1]) == 0
    assert negative_entropy(mean_label(labels, jnp.zeros(3, bool))) == 0


def test_the_gradient_of_the_negative_entropy():
    usage = jnp.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose(jax.grad(negative_entropy)(usage), np.log(usage) + 1, rtol=1e-12)


@pytest.mark.slow
def test_replicas_have_the_gradient_of_the_whole_batch():
    logits = logits_of()

    def value(z, labels, reduce):
        return negative_entropy(mean_label(masked_softmax(z, labels, 2)), reduce)

    whole = jax.grad(value)(logits, LABELS, lambda tree: tree)

    def part(z, labels):
        return jax.grad(value)(z, labels, lambda tree: jax.lax.pmean(tree, "device"))

    parts = jax.vmap(part, axis_name="device")(logits.reshape(2, 2, 6), LABELS.reshape(2, 2))
    # Each replica's gradient counts half, as in a mean over replicas.
    np.testing.assert_allclose(parts.reshape(4, 6) / 2, whole, rtol=1e-12)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="whole number of blocks of sub_classes=4"):
        masked_softmax(logits_of(), LABELS, 4)
    with pytest.raises(ValueError, match="expected"):
        masked_softmax(logits_of(), LABELS[:2], 2)
    with pytest.raises(TypeError, match="expected integers"):
        block_of(logits_of(), LABELS.astype(jnp.float32), 2)


@pytest.mark.parametrize(
    "gamma", [pytest.param(0.5, marks=pytest.mark.slow), 1.5, pytest.param(2.0, marks=pytest.mark.slow)]
)
def test_derivatives_of_focal_losses_near_and_at_sure_predictions(gamma):
    """-(1 - p)^gamma log p of two classes by hand; where p rounds to 1, loss and derivatives are at their limit, 0."""

    def sure(z):
        return focal_losses(jnp.array([z, 0.0]), gamma=gamma)[0]

    @jax.jit
    @jax.vmap
    def found(z):
        return sure(z), jax.grad(sure)(z), jax.grad(jax.grad(sure))(z)

    z, step = np.array([-3.0, 0.5, 8.0, 14.0]), 1e-4
    _, slopes, curvatures = found(z)
    p, q = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
    np.testing.assert_allclose(slopes, q * (gamma * q ** (gamma - 1) * p * np.log(p) - q**gamma), rtol=1e-6)
    np.testing.assert_allclose(curvatures, (found(z + step)[1] - found(z - step)[1]) / (2 * step), rtol=1e-4)
    for part in found(np.array([40.0, 100.0, 1e4, 1e300])):
        np.testing.assert_array_equal(part, np.zeros(4))
    hessian = jax.hessian(lambda y: jnp.sum(focal_losses(y, gamma=gamma)))(jnp.array([100.0, -100.0, 0.0]))
    assert np.all(np.isfinite(hessian))
