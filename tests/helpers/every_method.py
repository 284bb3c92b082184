"""Every method by its name: the options it cannot be made without, and a model with state to give to each."""

import jax
import jax.numpy as jnp
import pytest

import auxjax

NUM_EXAMPLES = 8


def generator(width, split=lambda outputs: outputs):
    """Linear in the primary task's inputs; `split` makes of its outputs what the method wants."""

    def init(key, batch):
        inputs = batch["x"]["primary"]
        return jax.random.normal(key, (inputs.shape[1], width), inputs.dtype)

    return auxjax.Generator(init, lambda meta, batch: split(batch["x"]["primary"] @ meta))


GENERATED = {"labels": lambda batch: (batch["y"]["primary"] > 0).astype(jnp.int32), "sub_classes": 2}
# Options without which a method cannot be made, for tasks primary, aux0, aux1.
OPTIONS = {
    "dtg_auxl": {"num_generated": 4, "hidden": (4,)},
    "fixed_weights": {"weights": {"aux0": 0.5, "aux1": 0.1}},
    "grid_search": {"values": (0.0, 1.0)},
    "maxl": GENERATED | {"generator": generator(4)},
    "n_jtds": {"num_examples": NUM_EXAMPLES, "ids": lambda batch: jnp.arange(len(batch["y"]["primary"]))},
    "rl_aux": GENERATED | {"generator": generator(4), "num_rollouts": 3},
    "random_labels": GENERATED | {"num_classes": 2, "ids": lambda batch: jnp.arange(len(batch["y"]["primary"]))},
    "wamal": GENERATED | {"generator": generator(5, lambda outputs: (outputs[:, :4], outputs[:, 4]))},
}
# They stand for all where a test compiles much: no outer level, a closed form, an implicit one, a table, a generator.
SOME = ("equal", "arml", "jtds", "n_jtds", "wamal")


def every(quick):
    """The names of all methods, these in the quick tests."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in quick)) for name in auxjax.methods.names()]


EVERY = every(SOME)
# Where a test compiles the same step several times.
EVERY_COSTLY = every(("equal", "jtds"))
# A few with options of a user.
FEW = {
    "stl": {},
    "equal": {},
    "arml": {"form": "two_stage", "step_size": 0.01, "temperature": 0.01},
    "jtds": {"warm_start": True},
}


def method_of(name):
    """The method with the options it cannot be made without."""
    return auxjax.methods.get(name, **OPTIONS.get(name, {}))


def with_state(model):
    """The model with a counter and a running mean as model state."""

    def losses(params, batch, key, state):
        out = model.losses(params, batch, key)
        mean = 0.9 * state["mean"] + 0.1 * jnp.mean(batch["x"]["primary"] @ params["w"])
        return out._replace(state={"mean": mean, "count": state["count"] + jnp.int32(1)})

    def feature_loss(params, features, labels, state):
        del state
        return model.feature_loss(params, features, labels)

    return model._replace(losses=losses, feature_loss=feature_loss)
