"""Yeast, a data set with several labels per example: 103 features of a gene, 14 functional classes of its protein
(Elisseeff and Weston, 2001, A kernel method for multi-labelled classification, NIPS), in the Mulan project's files.

One label is the primary task, with most of its training labels hidden; the others are auxiliary tasks with all of
theirs. The official test part is the test set; train, dev and validation are cut from the official training part by the
primary label. Two forms are read:

    ARFF   yeast-train.arff and yeast-test.arff: 103 numeric attributes, then 14 of {0, 1}, one line per example
    npz    arrays yeast_x_train, yeast_y_train, yeast_x_test, yeast_y_test: [n, 103] floating, [n, 14] of 0 and 1

Features are standardised by the mean and the deviation of train. Sparse ARFF is not read.
"""

import csv
import difflib
import io
import os
import pathlib
from typing import NamedTuple

import numpy as np

from experiments.data.cutting import four_way_split, generator, stratified_subset
from experiments.data.examples import four_pools, make_examples
from experiments.data.files import load_npz
from experiments.data.pools import Data

NUM_FEATURES, NUM_LABELS = 103, 14
NPZ_NAME = "multilabel_yeast_scene.npz"
NPZ_BYTES = 3_454_800
NPZ_SHA256 = "5789973e8857c377171058e90c205191a59675abb4115ea12f1e272140a0d005"
ARFF_NAMES = {"train": "yeast-train.arff", "test": "yeast-test.arff"}

_WHERE = "multilabel.load"
_HOW_TO_GET = (
    "Get the data in one of two ways and pass its folder as data_dir: (1) yeast.rar from the Mulan project's page of "
    f"multi-label data sets (mulan.sourceforge.net), unpacked: {' and '.join(ARFF_NAMES.values())}; (2) the archive "
    f"{NPZ_NAME}."
)


class _Source(NamedTuple):
    """The official parts in memory: features float32 [n, 103] and labels int32 [n, 14]; names of the labels."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    labels: tuple[str, ...]
    text: str


def load(
    seed: int,
    *,
    data_dir: str | os.PathLike | None,
    primary: str = "Class4",
    labelled: float = 0.05,
    dev_size: int | float = 60,
    validation_size: int | float = 300,
) -> Data:
    """Yeast with one primary label, shown for a share of the training examples, and 13 auxiliary ones.

    Args:
      seed: non-negative integer that decides the cut and, in a stream of its own, which labels are shown.
      data_dir: a folder with the two ARFF files or the archive (in it, or in a folder "yeast" in it), or the archive.
      primary: name of the primary label, or its number from 1.
      labelled: share of the train examples whose primary label is shown, in (0, 1]; both classes keep their shares.
      dev_size, validation_size: counts or fractions of the official training part.

    Returns:
      `Data` with float32 `features`; `example_id` is the row in the official order, the test part behind the other.

    Raises:
      FileNotFoundError: nothing readable at `data_dir`; the message says how to get the data.
      ValueError: damaged or unsuitable files, an unknown label, or from `four_way_split`.
    """
    if not 0.0 < labelled <= 1.0:
        raise ValueError(f"{_WHERE}: labelled must be a share in (0, 1], such as 0.05 for 5 %, got {labelled!r}.")
    kind, path = _find(data_dir)
    source = _read_npz(path) if kind == "npz" else _read_arff(path)
    place = _place_of(primary, source.labels)
    others = np.delete(np.arange(len(source.labels)), place)
    features, labels = source.train
    _check_both(labels[:, place], source.labels[place], "the official training part")
    _check_both(source.test[1][:, place], source.labels[place], "the official test part")
    indices = four_way_split(
        labels[:, place],
        num_classes=2,
        dev_size=dev_size,
        validation_size=validation_size,
        test_size=0,
        seed=seed,
    )
    mean, deviation = features[indices.train].mean(axis=0), features[indices.train].std(axis=0)
    deviation = np.where(deviation > 0, deviation, np.float32(1.0))

    def examples(part, rows, first_id, shown=None):
        scaled = (part[0][rows] - mean) / deviation
        known = np.ones(rows.size, bool) if shown is None else shown
        found = make_examples(scaled, part[1][rows, place], first_id + rows, labelled=known, key="features")
        return found | {"auxiliary": part[1][rows][:, others]}

    parts = {name: examples(source.train, getattr(indices, name), 0) for name in ("dev", "validation")}
    for name, part in parts.items():
        _check_both(part["label"], source.labels[place], name)
    shown = _shown(labels[indices.train, place], labelled, seed)
    _check_both(labels[indices.train[shown], place], source.labels[place], "what is labelled of train")
    parts["train"] = examples(source.train, indices.train, 0, shown)
    parts["test"] = examples(source.test, np.arange(len(source.test[0])), len(features))
    return four_pools(
        parts,
        num_classes=2,
        classes=("absent", "present"),
        source=f"yeast (Elisseeff and Weston, 2001) from {source.text}, {len(features)} + {len(source.test[0])} "
        f"examples; official test part, the rest split with seed {seed}",
        tasks=(source.labels[place], *(source.labels[other] for other in others)),
    )


def _shown(label: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Bool [n]: which examples keep their label."""
    shown = np.zeros(label.size, bool)
    # A child stream: which labels are shown does not depend on the order of the split.
    child = int(generator(seed, _WHERE).spawn(1)[0].integers(2**31))
    shown[stratified_subset(label, round(share * label.size), num_classes=2, seed=child)] = True
    return shown


def _place_of(primary: str, names: tuple[str, ...]) -> int:
    if primary in names:
        return names.index(primary)
    if primary.isdigit() and 1 <= int(primary) <= len(names):
        return int(primary) - 1
    near = difflib.get_close_matches(primary, names, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"{_WHERE}: primary={primary!r} is not a label.{hint} Labels: {', '.join(names)}, or 1 to {len(names)}."
    )


