"""A small classification network with an auxiliary head, and a linear generator of its labels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import auxjax
from auxjax.methods.shared.generation import Generator
from tests.helpers.training_problems import LinearTasks

NUM_CLASSES, SUB_CLASSES = 2, 3


def generation_problem(seed, *, num_examples=6, masked=False):
    """Inputs `[n, 3]`, primary classes, perhaps a mask; params of a trunk and two heads."""
    rng = np.random.default_rng(seed)
    batch = {
        "x": jnp.array(rng.normal(size=(num_examples, 3))),
        "y": jnp.array(rng.integers(0, NUM_CLASSES, num_examples), jnp.int32),
        "id": jnp.arange(num_examples, dtype=jnp.int32),
    }
    if masked:
        batch["mask"] = jnp.array(rng.random(num_examples) < 0.6)
    shapes = {"trunk": (3, 4), "primary": (4, NUM_CLASSES), "auxiliary": (4, NUM_CLASSES * SUB_CLASSES)}
    return LinearTasks(batch, {name: jnp.array(rng.normal(size=shape)) / 2 for name, shape in shapes.items()})


def generation_model(*, own_loss=False):
    """Cross-entropy of the primary head, focal loss of the auxiliary one.

    `own_loss` gives the latter as `TaskModel.soft_label_loss` and not as `TaskLosses.label_losses`.
    """

    def auxiliary(params, batch):
        return auxjax.formulas.soft_labels.focal_losses(jnp.tanh(batch["x"] @ params["trunk"]) @ params["auxiliary"])

    def losses(params, batch, key):
        del key
        features = jnp.tanh(batch["x"] @ params["trunk"])
        primary = optax.softmax_cross_entropy_with_integer_labels(features @ params["primary"], batch["y"])
        decay = 0.05 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        masks = {"primary": batch["mask"]} if "mask" in batch else None
        made = None if own_loss else auxiliary(params, batch)
        return auxjax.TaskLosses({"primary": primary + decay}, masks, features, label_losses=made)

    def soft_label_loss(params, batch, labels, key):
        del key
        return jnp.sum(labels * auxiliary(params, batch), axis=1)

    return auxjax.TaskModel(losses, "primary", soft_label_loss=soft_label_loss if own_loss else None)


def linear_generator(*, scores=False):
    """Logits `[n, C psi]`, and scores `[n]` if asked, that are linear in the inputs."""

    def init(key, batch):
        width = NUM_CLASSES * SUB_CLASSES + scores
        return {"w": jax.random.normal(key, (batch["x"].shape[1], width), batch["x"].dtype)}

    def apply(meta, batch):
        outputs = batch["x"] @ meta["w"]
        return (outputs[:, :-1], outputs[:, -1]) if scores else outputs

    return Generator(init, apply)


def primary_class(batch):
    """`labels=` of the methods."""
    return batch["y"]
