"""A small convolutional network with a shared trunk and one linear head per task."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from auxjax.models import layers
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
          ValueError: `norm` is unknown, or x is not a batch of images, or they are too small for the number of stages.
        """
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        advice = "Use fewer channels for smaller images."
        x = layers.images(x, halvings=len(self.channels), where="ConvNet", advice=advice, **kinds)
        rules = {"groups": self.groups, "momentum": self.momentum, "where": "ConvNet", **kinds}
        for i, width in enumerate(self.channels):
            bias = self.norm == "none"  # a norm takes the mean away again
            x = nn.Conv(width, (3, 3), use_bias=bias, name=f"trunk_conv_{i}", **kinds)(x)
            x = nn.relu(layers.normalise(x, self.norm, train=train, name=f"trunk_norm_{i}", **rules))
            x = layers.mean_pool(x)
        x = jnp.mean(x, axis=(1, 2))
        for i, width in enumerate(self.dense):
            x = nn.relu(nn.Dense(width, name=f"trunk_dense_{i}", **kinds)(x))
        return apply_heads(x, self.heads, where="ConvNet", **kinds)
