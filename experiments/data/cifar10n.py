"""CIFAR-10N: CIFAR-10's training images as people on a crowdsourcing platform labelled them, three people per image.

Wei, Zhu, Cheng, Liu, Niu, Liu, 2022, Learning with Noisy Labels Revisited: A Study Using Real-World Human Annotations.
Their errors are not symmetric: a cat is taken for a dog far more often than for a ship, and some images mislead all
three. What training sees (`KINDS`), with the share of wrong labels over all 50,000 images:

    aggregate                     majority of the three labels, one at random where all differ      9 %
    random1, random2, random3     the first, second or third person's label                   17 - 18 %
    worse                         a wrong label wherever one of the three is wrong                 40 %

Only train carries these labels; dev, validation and test have CIFAR-10's own, which also decide what counts as wrong.
Images and cut are those of `experiments.data.cifar10`. Two forms of labels are read:

    with TFDS images        the official CIFAR-10_human.npy, a pickled dict of clean_label, aggre_label, worse_label,
                            random_label1..3, [50000] each, or an npz of these arrays. Their order is that of
                            CIFAR-10's training files, which TFDS keeps in its ids ("train_00042") and not in the order
                            of its records; clean_label proves the match.
    with the npz archive    cifar10n_for_subset.npz, rows as in the archive; without clean_label a wrong order can only
                            be told from a share of wrong labels that nobody would reach.

Pickled files can run code when they are read. The one here is unpickled with a reader that knows NumPy arrays and
refuses everything else. Not for CIFAR-100N, nor for the workers' ids and times.
"""

import difflib
import os
import pathlib
import pickle

import numpy as np

from experiments.data import cifar10
from experiments.data.checking import check_data
from experiments.data.files import load_npz
from experiments.data.pools import Data, Pool

KINDS = {"aggregate": "aggre_label", "worse": "worse_label"} | {f"random{k}": f"random_label{k}" for k in (1, 2, 3)}
OFFICIAL_NAME = "CIFAR-10_human.npy"
SUBSET_NAME = "cifar10n_for_subset.npz"
SUBSET_BYTES = 105_205
SUBSET_SHA256 = "d091704f4c31c7002a297b9248c41ffd8d20550bc103174c49e1e2c3a56e35a4"

_WHERE = "cifar10n.load"
_MOST_WRONG = 0.6  # labels in a wrong order are 90 % wrong, people's at worst 40 %
_CONVERT = (
    "python -c \"import numpy as np; np.savez('CIFAR-10_human.npz', "
    "**np.load('CIFAR-10_human.npy', allow_pickle=True).item())\""
)
_HOW_TO_GET = (
    f"{OFFICIAL_NAME} is in the folder data of github.com/UCSC-REAL/cifar-10-100n; put it into the folder that "
    "tensorflow-datasets prepared cifar10 in."
)
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
# What a pickled array consists of, under the module names of NumPy 2 and of the versions before it.
_ARRAY_PARTS = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype} | {
    (f"numpy.{core}.multiarray", "_reconstruct"): _RECONSTRUCT for core in ("core", "_core")
}


def load(
    seed: int,
    *,
    data_dir: str | os.PathLike | None = None,
    kind: str = "worse",
    train_size: int | float | None = None,
    dev_size: int | float = 200,
    validation_size: int | float = 2_000,
    test_size: int | float | None = None,
) -> Data:
    """CIFAR-10 with people's labels in train; everything else is as in `cifar10.load`, to the last image.

    Args:
      seed: non-negative integer that decides the cut; the wrong labels belong to the images and depend on no seed.
      data_dir: as in `cifar10.load`. The labels lie beside the archive, or in the TFDS version directory or one of the
        two above it.
      kind: one of `KINDS`.
      train_size, dev_size, validation_size, test_size: as in `cifar10.load`.

    Returns:
      `Data` with uint8 images [n, 32, 32, 3].

    Raises:
      FileNotFoundError: no images, or no labels with them; the message says how to get them.
      ValueError: an unknown kind, damaged files, labels that belong to other images, or from `cifar10.load`.
      ImportError: a TFDS directory, but no tensorflow_datasets.
    """
    if kind not in tuple(KINDS):
        near = difflib.get_close_matches(str(kind), KINDS, n=2, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"{_WHERE}: kind must be one of {', '.join(KINDS)}, got {kind!r}.{hint}")
    form, path = cifar10.find(data_dir)
    file, arrays = _read_subset(path, kind) if form == "npz" else _read_official(path, kind)
    data = cifar10.load(
        seed,
        data_dir=path,
        train_size=train_size,
        dev_size=dev_size,
        validation_size=validation_size,
        test_size=test_size,
    )
    _check_match(data, arrays, kind, file)
    train = data.pools["train"].arrays
    label = arrays[KINDS[kind]][train["example_id"]]
    noisy = Pool("train", train | {"label": label, "corrupted": label != train["true_label"]})
    text = f"{data.source}; training labels by people (CIFAR-10N, {kind}; Wei et al., 2022) from {file.name}"
    data = data._replace(pools=data.pools | {"train": noisy}, source=text)
    check_data(data)
    return data


