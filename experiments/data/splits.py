"""The contract between a data set and a run: four disjoint splits, each with one purpose.

    train       the inner loss; the only split whose labels may be corrupted
    dev         the outer loss (the hypergradient); clean labels
    validation  choosing hyperparameters and checkpoints; never differentiated
    test        looked at once, at the end

A split is a dict of NumPy arrays with a common leading axis n. Its input is an image or a vector of features:

    image       [n, H, W, C]  uint8, or float32 without NaN
    features    [n, d]        the same, in place of `image`
    label       [n] int32     what training sees of the primary task
    true_label  [n] int32     what the source says
    corrupted   [n] bool      label != true_label, where labelled
    example_id  [n] int32     index in the source, unique over all four splits, the same for every seed

and, for several labels per example and labels that are missing,

    auxiliary   [n, K] int32  labels of the K auxiliary tasks, 0 or 1
    labelled    [n] bool      where training sees the primary label; elsewhere `label` is 0. Only train may lack labels

and, for data whose classes people have divided further,

    sub_label   [n] int32     the sub-class inside the class `true_label`, from 0 on in every class

A single-task baseline that may not look at the outer loss gets `merge(train, dev)`, or the comparison would hand the
bilevel methods extra labelled examples. Not for data that arrives as a stream: everything here is in memory.
"""

from typing import NamedTuple

import numpy as np

from experiments.data.pools import Column, Data, Pool

Examples = dict[str, np.ndarray]

