"""What a policy says about the examples of a batch, and what its choices mean: labels, and perhaps weights.

    a_i ~ softmax of the logits of example i's own block            label   one_hot(c_i psi + a_i), or softened
    b_i ~ softmax of the weight logits                              weight  2^(8 u - 3), u = b_i / (bins - 1)

Not for: learning a policy (`rl_aux`), or the formulas of policy gradients (`auxjax.formulas.policy_gradient`).
"""

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from auxjax.formulas import policy_gradient, soft_labels
from auxjax.methods.shared import generation


class Policy(NamedTuple):
    """What a policy says about the examples of a batch.

    Attributes:
      logits: `[n, C psi]`, of the labels. Only those of the example's own primary class matter.
      weight_logits: `[n, weight_bins]`, of the weights of the generated labels; `None` for weights of 1.
      value: `[n]`, the expected reward, for `baseline="value"`.
    """

    logits: jax.Array
    weight_logits: jax.Array | None = None
    value: jax.Array | None = None


class Reading(NamedTuple):
    """How a policy is read.

    Attributes:
      method: the method's name, for messages.
      generator: its `apply` returns a `Policy`, or the logits alone.
      labels: `batch -> int [n]`, primary classes.
      sub_classes: psi.
      weight_bins: weights to choose from.
      weighted: whether the policy chooses weights; `None`: if it gives logits for them.
      with_value: whether its value is needed.
      softened: whether labels are softmaxes of one-hot vectors.
    """

    method: str
    generator: generation.Generator
    labels: Callable
    sub_classes: int
    weight_bins: int
    weighted: bool | None
    with_value: bool
    softened: bool


class Decision(NamedTuple):
    """A policy's outputs for one batch, after the mask: what there is to choose, and the value.

    Attributes:
      choices: log-probabilities, `[n, psi]` of the labels and, for policies with weights, `[n, weight_bins]` of those;
        actions are a tuple of integers of the same length.
      value: `[n]` or `None`.
      labels: int `[n]`, primary classes.
      num_classes: C.
    """

    choices: tuple[jax.Array, ...]
    value: jax.Array | None
    labels: jax.Array
    num_classes: int


def decide(reading: Reading, meta, batch, mask=None) -> Decision:
    """The policy on a batch. An example without a primary label has neutral outputs, whatever the network made of it.

    The mask acts before the softmax: behind it a NaN would reach the policy's gradient as 0 times NaN.
    """
    policy = outputs_of(reading, reading.generator.apply(meta, batch))
    labels = generation.primary_labels(reading.method, reading.labels, batch)

    def kept(values: Any) -> Any:
        if values is None or mask is None:
            return values
        return jnp.where(mask.reshape(-1, *[1] * (values.ndim - 1)), values, jnp.zeros_like(values))

    labels = kept(labels)
    choices = [policy_gradient.block_log_probabilities(kept(policy.logits), labels, reading.sub_classes)]
    if policy.weight_logits is not None:
        logits = policy.weight_logits.astype(choices[0].dtype)
        choices.append(jax.nn.log_softmax(kept(logits), axis=-1))
    value = None if not reading.with_value else kept(policy.value).astype(choices[0].dtype)
    return Decision(tuple(choices), value, labels, policy.logits.shape[-1] // reading.sub_classes)


def outputs_of(reading: Reading, outputs) -> Policy:
    """The policy's outputs, checked; plain logits are a policy without weights."""
    policy = outputs if isinstance(outputs, Policy) else Policy(outputs)
    if reading.weighted is False:
        policy = policy._replace(weight_logits=None)
    if not hasattr(policy.logits, "ndim"):
        raise TypeError(
            f"{reading.method}(generator=): apply returned {type(outputs).__name__}; expected the logits [n, classes x "
            "sub_classes], or auxjax.Policy(logits, weight_logits, value)."
        )
    count = jnp.shape(policy.logits)[:1]
    wanted = (*count, reading.weight_bins)
    found = None if policy.weight_logits is None else jnp.shape(policy.weight_logits)
    if found != wanted and (reading.weighted or found is not None):
        raise ValueError(
            f"{reading.method}(generator=): weight_logits {found}; expected {wanted}, a logit for each of weight_bins="
            f"{reading.weight_bins} weights."
        )
    if reading.with_value and (policy.value is None or jnp.shape(policy.value) != count):
        found = "none" if policy.value is None else f"the shape {jnp.shape(policy.value)}"
        raise ValueError(
            f"{reading.method}(baseline='value') needs Policy(value=) of shape {count}, the expected reward; got "
            f"{found}."
        )
    return policy


def sample(decision, key, num_rollouts) -> tuple[jax.Array, ...]:
    """Actions, int `[num_rollouts, n]` for every choice."""
    return tuple(
        policy_gradient.sample(jax.random.fold_in(key, index), choice, num_rollouts)
        for index, choice in enumerate(decision.choices)
    )


def labelling(reading: Reading, actions, decision, dtype) -> generation.Labelling:
    """Labels and weights that actions, int `[n]` for every choice, stand for."""
    block = jax.nn.one_hot(actions[0], reading.sub_classes, dtype=dtype)
    if reading.softened:
        block = jax.nn.softmax(block, axis=-1)
    weights = None
    if len(actions) > 1:
        weights = jnp.exp2(8.0 * jnp.linspace(0.0, 1.0, reading.weight_bins, dtype=dtype) - 3.0)[actions[1]]
    return generation.Labelling(soft_labels.in_block(block, decision.labels, decision.num_classes), weights)


def log_probability(decision, actions) -> jax.Array:
    """`[m, n]`, of the whole action: the choices are independent."""
    pairs = zip(decision.choices, actions, strict=True)
    return reduce(add, (policy_gradient.log_probability(choice, action) for choice, action in pairs))
