"""What a training step needs of a device's memory, before the first step: counted bytes and the compiler's own plan.

    total = state + data + temporaries + outputs

State and data are arrays whose bytes can be counted; temporaries (activations, the vectors of a linear solver) are what
XLA's buffer assignment lays out for the compiled step, which nobody can count by hand. Nothing is run, and with
`jax.eval_shape(init, ...)` for a state nothing is allocated either.

Not for: what else lives on the device, such as a data loader's buffers or the allocator's fragments.
"""

import math
from typing import Any, NamedTuple

import jax

from auxjax.interface import TrainState


class MemoryEstimate(NamedTuple):
    """Bytes on one device.

    Attributes:
      params: inner variables.
      optimizer: state of the inner optimiser.
      method: state of the method: outer variables, their optimiser, a warm start.
      model_state: BatchNorm statistics and the like.
      data: inner and outer batches, or the data sets the step draws from; an array that is passed twice counts once.
      temporaries: what the compiled step needs while it runs.
      outputs: results that do not take the place of an argument: metrics, and with `donate=False` a second state.
      total: the sum of these.
      limit: what the device has, or `None` where it does not say (CPU).
    """

    params: int
    optimizer: int
    method: int
    model_state: int
    data: int
    temporaries: int
    outputs: int
    total: int
    limit: int | None


def estimate_memory(step: Any, state: TrainState, inner_batch: Any, outer_batch: Any = None) -> MemoryEstimate:
    """Compiles a step and says what it will need, without running it.

    Args:
      step: from `make_step`, or any jitted function of the same arguments.
      state: a training state, or its shapes, from `jax.eval_shape(init, key, params, batch)`.
      inner_batch: what the step will get, or its shapes. For several devices pass the arrays as they will lie there:
        the numbers are those of one device.
      outer_batch: the same.

    Returns:
      A `MemoryEstimate`. A step with loop "host" is several programs that run one after the other: temporaries and
      outputs are those of the largest. The CPU lays out programs more loosely than accelerators do; estimate on the
      kind of device that will train.

    Raises:
      TypeError: a step that cannot be lowered.

    Cost: one compilation, and no second one: the first step of the process with the same shapes finds it done (jax
    0.10), and that of another process in the persistent compilation cache, if it is on.
    """
    if not hasattr(step, "lower"):
        raise TypeError(
            f"estimate_memory(step=): expected the step of make_step or another jitted function, got "
            f"{type(step).__name__}. Wrap it: jax.jit(step)."
        )
    lowered = step.lower(state, inner_batch, outer_batch)
    plans = [part.compile().memory_analysis() for part in (lowered if isinstance(lowered, tuple) else (lowered,))]
    found = {
        "params": _bytes(state.params),
        "optimizer": _bytes(state.opt_state),
        "method": _bytes(state.method),
        "model_state": _bytes(state.model_state),
        "data": _bytes((inner_batch, outer_batch)),
        "temporaries": max(plan.temp_size_in_bytes for plan in plans),
        "outputs": max(plan.output_size_in_bytes - plan.alias_size_in_bytes for plan in plans),
    }
    return MemoryEstimate(**found, total=sum(found.values()), limit=_limit(state.params))


def _bytes(tree) -> int:
    """Bytes of a pytree's arrays on one device."""
    different = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}
    return sum(_leaf_bytes(leaf) for leaf in different.values())


def _leaf_bytes(leaf) -> int:
    kind = jax.eval_shape(lambda: leaf) if not hasattr(leaf, "dtype") else leaf
    sharding = getattr(leaf, "sharding", None)
    shape = kind.shape if sharding is None else sharding.shard_shape(kind.shape)
    return math.prod(shape) * kind.dtype.itemsize


def _limit(params) -> int | None:
    placed = next((leaf.sharding for leaf in jax.tree.leaves(params) if getattr(leaf, "sharding", None)), None)
    device = jax.local_devices()[0] if placed is None else next(iter(placed.device_set))
    return (device.memory_stats() or {}).get("bytes_limit")
