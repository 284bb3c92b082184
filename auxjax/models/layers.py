"""What the convolutional networks of this package share: a check of the input, normalisation, pooling."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from auxjax._internal import checks


def images(x: jax.Array, *, halvings: int, where: str, advice: str, dtype=None, param_dtype) -> jax.Array:
    """Images as floating point, not scaled; validates their size.

    Args:
      x: `[n, h, w, c]`, integers or floating point.
      halvings: how often the network halves height and width.
      where: name of the model, for messages.
      advice: a sentence for messages, what to do with smaller images.
      dtype: dtype that integers are converted to, or None for `param_dtype`.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: x is not a batch of images, or nothing would be left of them.
    """
    least = 2**halvings
    if x.ndim != 4 or min(x.shape[1:3]) < least:
        raise ValueError(
            f"{where}(x) has shape {x.shape}; expected [n, h, w, c] with h and w at least {least}, since each of the "
            f"{halvings} stages halves them. {advice}"
        )
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype or param_dtype)


def normalise(
    x: jax.Array,
    norm: str,
    *,
    train: bool,
    groups: int = 8,
    momentum: float = 0.9,
    name: str,
    where: str,
    dtype=None,
    param_dtype,
) -> jax.Array:
    """Adds a normalisation over the channels; call it inside a `compact` method.

    Args:
      x: `[n, h, w, c]`.
      norm: "none", "group" or "batch".
      train: whether "batch" uses (and updates) the statistics of this batch; otherwise the running ones.
      groups: largest number of groups of "group"; the number used is its greatest common divisor with the channels.
      momentum: of the running statistics of "batch" (the share of the old value).
      name: of the submodule.
      where: name of the model, for messages.
      dtype: dtype of the computation, or None for that of input and parameters.
      param_dtype: dtype in which parameters are made.

    Raises:
      ValueError: `norm` is unknown.
    """
    checks.one_of(where, ("none", "group", "batch"), norm=norm)
    if norm == "none":
        return x
    # Statistics in float32 for half precision, and in float64 (not rounded to float32) for double.
    single = "float64" not in (str(x.dtype), str(jnp.dtype(param_dtype)))
    kinds = {"dtype": dtype, "param_dtype": param_dtype, "force_float32_reductions": single, "name": name}
    if norm == "group":
        return nn.GroupNorm(math.gcd(groups, x.shape[-1]), **kinds)(x)
    return nn.BatchNorm(use_running_average=not train, momentum=momentum, **kinds)(x)


def mean_pool(x: jax.Array) -> jax.Array:
    """2x2 average pooling of `[n, h, w, c]`, written as a mean: its derivatives are plain broadcasts."""
    return jnp.mean(_windows(x), axis=(2, 4))


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 maximum pooling of `[n, h, w, c]`; of equal pixels one gets the gradient, and NaN is passed on.

    The larger of two is selected, three times, instead of `jnp.max`: that one's derivative goes to the entries that
    equal the result, and where XLA computes both anew behind a normalisation, their last digits may differ and the
    gradient is silently lost (seen with jax 0.10.2 on the CPU). On the CPU it is also faster than a windowed maximum.
    """
    x = _windows(x)
    x = _larger(x[:, :, 0], x[:, :, 1])
    return _larger(x[:, :, :, 0], x[:, :, :, 1])


def _larger(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where((x > y) | jnp.isnan(x), x, y)


def _windows(x: jax.Array) -> jax.Array:
    """`[n, h // 2, 2, w // 2, 2, c]`; odd sizes lose the last row."""
    n, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
