"""What a run starts from: leaves that are no arrays are named, and NaN labels, masked or not, are found in init."""

import pathlib
import warnings

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


def test_nan_of_a_task_that_the_method_does_not_use_is_let_through():
    """`stl` and a task without a weight, at the start and in the first step; masked or not."""
    batch = {"x": X, "z": HOLES}
    for losses in (not_masked, masked_too_late):
        model = auxjax.TaskModel(losses, primary="main")
        for method in (auxjax.methods.get("stl"), auxjax.methods.get("fixed_weights", weights={})):
            init, step = auxjax.make_step(model, method, optax.sgd(0.1))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                state, metrics = step(init(jax.random.key(0), jnp.zeros(3), batch), batch)
            assert np.isfinite(state.params).all()
            assert metrics["weight/aux"] == 0


def test_frozen_leaves_may_be_infinite():
    """A mask of attention, say: the first step asks whether what is trained is finite."""

    def losses(params, batch, key):
        shown = jnp.where(jnp.isfinite(params["mask"]), 1.0, 0.0)
        return not_masked(params["w"] * shown, batch, key)

    model = auxjax.TaskModel(losses, primary="main", trainable=lambda path: path == "w")
    init, step = auxjax.make_step(model, auxjax.methods.get("stl"), optax.apply_if_finite(optax.sgd(0.1), 3))
    params = {"w": jnp.zeros(3), "mask": jnp.array([0.0, -jnp.inf, 0.0])}
    batch = {"x": X, "z": X[:, 0]}
    state = init(jax.random.key(0), params, batch)
    with pytest.warns(UserWarning, match="in the first step loss/main is not finite") as found:
        step(state, {"x": X.at[0].set(jnp.inf), "z": X[:, 0]})
    assert pathlib.Path(found[0].filename) == pathlib.Path(__file__)  # the line that called the step


def test_nothing_is_evaluated_where_a_batch_has_no_nan():
    seen = []

    def losses(params, batch, key):
        seen.append(isinstance(params, jax.core.Tracer))
        return cleaned(params, batch, key)

    started(losses, {"x": X, "z": X[:, 0]})
    assert seen == [True]  # the shapes
