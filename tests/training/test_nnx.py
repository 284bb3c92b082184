"""Flax NNX whose forward pass changes its own variables: BatchNorm's statistics, the counters of Dropout's keys."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import auxjax
from tests.helpers.every_method import every, method_of

pytestmark = pytest.mark.usefixtures("single_precision")
KEY = jax.random.key(0)


class Network(nnx.Module):
    """A trunk with both, a head of two outputs, one per task, and one of four classes."""

    def __init__(self, rngs):
        self.trunk, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.drop, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        self.made = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.drop(jnp.tanh(self.norm(self.trunk(x))))


GRAPH, PARAMS, STATE = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)
X = jax.random.normal(KEY, (8, 3), jnp.float32)
BATCH = {"x": {"primary": X}, "y": {"primary": X[:, 0]}}


def losses(params, batch, key, state):
    """The guide's idiom."""
    network = nnx.merge(GRAPH, params, state)
    features = network(batch["x"]["primary"])
    out, made = network.head(features), network.made(features)
    return auxjax.TaskLosses(
        {"primary": out[:, 0] ** 2, "aux0": (out[:, 1] - 1.0) ** 2, "aux1": (out[:, 2] + 1.0) ** 2},
        features=features,
        label_losses=-jax.nn.log_softmax(made),
        state=nnx.split(network, nnx.Param, ...)[2],
    )


def feature_loss(params, features, labels, state):
    logits = nnx.merge(GRAPH, params, state).made(features)
    return -jnp.sum(labels * jax.nn.log_softmax(logits), axis=1)


MODEL = auxjax.TaskModel(losses, primary="primary", feature_loss=feature_loss)


@pytest.mark.parametrize("name", every(("arml", "jtds")))
def test_every_method_takes_it(name):
    """Traced and not run: what NNX forbids, it forbids while it is traced."""
    init, step = auxjax.make_step(MODEL, method_of(name), optax.sgd(0.1))
    state = jax.eval_shape(init, KEY, PARAMS, BATCH, STATE)
    after, _ = jax.eval_shape(step, state, BATCH, BATCH)
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize(
    "transform", [lambda model: auxjax.accumulate(model, 2), auxjax.remat, lambda model: auxjax.mixed_precision(model)]
)
def test_large_models_take_it(transform):
    init, step = auxjax.make_step(transform(MODEL), auxjax.methods.get("equal"), optax.sgd(0.1))
    state = jax.eval_shape(init, KEY, PARAMS, BATCH, STATE)
    after, metrics = jax.eval_shape(step, state, BATCH, BATCH)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert "loss/primary" in metrics


def test_inner_updates_move_the_state_once_and_outer_ones_leave_it():
    init, step = auxjax.make_step(MODEL, auxjax.methods.get("arml"), optax.sgd(0.1))
    state, _ = step(init(KEY, PARAMS, BATCH, STATE), BATCH)
    expected = 0.1 * np.mean(np.asarray(X @ PARAMS["trunk"]["kernel"][...]), axis=0)
    np.testing.assert_allclose(state.model_state["norm"]["mean"][...], expected, rtol=1e-5)
    counts = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.model_state) if "count" in str(path)]
    before = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(STATE) if "count" in str(path)]
    assert [int(now) - int(then) for now, then in zip(counts, before, strict=True)] == [1]
