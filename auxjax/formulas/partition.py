"""Choosing leaves of a pytree of parameters: by a mask of bools, made by hand or from the leaves' paths.

Task gradients are compared on the shared trunk only, since a head gets gradients from its own task alone. What the
trunk is, only the model knows: so it is told by a pytree of bools, like the parameters or a prefix of them.

    trunk = mask_by_path(params, lambda path: "trunk" in path)
    selected, merge = partition(params, trunk)
    gradient = jax.grad(lambda leaves: loss(merge(leaves)))(selected)         # on the trunk, with the heads held fixed

Masks are static: Python or NumPy bools that are known when a function is traced. They are not the masks of optax,
which hide leaves from a transformation: here the chosen leaves are taken out, as a list, and put back.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np


def partition(params, mask) -> tuple[list, Callable[[Sequence], Any]]:
    """Splits `params` into the chosen leaves and a function that puts leaves in their place.

    `merge(selected)` is `params` again; `merge(others)` is `params` with the chosen leaves replaced.

    Args:
      params: pytree.
      mask: pytree of bools like `params`, or a prefix of it (True alone chooses everything).

    Returns:
      `(selected, merge)`: the list of chosen leaves in the order of `jax.tree.leaves(params)`, and a function of such
      a list. `merge` holds the leaves that were not chosen.

    Raises:
      TypeError: a leaf of `mask` is not a bool, or is traced.
      ValueError: `mask` is not a prefix of `params`, or chooses nothing.
    """
    where = "partition(mask)"
    leaves, structure = jax.tree.flatten(params)
    for flag in jax.tree.leaves(mask):
        if isinstance(flag, jax.core.Tracer) or not isinstance(flag, bool | np.bool_):
            raise TypeError(
                f"{where} has a leaf of type {type(flag).__name__}; expected Python bools. Build the mask outside of "
                "the traced function, for instance with mask_by_path."
            )
    try:
        flags = jax.tree.leaves(jax.tree.broadcast(mask, params))
    except ValueError as error:
        raise ValueError(
            f"{where} is neither like params nor a prefix of it: {jax.tree.structure(mask)} against {structure}."
        ) from error
    chosen = [i for i, flag in enumerate(flags) if flag]
    if not chosen:
        raise ValueError(f"{where} chooses no leaf of params. {_describe_paths(params)}")

    def merge(selected: Sequence):
        if len(selected) != len(chosen):
            raise ValueError(f"merge(selected) got {len(selected)} leaves; partition had chosen {len(chosen)}.")
        merged = list(leaves)
        for i, leaf in zip(chosen, selected, strict=True):
            merged[i] = leaf
        return jax.tree.unflatten(structure, merged)

    return [leaves[i] for i in chosen], merge


class Modules(NamedTuple):
    """A grouping of leaves into modules. It holds no arrays and is known when a function is traced.

    Attributes:
      names: the modules' names, in order of their first leaf.
      of_leaf: for every chosen leaf, in the order of `partition`, the number of its module.
    """

    names: tuple[str, ...]
    of_leaf: tuple[int, ...]


def modules_by_path(params, module_of: Callable[[str], str], *, trunk=None) -> Modules:
    """Groups leaves into modules by their paths.

    Args:
      params: pytree; only its structure is used.
      module_of: function of the path, keys joined by "/" as in `mask_by_path`, to the name of the leaf's module:
        `lambda path: path` makes every leaf a module, `lambda path: "all"` makes one module of them,
        `lambda path: path.split("/")[1]` one of every layer.
      trunk: pytree of bools like `params` or a prefix of it: which leaves to group; all by default.

    Returns:
      `Modules(names, of_leaf)`.

    Raises:
      TypeError: `module_of` returns something else than a string.
      ValueError: as `partition`.
    """
    paths = jax.tree.map_with_path(lambda path, _: _join(path), params)
    chosen, _ = partition(paths, True if trunk is None else trunk)
    labels = [module_of(path) for path in chosen]
    for path, label in zip(chosen, labels, strict=True):
        if not isinstance(label, str):
            raise TypeError(
                f"modules_by_path(module_of) returned {label!r} for the path {path!r}; expected a module's name."
            )
    names = tuple(dict.fromkeys(labels))
    return Modules(names, tuple(names.index(label) for label in labels))


def mask_by_path(params, predicate: Callable[[str], object]):
    """A pytree of bools like `params`: which leaves have a path that `predicate` accepts.

    Args:
      params: pytree; only its structure is used.
      predicate: function of the path, keys joined by "/", such as `"params/trunk_0/kernel"`; list positions appear as
        numbers. For a regular expression pass `lambda path: re.search(pattern, path) is not None`.

    Returns:
      A pytree of Python bools with the structure of `params`.

    Raises:
      ValueError: no path is accepted; the message lists the paths there are.
    """
    mask = jax.tree.map_with_path(lambda path, _: bool(predicate(_join(path))), params)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(f"mask_by_path(predicate) accepts no leaf of params. {_describe_paths(params)}")
    return mask


def checked_mask(where: str, params, chosen):
    """The leaves of `params` that an option chooses, as a pytree of bools; `None`, for all of them, stays `None`.

    Args:
      where: name of the option, for messages.
      params: pytree; only its structure is used.
      chosen: a predicate on the path of a leaf, as for `mask_by_path`, a pytree of bools like `params` or a prefix of
        it, or `None`.

    Returns:
      A pytree of bools with the structure of `params`, or `None`.

    Raises:
      TypeError: none of these.
      ValueError: no leaf is chosen, or a predicate accepts all of several leaves, which is what `None` says; bools of
        another structure.
    """
    if chosen is None:
        return None
    given = jax.tree.leaves(chosen)
    bools = all(isinstance(flag, bool | np.bool_) for flag in given)
    if (given and bools) or not callable(chosen):  # a module of bools can be called as well
        if not bools:
            raise TypeError(
                f"{where}: expected a function of a leaf's path, such as lambda path: 'trunk' in path, a pytree of "
                f"bools like params, or None for all leaves, got {chosen!r}."
            )
        if not any(given):
            raise ValueError(f"{where} chooses no leaf of params. {_describe_paths(params)}")
        leaves, put_back = partition(jax.tree.map(lambda _: False, params), chosen)
        return put_back([True] * len(leaves))
    mask = jax.tree.map_with_path(lambda path, _: bool(chosen(_join(path))), params)
    flags = jax.tree.leaves(mask)
    if not any(flags):
        raise ValueError(
            f"{where} accepts no leaf of params: expected some of the paths below. {_describe_paths(params)}"
        )
    if all(flags) and len(flags) > 1:
        raise ValueError(
            f"{where} accepts every leaf of params: expected some of the paths below, or None where all are meant. "
            f"{_describe_paths(params)}"
        )
    return mask


def _join(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _describe_paths(params, limit: int = 40) -> str:
    paths = [_join(path) for path, _ in jax.tree.leaves_with_path(params)]
    if not paths:
        return "It has no leaves at all."
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return f"Its paths: {', '.join(paths[:limit])}{more}."
