"""Checkpoints through Orbax: the only file that knows its interface.

A checkpoint is one pytree (the training state and whatever the caller keeps beside it) and one small dict of plain
numbers and strings. Orbax writes into a temporary folder and renames it when all is on disk, so a process killed while
saving leaves the previous checkpoint as it was, and a temporary folder that goes when the folder is opened again.
"""

import contextlib
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Restored(NamedTuple):
    """What `restore` found.

    Attributes:
      step: the number the checkpoint was saved under.
      tree: the pytree, bit for bit.
      note: the dict of plain values saved beside it.
    """

    step: int
    tree: Any
    note: dict


@contextlib.contextmanager
def open_checkpoints(directory, *, keep: int = 2):
    """Opens a folder of checkpoints, made if it is not there; on leaving, waits for what is still being written.

    Args:
      directory: the folder, in which nobody else may be saving: what a process left half-written there is removed.
      keep: how many of the newest checkpoints stay.
    """
    import orbax.checkpoint as ocp  # a second of import time that only runs with checkpoints pay

    directory = pathlib.Path(directory).resolve()
    if jax.process_index() == 0:
        for left in directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(left)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
    manager = ocp.CheckpointManager(directory, options=options)
    try:
        yield manager
        manager.wait_until_finished()
    finally:
        manager.close()


def save(manager, step: int, tree, note: dict | None = None) -> None:
    """Saves a pytree of arrays (typed keys and sharded arrays too) and a dict of plain values under a step number."""
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(tree=ocp.args.StandardSave(tree), note=ocp.args.JsonSave(note or {}))
    manager.save(step, args=args, force=True)


def restore(manager, like, step: int | None = None) -> Restored | None:
    """The newest checkpoint, or that of a step; `None` where there is none.

    Args:
      manager: from `open_checkpoints`.
      like: a pytree with the structure, shapes, dtypes and placement expected, such as a fresh initial state.
      step: number of one that is there; `None` is the newest.

    Raises:
      ValueError: the checkpoint holds another structure or other shapes than `like`.
    """
    import orbax.checkpoint as ocp

    step = manager.latest_step() if step is None else step
    if step is None:
        return None
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    args = ocp.args.Composite(tree=ocp.args.StandardRestore(template), note=ocp.args.JsonRestore())
    try:
        found = manager.restore(step, args=args)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"The checkpoint {step} in {manager.directory} does not fit this run: {error}\n"
            "It was saved by another model, method or optimiser. Use the settings it was made with, or another folder."
        ) from error
    wanted = [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(like)]
    got = [leaf.shape for leaf in jax.tree.leaves(found["tree"])]
    for (path, shape), other in zip(wanted, got, strict=True):
        if shape != other:
            raise ValueError(
                f"The checkpoint {step} in {manager.directory} has shape {other} for {path}; this run has {shape}. "
                "Use the settings it was made with, or another folder."
            )
    return Restored(step, found["tree"], dict(found["note"]))


def arrays(directory, step: int) -> dict[str, np.ndarray]:
    """What a checkpoint holds, as NumPy arrays by path, with nothing known of the run that saved it.

    Args:
      directory: the folder.
      step: number of one that is there.

    Returns:
      Arrays by path, such as `"['state']['params']['trunk_0']['kernel']"`; typed keys as their data.
    """
    import orbax.checkpoint as ocp

    with open_checkpoints(directory) as manager:
        found = manager.restore(step, args=ocp.args.Composite(tree=ocp.args.StandardRestore()))["tree"]
    plain = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(plain(leaf)) for path, leaf in leaves}
