"""The outer losses of `known_worth`: what they are, and that only batches without a pool have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import known_worth as config
from experiments.data import pools
from experiments.tasks.known_worth import expected_error

LOGITS = jnp.array([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]])


def test_the_expected_error_is_the_share_of_mistakes_of_labels_that_are_drawn():
    found = expected_error(LOGITS, jnp.array([0, 2]))
    others = np.exp(0.0) + np.exp(-1.0)
    np.testing.assert_allclose(found, [others / (others + np.exp(2.0)), 2 / 3], rtol=1e-12)
    sure = expected_error(1e3 * LOGITS[:1], jnp.array([1]))
    np.testing.assert_allclose(sure, 1.0)
    assert np.all(np.isfinite(jax.jacobian(lambda z: expected_error(z, jnp.array([1])))(1e3 * LOGITS[:1])))


@pytest.mark.parametrize("name", ["cross_entropy", "expected_error"])
def test_held_out_labels_alone_have_the_outer_loss(name, single_precision):
    settings = config.Settings(outer_loss=name, hidden=8)
    data = config.load(settings, 0, None)
    shapes = pools.shapes(data)
    experiment = config.build(settings, shapes)
    params, _ = experiment.init_params(jax.random.key(0))
    parts = {"labelled": pools.visible(data, "dev"), "pool": pools.visible(data, "pool")}
    known = {"labelled": {key: jnp.asarray(value) for key, value in parts["labelled"].items()}}
    alone = experiment.model.losses(params, known, None).values
    beside = experiment.model.losses(params, jax.tree.map(jnp.asarray, parts), None).values["class"]
    assert list(alone) == ["class"]
    if name == "cross_entropy":
        np.testing.assert_allclose(alone["class"], beside, rtol=1e-5)
    else:
        np.testing.assert_allclose(alone["class"], 1 - np.exp(-beside), rtol=1e-4)
