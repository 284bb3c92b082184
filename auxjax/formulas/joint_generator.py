"""Generated instances, features and a target for each, from pairs of source instances; and how far they collapse.

    x~ = m * p + (1 - m) * a + N([p, a, p * a]),      m = sigmoid(A [p, a] + b)
    y~ = softmax(M([x~, a, c])), or tanh(M([x~, a, c])) for real-valued targets

p are the features of a primary instance, a those of its partner, c what is known of their primary labels. The gate m,
one per entry, mixes the two; the perceptron N adds what no mixture has; the perceptron M says what the generated
instance shall be told apart by. All act on one pair at a time.

With a constant gate, without N and with M the same mixture of the labels this is manifold mixup.

Not for: learning a generator. The methods do that, and scale features to a root mean square of 1 for it.

Reference: Chen, Wang, Zhou, Qin, Guan, Zhu, 2023, Joint Data-Task Generation for Auxiliary Learning, NeurIPS, for the
two generators and the idea of a regularisation of instances. The formulas are ours (`docs/dtg_auxl.md`); the floor on
the variance is as in Bardes, Ponce, LeCun, 2022, VICReg, ICLR.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from auxjax._internal import checks
from auxjax._internal.safe_math import positive_or_one
from auxjax.formulas import soft_labels
from auxjax.formulas.losses import masked_mean

TASKS = ("classification", "regression")
FORMS = ("generated", "mixed")

# Where a hinge sets in. Half of the source's variance is what the even mixture of two unrelated instances has; half of
# the information is a label that tells sqrt(classes) groups apart; 1/3 is the variance of the uniform distribution on
# [-1, 1].
VARIANCE_FLOOR, INFORMATION_FLOOR, TARGET_VARIANCE_FLOOR = 0.5, 0.5, 1 / 3


class JointGenerator(NamedTuple):
    """A generator as three pure functions.

    Attributes:
      init: `(key, width, label_width, dtype) -> {"features": pytree, "targets": pytree}` of floating arrays, for
        features of `width` and primary labels of `label_width` entries.
      features: `(params["features"], primary, partner) -> [n, d]`, with both sources `[n, d]`.
      targets: `(params["targets"], generated, partner, labels) -> [n, k]`, with `generated` what `features` returned
        and labels `[n, label_width]`. Each function treats every row by itself.
      task: "classification", where targets are distributions, or "regression", where they lie in [-1, 1].
    """

    init: Callable[..., Any]
    features: Callable[..., jax.Array]
    targets: Callable[..., jax.Array]
    task: str


def joint_generator(
    num_generated: int, *, task: str = "classification", features: str = "generated", hidden: Sequence[int] = (64,)
) -> JointGenerator:
    """The generator of this file's first lines.

    Args:
      num_generated: generated classes, at least 2, or real-valued targets, at least 1.
      task: "classification" or "regression".
      features: "generated", or "mixed" to leave N out.
      hidden: sizes of the hidden layers of N and M, with tanh.

    Returns:
      A `JointGenerator`. At the start the gate is 1/2 and N is 0, so that all generated instances are even mixtures;
      M is random. The parameters of features of width d, hidden layers of h and k outputs: about 2 d^2 (gate) and
      4 d h (N), `(2 d + label_width + k) h` (M).

    Raises:
      TypeError, ValueError: an impossible option.
    """
    check_options("joint_generator", num_generated, task, hidden)
    checks.one_of("joint_generator", FORMS, features=features)

    def init(key, width, label_width, dtype):
        key_features, key_targets = jax.random.split(key)
        gate = {"kernel": jnp.zeros((2 * width, width), dtype), "bias": jnp.zeros((width,), dtype)}
        made: dict[str, Any] = {"gate": gate}
        if features == "generated":
            layers = _init_layers(key_features, [3 * width, *hidden, width], dtype)
            layers[-1] = jax.tree.map(jnp.zeros_like, layers[-1])
            made["interaction"] = layers
        return {
            "features": made,
            "targets": _init_layers(key_targets, [2 * width + label_width, *hidden, num_generated], dtype),
        }

    def generate(params, primary, partner):
        gate = jax.nn.sigmoid(_dense(params["gate"], jnp.concatenate([primary, partner], axis=1)))
        mixture = partner + gate * (primary - partner)
        if features == "mixed":
            return mixture
        pair = jnp.concatenate([primary, partner, primary * partner], axis=1)
        # Bounded by the features' root mean square: the way to be unlike both sources would else be to grow for ever.
        return mixture + jnp.tanh(_perceptron(params["interaction"], pair))

    def targets(params, generated, partner, labels):
        outputs = _perceptron(params, jnp.concatenate([generated, partner, labels], axis=1))
        # Bounded: what the head has to reach must not run away from it, and a larger target is a larger loss.
        return jax.nn.softmax(outputs, axis=-1) if task == "classification" else jnp.tanh(outputs)

    return JointGenerator(init, generate, targets, task)


class InstanceCollapse(NamedTuple):
    """How far generated instances have collapsed, three scalars in [0, 1]; 0 is not at all.

    Attributes:
      copying: 1 where every instance is a copy of one of its two sources.
      spread: 1 where all instances are the same.
      targets: 1 where all targets are the same.
    """

    copying: jax.Array
    spread: jax.Array
    targets: jax.Array


def instance_collapse(
    generated: jax.Array, targets: jax.Array, primary: jax.Array, partner: jax.Array, *, task: str, mask=None
) -> InstanceCollapse:
    """What the regularisation of instances adds up.

        copying   mean_i max(cos^2(x~_i, p_i), cos^2(x~_i, a_i)),    every argument less its mean over the batch
        spread    sum_j relu(v_j / 2 - var_j(x~)) / sum_j (v_j / 2),     v_j = var_j(p), variances of the j-th feature
        targets   relu(1 - 2 I / log k), I = H(mean_i y~_i) - mean_i H(y~_i), the information of a label about its
                  instance; for regression mean_j relu(1 - 3 var_j(y~))

    An even mixture of unrelated sources has copying 1/2 and spread 0. The entropy of the mean label alone, MAXL's term,
    would not do for `targets`: it is best where every label is uniform, and all are then the same. Spread and targets
    are hinges, silent where there is no collapse.

    Args:
      generated: x~, `[n, d]`.
      targets: y~, `[n, k]`.
      primary: p, `[n, d]`.
      partner: a, `[n, d]`.
      task: "classification" or "regression".
      mask: bool `[n]`, the instances that count, or `None` for all; what the others are is not looked at.

    Returns:
      An `InstanceCollapse`. Features times a constant change nothing. Derivatives are finite everywhere, at equal
      instances and at no variance as well. With fewer than two instances that count, the first two are 0.
      Cost: O(n (d + k)).
    """
    generated, primary, partner = (_centred(rows, mask) for rows in (generated, primary, partner))
    # To a size of 1, held fixed: it cancels, except for the 1e-12 below, which then mean the same at every scale.
    size = jax.lax.stop_gradient(jnp.sum(_variances(primary, mask)))
    scale = jax.lax.rsqrt(positive_or_one(size))
    generated, primary, partner = (scale * rows for rows in (generated, primary, partner))

    def cosine(rows):
        products = jnp.sum(generated * rows, axis=1) ** 2
        # Vectors much shorter than the features' spread fade to a cosine of 0; they have no direction to speak of.
        return products / (jnp.sum(generated**2, axis=1) * jnp.sum(rows**2, axis=1) + 1e-12)

    variances = _variances(primary, mask)
    missing = jax.nn.relu(VARIANCE_FLOOR * variances - _variances(generated, mask))
    return InstanceCollapse(
        copying=masked_mean(jnp.maximum(cosine(primary), cosine(partner)), mask),
        spread=jnp.sum(missing) / (VARIANCE_FLOOR * jnp.sum(variances) + 1e-12),
        targets=_target_collapse(targets, mask, task),
    )


def check_options(where: str, num_generated, task: str, hidden) -> None:
    """Raises a TypeError or ValueError unless these make a generator."""
    checks.one_of(where, TASKS, task=task)
    checks.count(where, 2 if task == "classification" else 1, num_generated=num_generated)
    checks.sizes(where, hidden=hidden)


def _target_collapse(targets, mask, task):
    if task == "regression":
        return jnp.mean(jax.nn.relu(1.0 - _variances(_centred(targets, mask), mask) / TARGET_VARIANCE_FLOOR))
    usage = soft_labels.mean_label(targets, mask)
    information = -soft_labels.negative_entropy(usage) - soft_labels.mean_entropy(targets, mask)
    return jax.nn.relu(1.0 - information / (INFORMATION_FLOOR * jnp.log(jnp.asarray(targets.shape[1], targets.dtype))))


def _centred(rows, mask):
    """Rows less their mean over those that count; 0 for the others."""
    centred = rows - _mean_row(rows, mask)[None, :]
    return centred if mask is None else jnp.where(mask[:, None], centred, jnp.zeros_like(centred))


def _mean_row(rows, mask):
    """`[n, d]` to `[d]`: the mean of the rows that count, zeros where there are none."""
    return soft_labels.mean_label(rows, mask)


def _variances(centred, mask):
    """`[d]`, means of the squares over the rows that count."""
    return _mean_row(centred**2, mask)


def _init_layers(key, sizes, dtype) -> list[dict]:
    """`[{"kernel": [in, out], "bias": [out]}, ...]` with kernels from N(0, 1 / in)."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {
            "kernel": jax.random.normal(layer_key, (fan_in, fan_out), dtype) / fan_in**0.5,
            "bias": jnp.zeros((fan_out,), dtype),
        }
        for layer_key, fan_in, fan_out in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def _dense(layer, values):
    return values @ layer["kernel"] + layer["bias"][None, :]


def _perceptron(layers, values):
    for layer in layers[:-1]:
        values = jnp.tanh(_dense(layer, values))
    return _dense(layers[-1], values)
