"""The training state: everything a run needs to go on, in one pytree.

Nothing about a run lives outside it (no global counter, no hidden generator), so a checkpoint of the state is a
checkpoint of the run, and `vmap` over states is a sweep over runs.
"""

from typing import Any, NamedTuple

import jax


class TrainState(NamedTuple):
    """State of one run.

    Attributes:
      step: int32 scalar, the number of inner updates done.
      key: one typed PRNG key; the key of an update is `fold_in(key, step)`, so the key itself never changes.
      params: inner variables, any pytree of floating arrays.
      opt_state: state of the inner optimiser.
      model_state: what the model updates besides gradients (BatchNorm statistics); `None` without any.
      method: state of the method: its weights or scheduler, their optimiser, its counters; `()` where it has none.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    opt_state: Any
    model_state: Any = None
    method: Any = ()
