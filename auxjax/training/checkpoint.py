"""Checkpoints through Orbax: the only file that knows its interface.

A checkpoint is one pytree (the training state and whatever the caller keeps beside it) and one small dict of plain
numbers and strings. Orbax writes into a temporary folder and renames it when all is on disk, so a process killed while
saving leaves the previous checkpoint as it was, and a temporary folder that goes when the folder is opened again.
"""

import contextlib
import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from auxjax._internal import checks


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
      directory: the folder, in which nobody else may be saving: what a process left half-written there is removed. A
        bucket, such as "gs://bucket/run", needs the package that `fsspec` reads it with (gcsfs).
      keep: how many of the newest checkpoints stay, at least 1.

    Raises:
      TypeError, ValueError: an impossible `keep`.
      ImportError: a bucket, and no package for it.
    """
    checks.count("open_checkpoints", 1, keep=keep)
    if jax.process_index() == 0:
        for left in _folder(directory).glob("*.orbax-checkpoint-tmp*"):
            left.rmtree()
    with _manager(directory, keep) as manager:
        yield manager


@contextlib.contextmanager
def _manager(directory, keep: int = 2):
    """Orbax's manager of a folder; what others may be writing there is left alone."""
    import orbax.checkpoint as ocp  # a second of import time that only runs with checkpoints pay

    directory = _folder(directory)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
    handlers = {"tree": ocp.StandardCheckpointHandler(), "note": ocp.JsonCheckpointHandler()}
    manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
    try:
        yield manager
        manager.wait_until_finished()
    finally:
        manager.close()


def _folder(directory):
    """The path, as `etils.epath` has it: like `pathlib`, for buckets too."""
    from etils import epath  # comes with Orbax

    text = os.fspath(directory)
    scheme = re.match(r"([a-z0-9]+):/+", text)  # pathlib leaves one slash of two
    if scheme is None:
        return epath.Path(text).expanduser().resolve()
    text = f"{scheme[1]}://{text[scheme.end() :]}"
    try:
        path = epath.Path(text)
        path.exists()
    except (ImportError, ValueError) as error:
        raise ImportError(
            f"open_checkpoints(directory={text!r}): expected a folder on disk, or a bucket whose package is installed "
            f"(gcsfs for gs://, s3fs for s3://): {error}"
        ) from error
    return path


def save(manager, step: int, tree, note: dict | None = None) -> None:
    """Saves a pytree of arrays (typed keys and sharded arrays too) and a dict of plain values under a step number.

    Raises:
      ValueError: an array without entries, which Orbax has no form for.
    """
    import orbax.checkpoint as ocp

    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.size(leaf) == 0:
            raise ValueError(
                f"save(tree=): the leaf {jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; expected arrays with "
                "entries. Put () in its place, or leave it out."
            )
    args = ocp.args.Composite(tree=ocp.args.StandardSave(tree), note=ocp.args.JsonSave(note or {}))
    manager.save(step, args=args, force=True)


def restore(manager, like, step: int | None = None, *, convert: bool = False) -> Restored | None:
    """The newest checkpoint, or that of a step; `None` where there is none.

    Args:
      manager: from `open_checkpoints`.
      like: a pytree with the structure, shapes, dtypes and placement expected, such as a fresh initial state.
      step: number of one that is there; `None` is the newest.
      convert: cast floating leaves to the dtypes of `like`, instead of refusing others.

    Raises:
      ValueError: the checkpoint holds another structure, other shapes or other dtypes than `like`; the message names
        the first leaf that differs.
    """
    import orbax.checkpoint as ocp

    step = manager.latest_step() if step is None else step
    if step is None:
        return None
    fits, here = f"The checkpoint {step} in {manager.directory}", _by_path(like)
    advice = "It was saved by another model, method or optimiser. Use the settings it was made with, or another folder."
    try:
        saved = manager.item_metadata(step)["tree"].tree
        if differs := _difference(_by_path(saved), here, convert):
            raise ValueError(differs)
        # In the containers that Orbax knows: those of `like` may be others, and empty ones are none to it.
        template = jax.tree_util.tree_map_with_path(
            lambda path, _: ocp.utils.to_shape_dtype_struct(here[_names(path)]), saved
        )
        args = ocp.args.Composite(tree=ocp.args.StandardRestore(template), note=ocp.args.JsonRestore())
        found = manager.restore(step, args=args)
        leaves = _by_path(found["tree"])
        for path, leaf in here.items():  # a key is saved as its data
            if leaf is not None and jnp.result_type(leaf) != jnp.result_type(leaves[path]):
                dtypes = jnp.result_type(leaves[path]), jnp.result_type(leaf)
                raise ValueError(f"has dtype {dtypes[0]} for {'/'.join(path)}; this run has {dtypes[1]}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{fits} does not fit this run: it {error}. {advice}") from error
    tree = jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in here if here[path] is not None])
    return Restored(step, tree, dict(found["note"]))


def _difference(saved, here, convert: bool) -> str | None:
    """How the first leaf that differs differs; `None` where all are alike."""
    for path in [*here, *(path for path in saved if path not in here)]:
        name, old, new = "/".join(path), _described(saved.get(path)), _described(here.get(path))
        if old is None:
            if new is None:
                continue
            return f"has None, or nothing, at {name}, where this run has {new.dtype}{list(new.shape)}"
        if new is None:
            return f"has {old.dtype}{list(old.shape)} at {name}, where this run has None, or nothing"
        if old.shape != new.shape:
            return f"has shape {old.shape} for {name}; this run has {new.shape}"
        floating = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in (old, new))
        if old.dtype != new.dtype and not (convert and floating):
            hint = " (restore(convert=True) casts it)" * floating
            return f"has dtype {old.dtype} for {name}; this run has {new.dtype}{hint}"
    return None


def _described(leaf) -> jax.ShapeDtypeStruct | None:
    """Shape and dtype; of a key, those of its data, as which it is saved."""
    if leaf is None:
        return None
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    shape = jax.ShapeDtypeStruct(tuple(getattr(leaf, "shape", ())), dtype)
    return jax.eval_shape(jax.random.key_data, shape) if jnp.issubdtype(dtype, jax.dtypes.prng_key) else shape


def _by_path(tree) -> dict[tuple[str, ...], Any]:
    """Leaves by the names that Orbax gives them, `None` among them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: node is None)
    return {_names(path): leaf for path, leaf in leaves}


def _names(path) -> tuple[str, ...]:
    kinds = ("name", "idx", "key")
    return tuple(str(next(getattr(key, kind) for kind in kinds if hasattr(key, kind))) for key in path)


def arrays(directory, step: int) -> dict[str, np.ndarray]:
    """What a checkpoint holds, as NumPy arrays by path, with nothing known of the run that saved it.

    Args:
      directory: the folder.
      step: number of one that is there.

    Returns:
      Arrays by path, such as `"['state']['params']['trunk_0']['kernel']"`; typed keys as their data.
    """
    import orbax.checkpoint as ocp

    with _manager(directory) as manager:
        found = manager.restore(step, args=ocp.args.Composite(tree=ocp.args.StandardRestore()))["tree"]
    plain = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(plain(leaf)) for path, leaf in leaves}
