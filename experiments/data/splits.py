"""The contract between a data set and a run: four disjoint splits, each with one purpose.

    train       the inner loss; the only split whose labels may be corrupted
    dev         the outer loss (the hypergradient); clean labels
    validation  choosing hyperparameters and checkpoints; never differentiated
    test        looked at once, at the end

A split is a dict of NumPy arrays with a common leading axis n:

    image       [n, H, W, C]  uint8, or float32 without NaN
    label       [n] int32     what training sees
    true_label  [n] int32     what the source says
    corrupted   [n] bool      label != true_label
    example_id  [n] int32     index in the source, unique over all four splits, the same for every seed

A single-task baseline that may not look at the outer loss gets `merge(train, dev)`, or the comparison would hand the
bilevel methods extra labelled examples. Not for data that arrives as a stream: everything here is in memory.
"""

import numbers
from typing import NamedTuple

import numpy as np

Examples = dict[str, np.ndarray]

KEYS = ("image", "label", "true_label", "corrupted", "example_id")
NAMES = ("train", "dev", "validation", "test")
_DTYPES = {"label": np.int32, "true_label": np.int32, "corrupted": np.bool_, "example_id": np.int32}


class Splits(NamedTuple):
    """A data set cut in four, with what is needed to name its classes and to cite it.

    Attributes:
      train: the examples of the inner loss, possibly with corrupted labels.
      dev: the examples of the outer loss.
      validation: the examples that choose hyperparameters and checkpoints.
      test: the examples of the final number.
      num_classes: C; every label lies in [0, C).
      classes: the C class names.
      source: one sentence that says where the data came from.
    """

    train: Examples
    dev: Examples
    validation: Examples
    test: Examples
    num_classes: int
    classes: tuple[str, ...]
    source: str


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
    asked = ", ".join(f"{name} {sizes[name]}" for name in NAMES)
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


def make_examples(
    image: np.ndarray, true_label: np.ndarray, example_id: np.ndarray, *, label: np.ndarray | None = None
) -> Examples:
    """One split from its arrays: `label` defaults to `true_label`; `corrupted` is where they differ."""
    true_label = np.asarray(true_label, np.int32)
    label = true_label.copy() if label is None else np.asarray(label, np.int32)
    return {
        "image": image,
        "label": label,
        "true_label": true_label,
        "corrupted": label != true_label,
        "example_id": np.asarray(example_id, np.int32),
    }


def merge(train: Examples, dev: Examples) -> Examples:
    """Train and dev as one split, rows of train first: the data of a fair single-task baseline.

    Raises:
      ValueError: the two have different keys, or arrays that do not stack.
    """
    if set(train) != set(dev):
        raise ValueError(f"merge: train has the keys {sorted(train)}, dev has {sorted(dev)}; they must be the same.")
    for key in train:
        if train[key].shape[1:] != dev[key].shape[1:] or train[key].dtype != dev[key].dtype:
            raise ValueError(
                f"merge: {key!r} is {train[key].dtype} {train[key].shape} in train and {dev[key].dtype} "
                f"{dev[key].shape} in dev; all but the leading axis must be the same."
            )
    return {key: np.concatenate([train[key], dev[key]]) for key in train}


def generator(seed: int, where: str) -> np.random.Generator:
    """`np.random.default_rng(seed)`, refusing None: a split that cannot be made again cannot be compared."""
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(f"{where}: seed must be a non-negative integer, got {seed!r}.")
    return np.random.default_rng(int(seed))


def check_splits(splits: Splits) -> None:
    """Raises a ValueError that names split, cause and first example if the contract of this module is broken.

    To be called once before training: it reads every pixel of float images once, and otherwise only labels and ids.
    """
    if len(splits.classes) != splits.num_classes:
        raise ValueError(
            f"check_splits: num_classes is {splits.num_classes}, but {len(splits.classes)} class names came: "
            f"{splits.classes}."
        )
    for name in NAMES:
        _check_arrays(name, getattr(splits, name))
        _check_values(name, getattr(splits, name), splits.num_classes)
    first = splits.train["image"]
    for name in NAMES[1:]:
        image = getattr(splits, name)["image"]
        if image.shape[1:] != first.shape[1:] or image.dtype != first.dtype:
            raise ValueError(
                f"check_splits: images are {first.dtype} {first.shape[1:]} in train and {image.dtype} "
                f"{image.shape[1:]} in {name}; a model takes one shape and one dtype."
            )
    for position, name in enumerate(NAMES):
        for other in NAMES[position + 1 :]:
            shared = np.intersect1d(getattr(splits, name)["example_id"], getattr(splits, other)["example_id"])
            if shared.size:
                raise ValueError(
                    f"check_splits: {name} and {other} share {shared.size} examples, the first with example_id "
                    f"{shared[0]}; the four splits must be disjoint."
                )


def _check_arrays(name: str, examples: Examples) -> None:
    """Keys, ranks, dtypes and the common leading axis of one split."""
    missing = [key for key in KEYS if key not in examples]
    if missing:
        raise ValueError(f"check_splits: {name} lacks {missing}; it has {sorted(examples)}, wanted {list(KEYS)}.")
    image = examples["image"]
    if image.ndim != 4 or image.dtype not in (np.uint8, np.float32):
        raise ValueError(
            f"check_splits: {name}['image'] must be uint8 or float32 [n, height, width, channels], got {image.dtype} "
            f"{image.shape}."
        )
    if image.shape[0] == 0:
        raise ValueError(f"check_splits: {name} is empty; each of {', '.join(NAMES)} needs at least one example.")
    for key, dtype in _DTYPES.items():
        if examples[key].shape != image.shape[:1] or examples[key].dtype != dtype:
            raise ValueError(
                f"check_splits: {name}[{key!r}] must be {np.dtype(dtype)} {image.shape[:1]}, one entry per image, got "
                f"{examples[key].dtype} {examples[key].shape}."
            )


def _check_values(name: str, examples: Examples, num_classes: int) -> None:
    """Finite pixels, labels in range, honest corruption flags and unique ids of one split."""
    ids = examples["example_id"]
    if np.unique(ids).size != ids.size:
        raise ValueError(f"check_splits: {name} holds {ids.size - np.unique(ids).size} repeated example_id.")
    if examples["image"].dtype == np.float32:
        bad = ~np.isfinite(examples["image"]).all(axis=(1, 2, 3))
        _refuse(bad, ids, f"{name} has NaN or infinite pixels", "drop or repair these images")
    for key in ("label", "true_label"):
        outside = (examples[key] < 0) | (examples[key] >= num_classes)
        _refuse(outside, ids, f"{name}[{key!r}] is outside [0, {num_classes})", "num_classes or the labels are wrong")
    differs = examples["label"] != examples["true_label"]
    _refuse(differs != examples["corrupted"], ids, f"{name}['corrupted'] is not label != true_label", "recompute it")
    if name != "train":
        _refuse(differs, ids, f"{name} has corrupted labels", "only train may have them; corrupt after splitting")


def _refuse(bad: np.ndarray, ids: np.ndarray, what: str, advice: str) -> None:
    if bad.any():
        raise ValueError(
            f"check_splits: {what} in {np.count_nonzero(bad)} of {bad.size} examples, the first with example_id "
            f"{ids[np.argmax(bad)]}; {advice}."
        )


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
