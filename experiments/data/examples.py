"""The arrays of the labelled data sets here: one input and one class per example, in four pools.

    image       [n, H, W, C]  uint8, or float32 without NaN
    features    [n, d]        the same, in place of `image`
    label       [n] int32     what training sees of the primary task
    true_label  [n] int32     what the source says
    corrupted   [n] bool      label != true_label, where labelled
    example_id  [n] int32     index in the source, unique over all four pools, the same for every seed

and, for several labels per example and labels that are missing,

    auxiliary   [n, K] int32  labels of the K auxiliary tasks, 0 or 1
    labelled    [n] bool      where training sees the primary label; elsewhere `label` is 0. Only train may lack labels

and, for data whose classes people have divided further,

    sub_label   [n] int32     the sub-class inside the class `true_label`, from 0 on in every class

Other data describe their own columns, see `data.pools`.
"""

import numpy as np

from experiments.data.checking import check_data
from experiments.data.pools import PURPOSES, Column, Data, Pool

Examples = dict[str, np.ndarray]


def make_examples(
    inputs: np.ndarray,
    true_label: np.ndarray,
    example_id: np.ndarray,
    *,
    label: np.ndarray | None = None,
    labelled: np.ndarray | None = None,
    key: str = "image",
) -> Examples:
    """The arrays of one pool: `label` defaults to `true_label`; `corrupted` is where they differ.

    Given `labelled`, the labels elsewhere become 0 and do not count as corrupted. `key` names the inputs.
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


def four_pools(
    parts: dict[str, Examples],
    *,
    num_classes: int,
    classes: tuple[str, ...],
    source: str,
    tasks: tuple[str, ...] = (),
    num_sub_classes: int = 0,
) -> Data:
    """Pools "train", "dev", "validation" and "test" with described columns, checked.

    Args:
      parts: `{pool: make_examples(...)}`.
      num_classes: C; every label lies in [0, C).
      classes: the C class names.
      source: one sentence that says where the data came from.
      tasks: names of the primary task and of the K auxiliary ones, for data with `auxiliary` labels.
      num_sub_classes: S, for data with `sub_label`, which lies in [0, S).

    Raises:
      ValueError: from `check_data`.
    """
    of_class = {"size": num_classes, "names": tuple(classes)}
    known = {
        "image": Column("input", "real"),
        "features": Column("input", "real"),
        "label": Column("target", "class", **of_class),
        "true_label": Column("truth", "class", of="label", **of_class),
        "corrupted": Column("truth", "binary", of="true_label"),
        "example_id": Column("id", "integer"),
        "auxiliary": Column("target", "binary", names=tasks[1:]),
        "labelled": Column("mask", "binary", of="label"),
        "sub_label": Column("target", "class", size=num_sub_classes),
    }
    pools = {name: Pool(name, parts[name]) for name in PURPOSES}
    columns = {key: column for key, column in known.items() if any(key in pool.arrays for pool in pools.values())}
    data = Data(pools, columns, "label", source, tasks)
    check_data(data)
    return data
