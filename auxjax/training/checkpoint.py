"""Checkpoints through Orbax: the only file that knows its interface.

A checkpoint is one pytree (the training state and whatever the caller keeps beside it) and one small dict of plain
numbers and strings. Orbax writes into a temporary folder and renames it when all is on disk, so a process killed while
saving leaves the previous checkpoint as it was.
"""

import contextlib
import pathlib
from typing import Any, NamedTuple

import jax


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
      directory: the folder.
      keep: how many of the newest checkpoints stay.
    """
    import orbax.checkpoint as ocp  # a second of import time that only runs with checkpoints pay

    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
    manager = ocp.CheckpointManager(pathlib.Path(directory).resolve(), options=options)
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


def restore(manager, like) -> Restored | None:
    """The newest checkpoint, or `None` where there is none.

    Args:
      manager: from `open_checkpoints`.
      like: a pytree with the structure, shapes, dtypes and placement wanted, such as a fresh initial state.

    Raises:
      ValueError: the checkpoint holds another structure or other shapes than `like`.
    """
    import orbax.checkpoint as ocp

    step = manager.latest_step()
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
    came = [leaf.shape for leaf in jax.tree.leaves(found["tree"])]
    for (path, shape), other in zip(wanted, came, strict=True):
        if shape != other:
            raise ValueError(
                f"The checkpoint {step} in {manager.directory} has shape {other} for {path}; this run has {shape}. "
                "Use the settings it was made with, or another folder."
            )
    return Restored(step, found["tree"], dict(found["note"]))
