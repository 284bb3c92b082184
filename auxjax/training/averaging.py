"""A running mean of the params: a steadier model to evaluate, and the teacher of Mean Teacher and its kin.

    a_0 = theta_0,      a_t = d_t a_{t-1} + (1 - d_t) theta_t,      d_t = min(decay, 1 - 1 / t)

With the warm-up a_t is the plain mean of theta_1 ... theta_t until t reaches 1 / (1 - decay), and an exponential moving
average from then on: random initial params leave no trace. Without it, d_t = decay throughout.

Not for: optimisers that average by themselves (`optax.contrib.schedule_free`), or averages of anything but params.

Reference: Tarvainen, Valpola, 2017, Mean teachers are better role models, NeurIPS.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype


class Average(NamedTuple):
    """How a run averages its params, for `make_step(average=)`.

    Attributes:
      decay: weight of the old mean per inner update, in [0, 1).
      warm_up: let the decay grow from 0 as 1 - 1 / t.
    """

    decay: float = 0.999
    warm_up: bool = True


def check_average(average: Average | None) -> None:
    """Raises unless it is `None` or an `Average` with a decay in [0, 1)."""
    if average is None:
        return
    if not isinstance(average, Average):
        raise TypeError(f"make_step(average=): expected auxjax.Average(decay=0.999), got {type(average).__name__}.")
    checks.number("Average", least=0, below=1, decay=average.decay)


def start_average(params) -> Any:
    """a_0: the params, copied, in at least float32."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, accumulation_dtype(leaf)), params)


def update_average(average: Average, averaged, params, step: jax.Array) -> Any:
    """a_t from a_{t-1} and theta_t.

    Args:
      average: the decay and its warm-up.
      averaged: a_{t-1}, a pytree like `params`.
      params: theta_t.
      step: int32 scalar, t, at least 1.

    Returns:
      a_t, in the dtypes of `averaged`. Cost: one axpy of the params.
    """

    def mean(old, new):
        decay = jnp.asarray(average.decay, old.dtype)
        if average.warm_up:
            decay = jnp.minimum(decay, 1 - 1 / step.astype(old.dtype))
        return old + (1 - decay) * (new.astype(old.dtype) - old)

    return jax.tree.map(mean, averaged, params)
