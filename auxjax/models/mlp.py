"""A multi-layer perceptron with a shared trunk and one linear head per task."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from auxjax.models.outputs import Outputs, apply_heads


class MLP(nn.Module):
    """Dense layers with ReLU, shared by all tasks, then one linear head per task.

    Inputs of any shape `[n, ...]` are flattened to `[n, d]`. Parameters are `trunk_0`, `trunk_1`, ... and
    `head_<task>`, each with a `kernel` and a `bias`.

    Attributes:
      heads: `{task: number of outputs}`.
      hidden: widths of the trunk's layers; the features are the last layer's outputs. Empty: the input itself.
      dtype: dtype of the computation; None follows inputs and parameters.
      param_dtype: dtype of the parameters.
    """

    heads: Mapping[str, int]
    hidden: tuple[int, ...] = (128, 128)
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> Outputs:
        """Applies the model.

        Args:
          x: `[n, ...]`; integers are converted to floating point, and not scaled.
          train: no effect here; every model of this package takes it.

        Returns:
          `Outputs(heads, features)` with features `[n, hidden[-1]]`.
        """
        del train
        if x.ndim < 2:
            raise ValueError(f"MLP(x) has shape {x.shape}; expected [n, ...] with the examples first.")
        x = x.reshape(x.shape[0], -1)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(self.dtype or self.param_dtype)
        for i, width in enumerate(self.hidden):
            x = nn.Dense(width, dtype=self.dtype, param_dtype=self.param_dtype, name=f"trunk_{i}")(x)
            x = nn.relu(x)
        return apply_heads(x, self.heads, where="MLP", dtype=self.dtype, param_dtype=self.param_dtype)
