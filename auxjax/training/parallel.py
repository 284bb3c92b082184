"""Placement on several devices: data parallelism by sharding. It holds no mathematics.

The training step is written for the whole batch: losses are means over it, and nothing in the library names a device.
Splitting the leading axis of every batch over a mesh and keeping the state on every device is then enough; the compiler
inserts the communication, also inside the matrix-vector products of a hypergradient, and the result is the one that a
single device gives, up to the order of sums.
"""

import math
from functools import partial

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from auxjax.interface import TrainState


def data_mesh(num_devices: int | None = None) -> Mesh:
    """A one-dimensional mesh with the axis "data".

    Args:
      num_devices: how many of `jax.devices()` to use, the first ones; all by default.

    Raises:
      ValueError: more devices than there are; with several processes, other than all devices.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))  # a process's side by side
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        raise ValueError(f"data_mesh(num_devices={num_devices}): this process sees {len(devices)} devices.")
    if jax.process_count() > 1 and count != len(devices):
        raise ValueError(
            f"data_mesh(num_devices={num_devices}): {jax.process_count()} processes have {len(devices)} devices, and "
            "each must take part with all of its own. Leave num_devices out."
        )
    return Mesh(np.array(devices[:count]), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree, mesh: Mesh):
    """Puts a copy of every leaf on every device of the mesh: what params and device-resident data need.

    With several processes, each must hold the same values.
    """
    return jax.tree.map(lambda leaf: _put(leaf, on_all(mesh)), tree)


def on_all(mesh: Mesh) -> NamedSharding:
    """The sharding of what lies whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place_state(state: TrainState, mesh: Mesh, split_above: int | None = 2**20) -> TrainState:
    """Puts a training state on the devices: a copy on each, except for what is large and belongs to no forward pass.

    Leaves of the optimiser's and the method's state (moments, a weight per training example) with at least
    `split_above` entries are split along their first axis that the number of devices divides. The compiler gathers what
    an update needs. Params and model state stay whole on every device.

    Works on concrete arrays and, inside jit, as a constraint.

    Args:
      state: a training state.
      mesh: a mesh with the axis "data".
      split_above: entries from which on a leaf is split; `None` splits nothing.
    """
    return jax.tree.map(_put, state, state_shardings(state, mesh, split_above))


def state_shardings(state: TrainState, mesh: Mesh, split_above: int | None = 2**20) -> TrainState:
    """Where `place_state` puts every leaf of a state, or of the shapes of one: a `TrainState` of shardings."""
    size = mesh.shape["data"]

    def sharding_of(leaf):
        shape = jnp.shape(leaf)
        axes = [axis for axis, length in enumerate(shape) if length % size == 0]
        if split_above is None or not axes or math.prod(shape) < split_above:
            return on_all(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * axes[0], "data"))

    whole = jax.tree.map(lambda leaf: on_all(mesh), state)
    split = jax.tree.map(sharding_of, (state.opt_state, state.method))
    return whole._replace(opt_state=split[0], method=split[1])


def shard_batch(batch, mesh: Mesh):
    """Splits the leading axis of every leaf over the axis "data"; scalars and keys stay whole.

    Works on concrete arrays and, inside jit, as a constraint.

    Raises:
      ValueError: a leading axis that the number of devices does not divide.
    """
    size = mesh.shape["data"]
    split, whole = NamedSharding(mesh, PartitionSpec("data")), on_all(mesh)

    def place(path, leaf):
        shape = np.shape(leaf)
        if shape and shape[0] % size:
            raise ValueError(
                f"shard_batch: the batch leaf {jax.tree_util.keystr(path) or '(the batch)'} has {shape[0]} examples, "
                f"which {size} devices cannot share evenly. Use a batch size that is a multiple of {size}."
            )
        sharding = split if shape else whole
        return _put(leaf, sharding)

    return jax.tree_util.tree_map_with_path(place, batch)


def _put(leaf, sharding: NamedSharding):
    if isinstance(leaf, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(leaf, sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    # Devices of other processes, which device_put does not reach: each process gives its own devices their part.
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf if leaf.sharding == sharding else jax.jit(lambda x: x, out_shardings=sharding)(leaf)
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        wrap = partial(jax.random.wrap_key_data, impl=jax.random.key_impl(leaf))
        return jax.jit(wrap, out_shardings=sharding)(_put(jax.random.key_data(leaf), sharding))
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
