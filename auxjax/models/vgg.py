"""VGG (Simonyan and Zisserman, 2015, Very deep convolutional networks for large-scale image recognition)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from auxjax._internal import checks
from auxjax.models import layers
from auxjax.models.outputs import Outputs, apply_heads

# Table 1 of the paper, its columns A, B, D and E: convolutions in each of the five blocks.
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_WIDER = (1, 2, 4, 8, 8)  # channels of the blocks, in those of the first


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions, normalisation and ReLU, each with 2x2 max pooling at its end; then the mean over
    the positions that are left; then, for every task, dense layers of its own and a linear one.

    With the defaults and 32x32 images this is the network of Liu, Davison and Johns (2019, Self-supervised
    generalisation with meta auxiliary learning): one position with 512 features is left, and every head has a hidden
    layer of 512. The classifier of the first paper, for 224x224 images, reads all 7x7 positions through two layers of
    4,096 instead.

    Parameters are `trunk_conv_<block>_<i>`, `trunk_norm_<block>_<i>` (with a norm), `head_<task>_hidden_<i>` and
    `head_<task>`, counted from 0. With `norm="batch"` there is a `batch_stats` collection, which
    `apply(..., train=True, mutable=["batch_stats"])` updates.

    Max pooling has the second derivatives that implicit hypergradients ask for wherever one pixel of a window is the
    largest. Of equal ones one gets the gradient, which matters little: after ReLU they are nearly always zeros, which
    pass nothing on.

    Attributes:
      heads: `{task: number of outputs}`.
      depth: layers with weights of the paper's network, 11, 13, 16 or 19; three fewer are convolutions.
      width: channels of the first block; the others have 2, 4, 8 and 8 times as many.
      norm: "none", as in the paper, "group" (8 groups, or what divides the channels) or "batch".
      hidden: widths of the dense layers with ReLU that every head has before its linear one.
      dtype: dtype of the computation; None follows inputs and parameters.
      param_dtype: dtype of the parameters.
    """

    heads: Mapping[str, int]
    depth: int = 16
    width: int = 64
    norm: str = "batch"
    hidden: tuple[int, ...] = (512,)
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> Outputs:
        """Applies the model.

        Args:
          x: `[n, h, w, c]`, h and w at least 32: every block halves them (odd sizes lose the last row). Integers are
            converted to floating point, and not scaled.
          train: whether "batch" uses (and updates) the statistics of this batch; otherwise the running ones.

        Returns:
          `Outputs(heads, features)` with features `[n, 8 * width]`.

        Raises:
          ValueError: `depth` or `norm` is unknown, or x is not a batch of images, or they are too small.
        """
        checks.one_of("VGG", tuple(CONVOLUTIONS), depth=self.depth)
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        advice = "Enlarge smaller images, or use ConvNet."
        x = layers.images(x, halvings=len(_WIDER), where="VGG", advice=advice, **kinds)
        bias = self.norm == "none"  # a norm takes the mean away again
        for block, (number, wider) in enumerate(zip(CONVOLUTIONS[self.depth], _WIDER, strict=True)):
            for i in range(number):
                place = f"{block}_{i}"
                x = nn.Conv(self.width * wider, (3, 3), use_bias=bias, name=f"trunk_conv_{place}", **kinds)(x)
                x = layers.normalise(x, self.norm, train=train, name=f"trunk_norm_{place}", where="VGG", **kinds)
                x = nn.relu(x)
            x = layers.max_pool(x)
        return apply_heads(jnp.mean(x, axis=(1, 2)), self.heads, hidden=self.hidden, where="VGG", **kinds)