def _check_both(label: np.ndarray, name: str, where: str) -> None:
    if np.unique(label).size != 2:
        raise ValueError(
            f"{_WHERE}: {where} has {int(label.sum())} examples with {name} of {label.size}; both kinds are needed. "
            "Ask for larger parts, a larger labelled share, or another primary label."
        )


def _find(data_dir: str | os.PathLike | None) -> tuple[str, pathlib.Path]:
    """("npz", archive) or ("arff", folder)."""
    if data_dir is None:
        raise FileNotFoundError(f"{_WHERE}: no data_dir was given (--data-dir). {_HOW_TO_GET}")
    root = pathlib.Path(data_dir).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"{_WHERE}: there is no {root}. {_HOW_TO_GET}")
    if root.is_file():
        return ("arff", root.parent) if root.suffix.lower() == ".arff" else ("npz", root)
    found = []
    for folder in (root, root / "yeast"):
        if (folder / NPZ_NAME).is_file():
            found.append(("npz", folder / NPZ_NAME))
        if any((folder / name).is_file() for name in ARFF_NAMES.values()):
            found.append(("arff", folder))
    if len(found) > 1:
        raise ValueError(f"{_WHERE}: data_dir={root} holds both {found[0][1]} and {found[1][1]}; pass one of the two.")
    if not found:
        there = sorted(entry.name for entry in root.iterdir())[:10]
        raise FileNotFoundError(
            f"{_WHERE}: {root} has neither {' and '.join(ARFF_NAMES.values())} nor {NPZ_NAME}; it has {there}. "
            f"{_HOW_TO_GET}"
        )
    return found[0]


def _read_npz(path: pathlib.Path) -> _Source:
    known = {"num_bytes": NPZ_BYTES, "sha256": NPZ_SHA256} if path.name == NPZ_NAME else {}
    keys = [f"yeast_{kind}_{part}" for part in ARFF_NAMES for kind in "xy"]
    arrays = load_npz(path, keys, where=_WHERE, **known)
    parts = {
        part: _checked(arrays[f"yeast_x_{part}"], arrays[f"yeast_y_{part}"], f"yeast_*_{part} in {path}")
        for part in ARFF_NAMES
    }
    names = tuple(f"Class{number}" for number in range(1, NUM_LABELS + 1))  # as the ARFF files have them
    return _Source(**parts, labels=names, text=f"the archive {path.name}")


def _read_arff(folder: pathlib.Path) -> _Source:
    parts, names = {}, {}
    for part, name in ARFF_NAMES.items():
        features, labels, names[part] = _parse_arff(folder / name)
        parts[part] = _checked(features, labels, str(folder / name))
    if names["train"] != names["test"]:
        raise ValueError(
            f"{_WHERE}: {folder} has the labels {names['train']} in one file, {names['test']} in the other."
        )
    return _Source(**parts, labels=names["train"], text=" and ".join(ARFF_NAMES.values()))


def _parse_arff(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Features, labels and the labels' names of one file."""
    from scipy.io import arff  # here, so that other data sets need not pay for it

    if not path.is_file():
        raise FileNotFoundError(f"{_WHERE}: there is no {path}; both official parts are needed. {_HOW_TO_GET}")
    try:
        text = path.read_text()
        sparse = text.lower().partition("@data")[2].lstrip().startswith("{")
        table, meta = (None, None) if sparse else arff.loadarff(io.StringIO(text))
    except (arff.ArffError, csv.Error, ValueError, IndexError, NotImplementedError, StopIteration) as error:
        # A short line is an IndexError there, a file that ends in its header a StopIteration.
        raise ValueError(
            f"{_WHERE}: {path} ({path.stat().st_size} bytes) is truncated or corrupt, or no ARFF file "
            f"({type(error).__name__}: {error}); fetch it again. {_HOW_TO_GET}"
        ) from error
    if sparse:
        raise ValueError(f"{_WHERE}: {path} is a sparse ARFF file; save it as a dense one, a value per attribute.")
    attributes = meta.names()
    kinds = meta.types()
    if kinds != ["numeric"] * NUM_FEATURES + ["nominal"] * NUM_LABELS or table.size == 0:
        raise ValueError(
            f"{_WHERE}: {path} has {table.size} examples, {kinds.count('numeric')} numeric and "
            f"{kinds.count('nominal')} nominal attributes; yeast has {NUM_FEATURES} numeric ones and then {NUM_LABELS} "
            "of {0, 1}."
        )
    columns = [np.atleast_1d(table[name]) for name in attributes]
    features = np.stack(columns[:NUM_FEATURES], axis=1)
    labels = np.stack([np.where(np.isin(c, (b"0", b"1")), c == b"1", -1) for c in columns[NUM_FEATURES:]], axis=1)
    return features, labels, tuple(attributes[NUM_FEATURES:])


def _checked(features: np.ndarray, labels: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Features as float32 and labels as int32.

    Raises:
      ValueError: other shapes or dtypes than yeast's, or labels that are not 0 or 1.
    """
    if features.ndim != 2 or features.shape[1] != NUM_FEATURES or not np.issubdtype(features.dtype, np.floating):
        raise ValueError(
            f"{_WHERE}: {where}: features must be floating [n, {NUM_FEATURES}], got {features.dtype} {features.shape}."
        )
    if labels.shape != (len(features), NUM_LABELS) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{_WHERE}: {where}: labels must be integers {(len(features), NUM_LABELS)}, got {labels.dtype} "
            f"{labels.shape}."
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"{_WHERE}: {where}: a label is neither 0 nor 1.")
    return features.astype(np.float32), labels.astype(np.int32)
