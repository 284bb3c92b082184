"""Image classification with a second head, whose labels people, chance or a network give: what its configs share.

The auxiliary head has `sub_classes` outputs for every primary class. It learns the labels of a method that generates
some, or, for methods that weigh tasks, those of the one manual task: "human", the data's own sub-classes, or "decoy",
fixed random ones that know neither the image nor its class. One network and one loss serve all, so that methods differ
in the labels alone; both losses are focal, as in the methods' papers.
"""

import jax
import jax.numpy as jnp
import optax

from auxjax import Generator, Policy, TaskLosses, TaskModel
from auxjax.formulas.soft_labels import focal_losses
from auxjax.models import VGG, ConvNet, head_on
from experiments.methods.defaults import common_options
from experiments.tasks import image_classification

PRIMARY, HEAD = "class", "auxiliary"
MANUAL = ("human", "decoy")
NETWORKS = ("convnet", "vgg16")
WEIGHT_BINS = 21


def make_network(kind: str, num_classes: int, sub_classes: int, channels: tuple[int, ...]):
    """The multi-task network, a "convnet" or a "vgg16"."""
    heads = {PRIMARY: num_classes, HEAD: num_classes * sub_classes}
    return VGG(heads=heads) if kind == "vgg16" else ConvNet(heads=heads, channels=channels, norm="batch")


def task_model(network, manual: str, sub_classes: int, gamma: float) -> TaskModel:
    """The `TaskModel` of the network, with one manual task and an auxiliary head for any labels."""

    def losses(params, batch, key, state=None):
        del key
        out, new_state = image_classification.forward(
            network, params, state, image_classification.to_float(batch["image"])
        )
        primary = focal_losses(out.heads[PRIMARY], gamma=gamma)
        auxiliary = focal_losses(out.heads[HEAD], gamma=gamma)
        if manual == "human":
            labels = batch["label"] * sub_classes + batch["sub_label"]
        else:
            labels = image_classification.hashed_class(batch["index"], auxiliary.shape[-1])
        values = {PRIMARY: _at(primary, batch["label"]), manual: _at(auxiliary, labels)}
        return TaskLosses(values, features=out.features, state=new_state, label_losses=auxiliary)

    def feature_loss(params, features, labels, state=None):
        del state
        logits = head_on(params, HEAD, features)
        if labels.shape != logits.shape:
            raise ValueError(
                f"The generated labels have {labels.shape[-1]} classes, the auxiliary head {logits.shape[-1]}: leave "
                "num_generated as it is, or change sub_classes."
            )
        return jnp.sum(labels * focal_losses(logits, gamma=gamma), axis=-1)

    return TaskModel(losses, primary=PRIMARY, trunk=lambda path: "trunk" in path, feature_loss=feature_loss)


def _at(values, labels):
    return jnp.take_along_axis(values, labels[:, None], axis=1)[:, 0]


def generator(heads: dict[str, int], channels: tuple[int, ...], shape: tuple[int, ...], outputs) -> Generator:
    """A convolutional network as a generator; `outputs(heads)` makes of its heads what the method wants.

    GroupNorm and no BatchNorm: it has no statistics to carry along.
    """
    network = ConvNet(heads=heads, channels=channels, norm="group")

    def init(key, batch):
        del batch
        return network.init(key, jnp.zeros((1, *shape), jnp.float32))["params"]

    def apply(meta, batch):
        return outputs(network.apply({"params": meta}, image_classification.to_float(batch["image"])).heads)

    return Generator(init, apply)


def method_options(settings, shapes) -> dict[str, dict]:
    """Options of the methods that need some."""
    classes = shapes.num_classes * settings.sub_classes
    shared = {"labels": primary_label, "sub_classes": settings.sub_classes}
    learned = {"outer_optimizer": optax.adam(settings.generator_learning_rate)}

    def network(outputs, **heads):
        return {"generator": generator({"labels": classes, **heads}, settings.label_channels, shapes.inputs, outputs)}

    def policy(heads):
        # Weights start near 1, as WAMAL's do: the likeliest of 21 equally likely ones is anything up to 32.
        likely = -0.5 * (8.0 * jnp.linspace(0.0, 1.0, WEIGHT_BINS) - 3.0) ** 2
        return Policy(heads["labels"], heads["weight"] + likely)

    return {
        **common_options(settings, shapes, (settings.manual,), max_updates=200, fixed_weight=1.0),
        "maxl": shared | learned | network(lambda heads: heads["labels"]),
        "wamal": shared | learned | network(lambda heads: (heads["labels"], heads["score"][:, 0]), score=1),
        # The weight-aware form is an option of its own, rl_aux:weighted=true. One look-ahead at a time: see `chunk`.
        "rl_aux": shared
        | {"outer_optimizer": optax.adam(settings.policy_learning_rate), "weighted": False, "num_rollouts": 4}
        | {"chunk": 1 if jax.default_backend() == "cpu" else None}
        | network(policy, weight=WEIGHT_BINS),
        "random_labels": shared | {"num_classes": shapes.num_classes, "ids": batch_index},
        "dtg_auxl": learned | {"labels": primary_label, "num_classes": shapes.num_classes, "num_generated": classes},
    }


def primary_label(batch):
    """`labels=` of the methods."""
    return batch["label"]


def batch_index(batch):
    """`ids=` of the methods."""
    return batch["index"]
