"""Placement on several devices: data parallelism by sharding. It holds no mathematics.

The training step is written for the whole batch: losses are means over it, and nothing in the library names a device.
Splitting the leading axis of every batch over a mesh and keeping the state on every device is then enough; the compiler
inserts the communication, also inside the matrix-vector products of a hypergradient, and the result is the one that a
single device gives, up to the order of sums.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(num_devices: int | None = None) -> Mesh:
    """A one-dimensional mesh with the axis "data".

    Args:
      num_devices: how many of `jax.devices()` to use, the first ones; all by default.

    Raises:
      ValueError: more devices than there are.
    """
    devices = jax.devices()
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        raise ValueError(f"data_mesh(num_devices={num_devices}): this process sees {len(devices)} devices.")
    return Mesh(np.array(devices[:count]), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree, mesh: Mesh):
    """Puts a copy of every leaf on every device of the mesh: what a training state and device-resident data need."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(batch, mesh: Mesh):
    """Splits the leading axis of every leaf over the axis "data"; scalars and keys stay whole.

    Works on concrete arrays and, inside jit, as a constraint.

    Raises:
      ValueError: a leading axis that the number of devices does not divide.
    """
    size = mesh.shape["data"]
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def place(path, leaf):
        shape = np.shape(leaf)
        if shape and shape[0] % size:
            raise ValueError(
                f"shard_batch: the batch leaf {jax.tree_util.keystr(path) or '(the batch)'} has {shape[0]} examples, "
                f"which {size} devices cannot share evenly. Use a batch size that is a multiple of {size}."
            )
        sharding = split if shape else whole
        traced = isinstance(leaf, jax.core.Tracer)
        return jax.lax.with_sharding_constraint(leaf, sharding) if traced else jax.device_put(leaf, sharding)

    return jax.tree_util.tree_map_with_path(place, batch)
