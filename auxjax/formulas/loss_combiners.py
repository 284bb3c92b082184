"""Learned functions of the losses: AuxiLearn's combinations, as init, apply and project.

    deep linear     g(l) = W_n ... W_2 W_1 l
    monotone        g(l) = w^T s(W_n ... s(W_1 l + b_1) ... + b_n),           s = softplus
    convolutional   the same with 3x3 convolutions, softplus and averages over 2x2 pixels, on maps of losses

All weights are kept at or above 0, so that no loss is ever rewarded for growing; biases are free. The linear
combination is a vector of weights and needs no file.

Reference: Navon, Achituve, Maron, Chechik, Fetaya, 2021, Auxiliary Learning by Implicit Differentiation, ICLR.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CONSTRAINTS = ("clamp", "softplus")


class Combiner(NamedTuple):
    """A function of losses with parameters.

    Attributes:
      init: `(key, num_tasks, dtype) -> params`.
      apply: `(params, losses) -> [n]`, with losses `[n, num_tasks]`, or `[n, height, width, num_tasks]` for the
        convolutional one.
      project: `params -> params`, after an update.
      spatial: whether it takes maps.
    """

    init: Callable[..., Any]
    apply: Callable[..., jax.Array]
    project: Callable[[Any], Any]
    spatial: bool


def dense_combiner(
    hidden: Sequence[int], *, activation: Callable, bias: bool, upper: float, constraint: str
) -> Combiner:
    """A multilayer perceptron with non-negative weights and one output, without a bias in the last layer.

    Args:
      hidden: sizes of the hidden layers, at least one.
      activation: after every hidden layer; the identity for the deep linear form.
      bias: whether hidden layers have biases.
      upper: weights start uniformly between 0 and this.
      constraint: "clamp" sets negative weights to 0 after an update; "softplus" parametrises them.
    """
    positive, raw, project = _constraint(constraint)

    def init(key, num_tasks, dtype):
        return _init_layers(key, [num_tasks, *hidden, 1], (), upper, raw, dtype, bias=bias)

    def apply(params, losses):
        values = losses
        for index, layer in enumerate(params):
            values = values @ positive(layer["kernel"])
            if index < len(params) - 1:
                values = activation(values + layer["bias"][None, :] if "bias" in layer else values)
        return values[:, 0]

    return Combiner(init, apply, project, False)


def convolutional_combiner(channels: Sequence[int], *, upper: float, constraint: str) -> Combiner:
    """Convolutions 3x3 with non-negative weights, softplus and 2x2 averages, then 1x1 to one map, averaged.

    Args:
      channels: of the convolutions, at least one; the maps are halved after each as long as they have 2 pixels a side.
      upper: weights start uniformly between 0 and this.
      constraint: as in `dense_combiner`.
    """
    positive, raw, project = _constraint(constraint)

    def init(key, num_tasks, dtype):
        layers = _init_layers(key, [num_tasks, *channels, 1], (3, 3), upper, raw, dtype, bias=True)
        layers[-1]["kernel"] = layers[-1]["kernel"][1:2, 1:2]  # the last one is 1x1
        return layers

    def apply(params, losses):
        values = losses
        for index, layer in enumerate(params):
            kernel = positive(layer["kernel"])
            values = jax.lax.conv_general_dilated(
                values, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            if index < len(params) - 1:
                values = _halved(jax.nn.softplus(values + layer["bias"][None, None, None, :]))
        return jnp.mean(values, axis=(1, 2, 3))

    return Combiner(init, apply, project, True)


def _init_layers(key, sizes, window, upper: float, raw: Callable, dtype, *, bias: bool) -> list[dict]:
    """`[{"kernel": [*window, in, out], "bias": [out]}, ...]`; the last layer has no bias."""
    keys = jax.random.split(key, len(sizes) - 1)
    layers = []
    for layer_key, fan_in, fan_out in zip(keys, sizes[:-1], sizes[1:], strict=True):
        kernel = jax.random.uniform(layer_key, (*window, fan_in, fan_out), dtype, 0.0, upper)
        layers.append({"kernel": raw(kernel), **({"bias": jnp.zeros((fan_out,), dtype)} if bias else {})})
    layers[-1].pop("bias", None)
    return layers


def _halved(maps):
    """Averages over 2x2 pixels; odd last rows and columns are left out, sides of 1 stay."""
    _, height, width, _ = maps.shape
    rows, columns = (2 if side > 1 else 1 for side in (height, width))
    maps = maps[:, : height // rows * rows, : width // columns * columns]
    count, height, width, channels = maps.shape
    return maps.reshape(count, height // rows, rows, width // columns, columns, channels).mean((2, 4))


def _constraint(name: str) -> tuple[Callable, Callable, Callable]:
    """`(raw -> weight, weight -> raw, projection of all params)`."""
    if name == "softplus":
        # Below float32's resolution of softplus nothing is lost: weights of 0 become weights of 1e-6.
        return jax.nn.softplus, lambda weight: jnp.log(jnp.expm1(jnp.maximum(weight, 1e-6))), lambda params: params

    def project(params):
        return [
            {name: jnp.maximum(leaf, 0.0) if name == "kernel" else leaf for name, leaf in layer.items()}
            for layer in params
        ]

    return lambda raw: raw, lambda weight: weight, project
