"""Cutting a set into disjoint parts: stratified by class, or with groups kept whole. Functions of the seed alone."""

import numbers
from typing import NamedTuple

import numpy as np


class SplitIndices(NamedTuple):
    """Disjoint row numbers of one labelled set, int64 [n_split] each, in shuffled order."""

    train: np.ndarray
    dev: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def four_way_split(
    labels: np.ndarray,
    *,
    num_classes: int,
    dev_size: int | float,
    validation_size: int | float,
    test_size: int | float,
    train_size: int | float | None = None,
    seed: int,
) -> SplitIndices:
    """Cuts the rows of one labelled set into four class-stratified, disjoint, shuffled parts.

    Each part in turn takes its share of what is left of every class, n_part * left_k / left rounded by largest
    remainder, so class frequencies differ from the set's by less than one example per part already cut. The order
    inside a part is random: a reader that never shuffles still sees all classes.

    Args:
      labels: [n] integers in [0, num_classes).
      num_classes: C.
      dev_size, validation_size, test_size: counts (int) or fractions of n (float in [0, 1)). 0 leaves validation or
        test empty, for sets that publish their own; dev may not be empty.
      train_size: count or fraction, or None for all that remains.
      seed: non-negative integer; decides membership and order, nothing else does.

    Returns:
      `SplitIndices`.

    Raises:
      ValueError: an empty dev or train part, sizes beyond n, a label out of range, or a class too rare to appear in a
        part that is large enough to hold every class.
    """
    where = "four_way_split"
    labels = _check_labels(labels, num_classes, where)
    rng = generator(seed, where)
    total = labels.shape[0]
    sizes = {
        "test": _count("test_size", test_size, total, where),
        "validation": _count("validation_size", validation_size, total, where),
        "dev": _count("dev_size", dev_size, total, where),
    }
    if sizes["dev"] == 0:
        raise ValueError(
            f"{where}: dev is empty: dev_size={dev_size!r} of {total} examples; the outer loss needs examples of its "
            "own: pass dev_size >= 1, or use train as dev by drawing the outer batches from train."
        )
    if train_size is None:
        sizes["train"] = max(total - sum(sizes.values()), 0)
    else:
        sizes["train"] = _count("train_size", train_size, total, where)
    asked = ", ".join(f"{name} {sizes[name]}" for name in SplitIndices._fields)
    if sum(sizes.values()) > total:
        raise ValueError(
            f"{where}: the sizes exceed the data: {asked} make {sum(sizes.values())} of {total} examples; lower one of "
            "them (train_size=None takes all that remains)."
        )
    if sizes["train"] == 0:
        raise ValueError(f"{where}: train is empty: {asked} of {total} examples; lower the other sizes.")
    free = np.ones(total, bool)
    parts = {}
    for name in ("test", "validation", "dev", "train"):
        rows = np.flatnonzero(free)
        parts[name] = rows[_stratified(labels[rows], sizes[name], num_classes, rng, f"{where}: {name}")]
        free[parts[name]] = False
    return SplitIndices(**parts)


def stratified_subset(labels: np.ndarray, size: int | float, *, num_classes: int, seed: int) -> np.ndarray:
    """Row numbers, int64 [size], of a class-stratified random subset in shuffled order; see `four_way_split`."""
    where = "stratified_subset"
    labels = _check_labels(labels, num_classes, where)
    count = _count("size", size, labels.shape[0], where)
    if count > labels.shape[0]:
        raise ValueError(f"{where}: size={size!r} exceeds the {labels.shape[0]} examples there are.")
    return _stratified(labels, count, num_classes, generator(seed, where), where)


