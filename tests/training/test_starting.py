"""What a run starts from: leaves that are no arrays are named, and NaN labels, masked or not, are found in init."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from tests.helpers.training_problems import LinearTasks, linear_model

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 3))
HOLES = jnp.where(X[:, 1] > 0, X[:, 2], jnp.nan)


class Layer:
    """A module that no library has made a pytree."""


@pytest.mark.parametrize("leaf", [Layer(), jnp.tanh, "relu", "float32", jnp.float32], ids=type)
@pytest.mark.parametrize("where", ["params", "model_state"])
def test_a_leaf_that_is_no_array_is_named_by_its_path(leaf, where):
    given = {"params": {"w": jnp.zeros(3)}, "model_state": {}}
    given[where] = {"w": jnp.zeros(3), "layers": [{"act": leaf}]}
    init, _ = auxjax.make_step(linear_model(), auxjax.methods.get("equal"), optax.sgd(0.1))
    expected = rf"init\({where}=\): the leaf \['layers'\]\[0\]\['act'\] is a {type(leaf).__name__}; expected arrays"
    with pytest.raises(TypeError, match=expected):
        init(KEY, given["params"], LinearTasks.make(0).batch, given["model_state"])


def test_params_that_are_no_pytree_are_named():
    init, _ = auxjax.make_step(linear_model(), auxjax.methods.get("equal"), optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"init\(params=\): it is a Layer"):
        init(KEY, Layer(), LinearTasks.make(0).batch)


def started(losses, batch, **options):
    init, step = auxjax.make_step(
        auxjax.TaskModel(losses, primary="main"), auxjax.methods.get("equal"), optax.sgd(0.1), **options
    )
    return init(KEY, jnp.zeros(3), batch), step


def out_of(params, batch, target, masks):
    out = batch["x"] @ params
    return auxjax.TaskLosses({"main": (out - batch["x"][:, 0]) ** 2, "aux": (out - target) ** 2}, masks=masks)


def masked_too_late(params, batch, key):
    return out_of(params, batch, batch["z"], {"aux": ~jnp.isnan(batch["z"])})


def not_masked(params, batch, key):
    return out_of(params, batch, batch["z"], None)


def cleaned(params, batch, key):
    target, known = auxjax.known_targets(batch["z"])
    return out_of(params, batch, target, {"aux": known})


@pytest.mark.parametrize(("losses", "words"), [(masked_too_late, "A mask comes too late"), (not_masked, "mask them")])
def test_nan_labels_are_named_before_training(losses, words):
    missing = int(np.isnan(HOLES).sum())
    expected = rf"task 'aux' are not finite for {missing} of 8 examples.*{words}.*known_targets"
    with pytest.raises(ValueError, match=expected):
        started(losses, {"x": X, "z": HOLES})
    with pytest.raises(ValueError, match=expected):  # as batches of a loader are
        started(losses, jax.tree.map(np.asarray, {"x": X, "z": HOLES}))


def test_known_targets_train_as_if_there_were_nothing_missing():
    """Against the gradient over the known examples alone."""
    state, step = started(cleaned, {"x": X, "z": HOLES})
    state, metrics = step(state, {"x": X, "z": HOLES})
    known = ~np.isnan(HOLES)
    x, y, z = np.asarray(X), np.asarray(X[:, 0]), np.asarray(HOLES)
    gradient = 2 * (x.T @ -y / 8 + x[known].T @ -z[known] / known.sum())
    np.testing.assert_allclose(state.params, -0.1 * gradient, rtol=1e-12)
    np.testing.assert_allclose(metrics["labelled/aux"], known.mean())


def test_nan_that_no_loss_sees_is_let_through():
    """In the batch, and as a loss that a mask leaves out and no derivative passes through."""

    def losses(params, batch, key):
        out = cleaned(params, batch, key)
        return out._replace(values=out.values | {"aux": jnp.where(out.masks["aux"], out.values["aux"], jnp.nan)})

    state, step = started(losses, {"x": X, "z": HOLES})
    assert np.isfinite(step(state, {"x": X, "z": HOLES})[0].params).all()


def test_nothing_is_evaluated_where_a_batch_has_no_nan():
    seen = []

    def losses(params, batch, key):
        seen.append(isinstance(params, jax.core.Tracer))
        return cleaned(params, batch, key)

    started(losses, {"x": X, "z": X[:, 0]})
    assert seen == [True]  # the shapes
