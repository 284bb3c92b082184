"""A small convolutional network with a shared trunk and one linear head per task."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from auxjax.models.outputs import Outputs, apply_heads


class ConvNet(nn.Module):
    """Stages of 3x3 convolution, normalisation, ReLU and 2x2 average pooling; then the mean over positions; then heads.

    Parameters are `trunk_conv_<i>`, `trunk_norm_<i>` (with a norm), `trunk_dense_<i>` and `head_<task>`. With
    `norm="batch"` there is a `batch_stats` collection, which `apply(..., train=True, mutable=["batch_stats"])` updates.
    Average pooling, and not maximum pooling, so that the network has the second derivatives that implicit
    hypergradients ask for wherever ReLU has.

    Attributes:
      heads: `{task: number of outputs}`.
      channels: output channels of the stages; each stage halves height and width (odd sizes lose the last row).
      norm: "none", "group" or "batch".
      dense: widths of dense layers with ReLU between the mean over positions and the heads.
      groups: largest number of groups of "group"; the number used is its greatest common divisor with the channels.
      momentum: of the running statistics of "batch" (the share of the old value).
      dtype: dtype of the computation; None follows inputs and parameters.
      param_dtype: dtype of the parameters.
    """

    heads: Mapping[str, int]
    channels: tuple[int, ...] = (32, 64, 128)
    norm: str = "none"
    dense: tuple[int, ...] = ()
    groups: int = 8
    momentum: float = 0.9
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> Outputs:
        """Applies the model.

        Args:
          x: `[n, h, w, c]`; integers are converted to floating point, and not scaled.
          train: whether "batch" uses (and updates) the statistics of this batch; otherwise the running ones.

        Returns:
          `Outputs(heads, features)` with features `[n, d]`, d the last of `dense` or else of `channels`.

        Raises:
          ValueError: `norm` is unknown, or the images are no images or too small for the number of stages.
        """
        least = 2 ** len(self.channels)
        if x.ndim != 4 or min(x.shape[1:3]) < least:
            raise ValueError(
                f"ConvNet(x) has shape {x.shape}; wanted [n, h, w, c] with h and w at least {least}, since each of "
                f"the {len(self.channels)} stages halves them. Use fewer channels for smaller images."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(self.dtype or self.param_dtype)
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for i, width in enumerate(self.channels):
            bias = self.norm == "none"  # a norm takes the mean away again
            x = nn.Conv(width, (3, 3), use_bias=bias, name=f"trunk_conv_{i}", **kinds)(x)
            x = nn.relu(self._normalise(x, i, train, kinds))
            x = _halve(x)
        x = jnp.mean(x, axis=(1, 2))
        for i, width in enumerate(self.dense):
            x = nn.relu(nn.Dense(width, name=f"trunk_dense_{i}", **kinds)(x))
        return apply_heads(x, self.heads, where="ConvNet", **kinds)

    def _normalise(self, x: jax.Array, i: int, train: bool, kinds: dict) -> jax.Array:
        name = f"trunk_norm_{i}"
        if self.norm == "none":
            return x
        # Statistics in float32 for half precision, and in float64 (not rounded to float32) for double.
        kinds = {**kinds, "force_float32_reductions": "float64" not in (str(x.dtype), str(jnp.dtype(self.param_dtype)))}
        if self.norm == "group":
            return nn.GroupNorm(math.gcd(self.groups, x.shape[-1]), name=name, **kinds)(x)
        if self.norm == "batch":
            return nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name=name, **kinds)(x)
        raise ValueError(f'ConvNet(norm) is {self.norm!r}; wanted "none", "group" or "batch".')


def _halve(x: jax.Array) -> jax.Array:
    """2x2 average pooling of `[n, h, w, c]`, written as a mean: its derivatives are plain broadcasts."""
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return jnp.mean(x.reshape(n, h // 2, 2, w // 2, 2, c), axis=(2, 4))