def group_split(groups: np.ndarray, sizes: dict[str, int | float], *, seed: int) -> dict[str, np.ndarray]:
    """Cuts rows into parts so that every group (a scene, a user) lies in one part, or is left out, as a whole.

    Groups are taken in order of size, the largest first and ties at random; each goes to the part that lacks most
    examples, and is left out where every part has its share already.

    Args:
      groups: [n] integers.
      sizes: {part: count (int) or fraction of n (float in [0, 1))}; met as nearly as whole groups allow by this rule.
      seed: non-negative integer.

    Returns:
      {part: row numbers, int64, in shuffled order}.

    Raises:
      ValueError: sizes of zero or beyond n, or fewer groups than parts need for each to have one.
    """
    where = "group_split"
    groups = np.asarray(groups)
    if groups.ndim != 1 or not np.issubdtype(groups.dtype, np.integer):
        raise ValueError(f"{where}: expected groups to be integers [n], got {groups.dtype} {groups.shape}.")
    rng = generator(seed, where)
    lacking = {name: _count(name, size, groups.size, where) for name, size in sizes.items()}
    if not lacking or min(lacking.values()) == 0 or sum(lacking.values()) > groups.size:
        raise ValueError(f"{where}: expected sizes >= 1 that make at most {groups.size} examples, got {lacking}.")
    found, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    if found.size < len(sizes):
        raise ValueError(f"{where}: expected at least {len(sizes)} groups, one per part, got {found.size}.")
    members = {name: [] for name in sizes}
    for group in np.lexsort((rng.permutation(found.size), -counts)):
        name = max(lacking, key=lambda part: lacking[part])
        # A group of which more than half would be too much is left out, unless the part is still empty.
        if members[name] and lacking[name] < counts[group] - lacking[name]:
            continue
        members[name].append(group)
        lacking[name] -= int(counts[group])
    empty = [name for name in sizes if not members[name]]
    if empty:
        raise ValueError(
            f"{where}: too few groups: none is left for {empty}, of {found.size} groups of up to {counts.max()} "
            f"examples; ask for larger parts there, or smaller ones elsewhere."
        )
    return {name: rng.permutation(np.flatnonzero(np.isin(inverse, members[name]))).astype(np.int64) for name in sizes}


def generator(seed: int, where: str) -> np.random.Generator:
    """`np.random.default_rng(seed)`, refusing None: a split that cannot be made again cannot be compared."""
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(f"{where}: seed must be a non-negative integer, got {seed!r}.")
    return np.random.default_rng(int(seed))


def _check_labels(labels: np.ndarray, num_classes: int, where: str) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{where}: labels must be integers [n], got {labels.dtype} {labels.shape}.")
    present = np.unique(labels)
    if present.size and (present[0] < 0 or present[-1] >= num_classes):
        raise ValueError(f"{where}: labels must lie in [0, {num_classes}), got {present[0]} to {present[-1]}.")
    absent = np.setdiff1d(np.arange(num_classes), present)
    if absent.size:
        raise ValueError(f"{where}: no example of class {absent.tolist()}; num_classes={num_classes} is wrong.")
    return labels


def _count(name: str, size: int | float, total: int, where: str) -> int:
    """A count as it is, a fraction of `total` rounded."""
    if isinstance(size, numbers.Integral) and not isinstance(size, bool) and size >= 0:
        return int(size)
    if isinstance(size, float) and 0.0 <= size < 1.0:
        return round(size * total)
    raise ValueError(
        f"{where}: {name} must be a count (an int >= 0) or a fraction of the {total} examples (a float in [0, 1)), got "
        f"{size!r}."
    )


def _stratified(labels: np.ndarray, size: int, num_classes: int, rng: np.random.Generator, where: str) -> np.ndarray:
    """Positions of `size` rows, shared out over the classes by largest remainder; ties are broken at random."""
    counts = np.bincount(labels, minlength=num_classes)
    # size <= sum(counts), so no class's share, rounded up, exceeds what the class has. Integer arithmetic keeps equal
    # classes exactly tied, where floating-point remainders would order them.
    shares, remainders = np.divmod(size * counts, max(labels.size, 1))
    order = np.lexsort((rng.permutation(num_classes), -remainders))
    shares[order[: size - shares.sum()]] += 1
    if size >= num_classes and (shares == 0).any():
        rare = int(np.argmin(shares))
        raise ValueError(
            f"{where}: class {rare} has too few examples: {counts[rare]} of the {labels.size} not yet taken, which is "
            f"none of {size}; ask for a larger part here or smaller parts elsewhere, or drop the class."
        )
    chosen = [rng.permutation(np.flatnonzero(labels == k))[: shares[k]] for k in range(num_classes)]
    return rng.permutation(np.concatenate(chosen)).astype(np.int64)