def _read_subset(archive: pathlib.Path, kind: str) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """The file beside the archive and its labels, one per training image of the archive."""
    file = archive.parent / SUBSET_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"{_WHERE}: there is no {file}. The images of {archive.name} are numbered by row, so their labels come "
            f"from a file of the same rows; {OFFICIAL_NAME} goes with the images of tensorflow-datasets."
        )
    arrays = load_npz(file, (KINDS[kind],), where=_WHERE, num_bytes=SUBSET_BYTES, sha256=SUBSET_SHA256)
    rows = load_npz(archive, ("y_train",), where=_WHERE)["y_train"].size
    arrays = _integers(arrays, file)
    if arrays[KINDS[kind]].size != rows:
        raise ValueError(
            f"{_WHERE}: {file} has {arrays[KINDS[kind]].size} labels and {archive} {rows} training images: they do not "
            "belong together."
        )
    return file, arrays


def _read_official(version: pathlib.Path, kind: str) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """The file near a TFDS version directory and its labels, in the order of CIFAR-10's training files."""
    pickled = pathlib.Path(OFFICIAL_NAME)
    folders = [version, *version.absolute().parents[:2]]
    found = [folder / name for folder in folders for name in (pickled.with_suffix(".npz"), pickled)]
    file = next((file for file in found if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{_WHERE}: no {pickled} (nor {pickled.with_suffix('.npz')}) in {folders[-1]} or below it down to "
            f"{version}. {_HOW_TO_GET}"
        )
    keys = ("clean_label", KINDS[kind])
    arrays = load_npz(file, keys, where=_WHERE) if file.suffix == ".npz" else _read_pickled(file, keys)
    return file, _integers(arrays, file)


class _ArraysOnly(pickle.Unpickler):
    """Builds NumPy arrays and Python's plain containers; a file that names anything else does not get it."""

    def find_class(self, module, name):
        """The only door from a pickle to code."""
        if (module, name) not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays are expected")
        return _ARRAY_PARTS[module, name]


def _read_pickled(file: pathlib.Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of a dict that `numpy.save` wrote, without ever running what a pickle says."""
    try:
        with file.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(stream)
            if shape != () or dtype != np.dtype(object):
                raise ValueError(f"it holds a {dtype} array of shape {shape}, expected one pickled dict")
            content = _ArraysOnly(stream).load().item()
        arrays = {key: np.asarray(content[key]) for key in keys if key in content}
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(
            f"{_WHERE}: {file} ({file.stat().st_size} bytes) cannot be read as a pickled dict of arrays "
            f"({type(error).__name__}: {error}). Fetch it again; if you trust it, convert it:  {_CONVERT}"
        ) from error
    if missing := [key for key in keys if key not in arrays]:
        raise ValueError(f"{_WHERE}: {file} lacks {missing}; it has {sorted(map(str, content))}.")
    return arrays


def _integers(arrays: dict[str, np.ndarray], file: pathlib.Path) -> dict[str, np.ndarray]:
    """The same as int32 after a look at types, shapes and values."""
    length = next(iter(arrays.values())).size
    for key, label in arrays.items():
        if label.shape != (length,) or not np.issubdtype(label.dtype, np.integer):
            raise ValueError(
                f"{_WHERE}: {key} in {file} must be integers ({length},), got {label.dtype} {label.shape}."
            )
        if length and not (label.min() >= 0 and label.max() < cifar10.NUM_CLASSES):
            raise ValueError(
                f"{_WHERE}: {key} in {file} must lie in [0, {cifar10.NUM_CLASSES}), got {label.min()} to {label.max()}."
            )
    return {key: label.astype(np.int32) for key, label in arrays.items()}


def _check_match(data: Data, arrays: dict[str, np.ndarray], kind: str, file: pathlib.Path) -> None:
    """Raises a ValueError if the labels belong to other images, or to these in another order."""
    parts = [data.pools[name].arrays for name in ("train", "dev", "validation")]
    ids = np.concatenate([part["example_id"] for part in parts])
    true = np.concatenate([part["true_label"] for part in parts])
    label = arrays[KINDS[kind]]
    if ids.max() >= label.size:
        raise ValueError(
            f"{_WHERE}: {file} has {label.size} labels, but there is a training image {ids.max()}: they do not belong "
            "together."
        )
    wrong = np.mean(label[ids] != true)
    differs = np.mean(arrays["clean_label"][ids] != true) if "clean_label" in arrays else 0.0
    if differs > 0 or wrong > _MOST_WRONG:
        what = f"clean_label differs from the images' labels in {differs:.1%}" if differs else f"{wrong:.1%} are wrong"
        order = f"Expected {OFFICIAL_NAME}, not CIFAR-10_human_ordered.npy, and images whose records have ids."
        raise ValueError(
            f"{_WHERE}: the labels in {file} are not those of these images, or in another order: {what}. "
            + (order if "clean_label" in arrays else "Fetch the labels and the archive again, from one place.")
        )
