"""What the methods that generate auxiliary labels share: the generator, and the loss of a model on what it generates.

    L(theta) = L_0(theta) + w mean_i v_i l(theta; x_i, y~_i)

with y~_i the generated label of example i and v_i its weight. l is the auxiliary head's loss, from
`TaskLosses.label_losses` or `TaskModel.soft_label_loss`; the mean is over the examples with a primary label. Other
auxiliary tasks of the model are left out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from auxjax.formulas import soft_labels
from auxjax.formulas.losses import masked_mean
from auxjax.interface import TaskLosses, TaskModel, call
from auxjax.methods.shared import descent, evaluation


class Generator(NamedTuple):
    """A network whose parameters are outer variables.

    Attributes:
      init: `(key, batch) -> meta`, a pytree of floating arrays.
      apply: `(meta, batch) -> outputs`; what they are, the method says. It is a pure function: a network with
        BatchNorm uses the statistics of the batch.
    """

    init: Callable[[jax.Array, Any], Any]
    apply: Callable[[Any, Any], Any]


class Labelling(NamedTuple):
    """Generated labels of a batch.

    Attributes:
      labels: `[n, classes]`, distributions.
      weights: `[n]`, or `None` for weights of 1.
    """

    labels: jax.Array
    weights: jax.Array | None = None


class JointLoss(NamedTuple):
    """The losses of one batch with generated labels: their sum, and what it is made of."""

    total: jax.Array
    generated: jax.Array
    out: TaskLosses


def check_generator(method: str, generator) -> None:
    """Raises a TypeError unless this is a `Generator` of two functions."""
    if not (isinstance(generator, Generator) and callable(generator.init) and callable(generator.apply)):
        raise TypeError(
            f"{method}(generator=): expected auxjax.Generator(init, apply), with init(key, batch) -> meta and "
            f"apply(meta, batch) -> outputs, got {type(generator).__name__}."
        )


def joint_loss(context, params, model_state, batch, key, labelling: Labelling, weight: float) -> JointLoss:
    """Primary loss plus `weight` times the weighted mean loss on generated labels. Differentiable in everything.

    Raises:
      ValueError: a model with no auxiliary head for labels, or losses and labels of different shapes.
    """
    out = evaluation.evaluate(context.model, params, model_state, batch, key)
    primary, mask = out.values[context.model.primary], evaluation.mask_of(out, context.model.primary)
    losses = _label_losses(context.model, out, params, model_state, batch, key, labelling.labels)
    if losses.shape != primary.shape:
        raise ValueError(
            f"soft_label_loss returned the shape {losses.shape}; expected {primary.shape}, one loss per example of the "
            "primary task."
        )
    generated = masked_mean(losses if labelling.weights is None else labelling.weights * losses, mask)
    return JointLoss(masked_mean(primary, mask) + weight * generated, generated, out)


def descend_on(context, state, batch, key, labelling: Labelling, weight: float):
    """One inner update on the joint loss, the labels held fixed: `(state, metrics)`. Cost: one gradient."""
    labelling = jax.lax.stop_gradient(labelling)

    def loss(params):
        joint = joint_loss(context, params, state.model_state, batch, key, labelling, weight)
        return joint.total, joint

    grads, joint = jax.grad(loss, has_aux=True)(state.params)
    options = {"value": joint.total, "loss": lambda params: loss(params)[0]}
    new = descent.descend(context, state, grads, joint.out.state, **options)
    return new, metrics_of(context, joint, labelling, weight)


def metrics_of(context, joint: JointLoss, labelling: Labelling, weight: float) -> dict[str, jax.Array]:
    """The common metrics, those of the generated task, and `label_metrics`."""
    mask = evaluation.mask_of(joint.out, context.model.primary)
    one = jnp.ones((), joint.total.dtype)
    mean_weight = one if labelling.weights is None else masked_mean(labelling.weights, mask)
    return {
        **descent.loss_metrics(joint.out, {context.model.primary: one}),
        "loss/generated": joint.generated,
        "weight/generated": weight * mean_weight,
        **label_metrics(labelling.labels, mask),
    }


def label_metrics(labels: jax.Array, mask) -> dict[str, jax.Array]:
    """How generated labels `[n, classes]` are used, in nats.

    `label_entropy` is the mean entropy of one label, 0 where all are hard; `label_usage` the entropy of the batch's
    mean label, 0 where all are the same.
    """
    usage = soft_labels.mean_label(labels, mask)
    return {
        "label_entropy": soft_labels.mean_entropy(labels, mask),
        "label_usage": -soft_labels.negative_entropy(usage),
    }


def reported_weights(context, state, batch, key, labelling: Labelling, weight: float) -> dict[str, jax.Array]:
    """What `Method.weights` returns: 1 for the primary task, the generated task's per example, 0 for the others."""
    out = evaluation.loss_shapes(context, state, batch, key)
    primary = out.values[context.model.primary]
    ones = jnp.ones(primary.shape, labelling.labels.dtype)
    weights = ones if labelling.weights is None else labelling.weights
    return evaluation.constant_weights({context.model.primary: 1.0}, out) | {"generated": weight * weights}


def check_model(method: str, context, state, batch, key, classes: int) -> TaskLosses:
    """Shapes of the losses, when the state is made, before any training.

    Raises:
      ValueError: no auxiliary head for labels, or one for another number of classes.
    """
    out = evaluation.loss_shapes(context, state, batch, key)
    if out.label_losses is None and context.model.soft_label_loss is None:
        raise ValueError(
            f"{method} generates labels, and the model has no loss for them. Give TaskLosses(label_losses=), the "
            "auxiliary head's loss for every class, such as auxjax.formulas.soft_labels.focal_losses(logits); or "
            "TaskModel(soft_label_loss=), a function (params, batch, labels, key) -> [n]."
        )
    if out.label_losses is not None and out.label_losses.shape[-1] != classes:
        raise ValueError(
            f"{method} generates labels with {classes} classes, and the model's auxiliary head has "
            f"{out.label_losses.shape[-1]}. Make the two the same: (primary classes) x sub_classes."
        )
    return out


def primary_labels(method: str, labels: Callable, batch) -> jax.Array:
    """`labels(batch)`, checked.

    Raises:
      TypeError: not integers.
      ValueError: not of rank 1.
    """
    found = labels(batch)
    if jnp.ndim(found) != 1:
        raise ValueError(
            f"{method}(labels=) returned the shape {jnp.shape(found)}; expected [n], one class per example."
        )
    if not jnp.issubdtype(jnp.result_type(found), jnp.integer):
        raise TypeError(
            f"{method}(labels=) returned {jnp.result_type(found)}; expected the primary classes as integers."
        )
    return found


def _label_losses(model: TaskModel, out, params, model_state, batch, key, labels) -> jax.Array:
    if out.label_losses is not None:
        return jnp.sum(labels * out.label_losses, axis=-1)
    assert model.soft_label_loss is not None  # `check_model` asks for one of the two
    key, model_state = evaluation.fresh((key, model_state))
    return call(model.soft_label_loss, params, batch, labels, key, state=model_state)