INPUTS = {"image": "[n, height, width, channels]", "features": "[n, d]"}
KEYS = ("label", "true_label", "corrupted", "example_id")
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
      tasks: names of the primary task and of the K auxiliary ones, for data with `auxiliary` labels.
      num_sub_classes: S, for data with `sub_label`, which lies in [0, S).
    """

    train: Examples
    dev: Examples
    validation: Examples
    test: Examples
    num_classes: int
    classes: tuple[str, ...]
    source: str
    tasks: tuple[str, ...] = ()
    num_sub_classes: int = 0


def make_examples(
    inputs: np.ndarray,
    true_label: np.ndarray,
    example_id: np.ndarray,
    *,
    label: np.ndarray | None = None,
    labelled: np.ndarray | None = None,
    key: str = "image",
) -> Examples:
    """One split from its arrays: `label` defaults to `true_label`; `corrupted` is where they differ.

    Given `labelled`, the labels elsewhere become 0 and do not count as corrupted. `key` says what the inputs are.
    """
    true_label = np.asarray(true_label, np.int32)
    label = true_label.copy() if label is None else np.asarray(label, np.int32)
    known = np.ones(label.shape, bool) if labelled is None else np.asarray(labelled, bool)
    return {
        key: inputs,
        "label": np.where(known, label, np.int32(0)),
        "true_label": true_label,
        "corrupted": (label != true_label) & known,
        "example_id": np.asarray(example_id, np.int32),
        **({} if labelled is None else {"labelled": known}),
    }


def input_of(examples: Examples) -> np.ndarray:
    """The input of a split, whatever kind it is."""
    return next(examples[key] for key in INPUTS if key in examples)


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


def to_data(splits: Splits) -> Data:
    """The same arrays as four pools with described columns, see `data.pools`."""
    classes = {"size": splits.num_classes, "names": splits.classes}
    known = {
        "image": Column("input", "real"),
        "features": Column("input", "real"),
        "label": Column("target", "class", **classes),
        "true_label": Column("truth", "class", of="label", **classes),
        "corrupted": Column("truth", "binary", of="true_label"),
        "example_id": Column("id", "integer"),
        "auxiliary": Column("target", "binary", names=splits.tasks[1:]),
        "labelled": Column("mask", "binary", of="label"),
        "sub_label": Column("target", "class", size=splits.num_sub_classes),
    }
    pools = {name: Pool(name, getattr(splits, name)) for name in NAMES}
    columns = {key: column for key, column in known.items() if any(key in pool.arrays for pool in pools.values())}
    return Data(pools, columns, "label", splits.source, splits.tasks)


def check_splits(splits: Splits) -> None:
    """Raises a ValueError that names split, cause and first example if the contract of this module is broken.

    To be called once before training: it reads every number of float inputs once, and otherwise only labels and ids.
    """
    if len(splits.classes) != splits.num_classes:
        raise ValueError(
            f"check_splits: num_classes is {splits.num_classes}, but {len(splits.classes)} class names came: "
            f"{splits.classes}."
        )
    for name in NAMES:
        _check_arrays(name, getattr(splits, name), splits)
        _check_values(name, getattr(splits, name), splits)
    first = splits.train
    for name in NAMES[1:]:
        here = getattr(splits, name)
        if set(here) != set(first):
            raise ValueError(f"check_splits: train has the arrays {sorted(first)} and {name} has {sorted(here)}.")
        came, wanted = input_of(here), input_of(first)
        if came.shape[1:] != wanted.shape[1:] or came.dtype != wanted.dtype:
            raise ValueError(
                f"check_splits: inputs are {wanted.dtype} {wanted.shape[1:]} in train and {came.dtype} "
                f"{came.shape[1:]} in {name}; a model takes one shape and one dtype."
            )
    for position, name in enumerate(NAMES):
        for other in NAMES[position + 1 :]:
            shared = np.intersect1d(getattr(splits, name)["example_id"], getattr(splits, other)["example_id"])
            if shared.size:
                raise ValueError(
                    f"check_splits: {name} and {other} share {shared.size} examples, the first with example_id "
                    f"{shared[0]}; the four splits must be disjoint."
                )


def _check_arrays(name: str, examples: Examples, splits: Splits) -> None:
    """Keys, ranks, dtypes and the common leading axis of one split."""
    kinds = [key for key in INPUTS if key in examples]
    missing = [key for key in KEYS if key not in examples] + (["image or features"] if len(kinds) != 1 else [])
    if missing:
        raise ValueError(
            f"check_splits: {name} lacks {missing}; it has {sorted(examples)}, expected {list(KEYS)} and one of "
            f"{list(INPUTS)}."
        )
    kind, inputs = kinds[0], examples[kinds[0]]
    if inputs.ndim != INPUTS[kind].count(",") + 1 or inputs.dtype not in (np.uint8, np.float32):
        raise ValueError(
            f"check_splits: {name}[{kind!r}] must be uint8 or float32 {INPUTS[kind]}, got {inputs.dtype} "
            f"{inputs.shape}."
        )
    if inputs.shape[0] == 0:
        raise ValueError(f"check_splits: {name} is empty; each of {', '.join(NAMES)} needs at least one example.")
    wanted = {key: (dtype, inputs.shape[:1]) for key, dtype in _DTYPES.items()}
    if "labelled" in examples:
        wanted["labelled"] = (np.bool_, inputs.shape[:1])
    if "auxiliary" in examples or splits.tasks:
        wanted["auxiliary"] = (np.int32, (inputs.shape[0], len(splits.tasks) - 1))
    if "sub_label" in examples or splits.num_sub_classes:
        wanted["sub_label"] = (np.int32, inputs.shape[:1])
    for key, (dtype, shape) in wanted.items():
        if key not in examples or examples[key].shape != shape or examples[key].dtype != dtype:
            got = f"{examples[key].dtype} {examples[key].shape}" if key in examples else "none"
            raise ValueError(
                f"check_splits: {name}[{key!r}] must be {np.dtype(dtype)} {shape}, one entry per example"
                f"{' and task' * (len(shape) - 1)}, got {got}."
            )


def _check_values(name: str, examples: Examples, splits: Splits) -> None:
    """Finite inputs, labels in range, honest flags and unique ids of one split."""
    ids, inputs = examples["example_id"], input_of(examples)
    if np.unique(ids).size != ids.size:
        raise ValueError(f"check_splits: {name} holds {ids.size - np.unique(ids).size} repeated example_id.")
    if inputs.dtype == np.float32:
        bad = ~np.isfinite(inputs.reshape(ids.size, -1)).all(axis=1)
        what = "pixels" if "image" in examples else "features"
        _refuse(bad, ids, f"{name} has NaN or infinite {what}", "drop or repair these examples")
    counts = {"label": "num_classes", "true_label": "num_classes"}
    if "sub_label" in examples:
        counts["sub_label"] = "num_sub_classes"
    for key, count in counts.items():
        total = getattr(splits, count)
        outside = (examples[key] < 0) | (examples[key] >= total)
        _refuse(outside, ids, f"{name}[{key!r}] is outside [0, {total})", f"{count} or the labels are wrong")
    if "auxiliary" in examples:
        outside = ((examples["auxiliary"] != 0) & (examples["auxiliary"] != 1)).any(axis=1)
        _refuse(outside, ids, f"{name}['auxiliary'] is neither 0 nor 1", "the labels are wrong")
    labelled = examples.get("labelled", np.ones(ids.shape, bool))
    shown = ~labelled & (examples["label"] != 0)
    _refuse(shown, ids, f"{name}['label'] is not 0 where labelled is False", "a hidden label must not be seen")
    differs = labelled & (examples["label"] != examples["true_label"])
    _refuse(differs != examples["corrupted"], ids, f"{name}['corrupted'] is not label != true_label", "recompute it")
    if name == "train":
        if not labelled.any():
            raise ValueError("check_splits: train has no labelled example; the primary task needs some.")
        return
    _refuse(differs, ids, f"{name} has corrupted labels", "only train may have them; corrupt after splitting")
    _refuse(~labelled, ids, f"{name} has unlabelled examples", "only train may have them")


def _refuse(bad: np.ndarray, ids: np.ndarray, what: str, advice: str) -> None:
    if bad.any():
        raise ValueError(
            f"check_splits: {what} in {np.count_nonzero(bad)} of {bad.size} examples, the first with example_id "
            f"{ids[np.argmax(bad)]}; {advice}."
        )
