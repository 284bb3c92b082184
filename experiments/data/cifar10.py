"""CIFAR-10: 32 x 32 colour images in 10 classes (Krizhevsky, 2009, Learning multiple layers of features from tiny
images), from a prepared TensorFlow Datasets directory or from an npz archive.

The official test split is the test set; train, dev and validation are cut from the official training split. Two forms
are read, and neither imports TensorFlow:

    TFDS   a directory in the array_record format, as `tfds.builder("cifar10", file_format="array_record")` prepares it
           (preparing, once, needs tensorflow-cpu). Its PNG images decode at roughly 5,000 a second on one core.
    npz    arrays r_train, y_train, r_test, y_test, classes. r_* is uint8 [n, 3, 32, 32], the image as differences
           modulo 256: channels (green, red - green, blue - green), each differenced along both image axes, so that
           lossless compression is worth its while. Roughly 20,000 images a second.

`example_id` is the index in the official order where the TFDS records carry it ("train_00042"), else the row in the
archive; test ids continue after the last training id. Nothing is cached: the whole set fits in memory and on a device.
"""

import os
import pathlib
import re
from typing import NamedTuple

import numpy as np

from experiments.data.files import load_npz
from experiments.data.noise import symmetric_noise
from experiments.data.splits import Splits, check_splits, four_way_split, make_examples, stratified_subset

NUM_CLASSES = 10
NPZ_NAME = "cifar10_exact.npz"
NPZ_BYTES = 52_307_332
NPZ_SHA256 = "37970d1bf9dbb9740b3a3cdd3b6e0f05cb1cd2070728a0edf9d1f3ecefcbba45"
NPZ_KEYS = ("r_train", "y_train", "r_test", "y_test", "classes")

_WHERE = "cifar10.load"
_IMAGE_SHAPE = (32, 32, 3)
_CHUNK = 2_000  # records decoded at a time: bounds the memory of decoded images that are not yet in the array
_PREPARE = (
    "python -c \"import tensorflow_datasets as tfds; tfds.builder('cifar10', file_format='array_record')"
    '.download_and_prepare()"'
)
_HOW_TO_GET = (
    "Get the data in one of two ways: (1) once, with tensorflow-cpu installed, possibly in another environment, run  "
    f"{_PREPARE}  (add data_dir='DIR' to tfds.builder for another place than ~/tensorflow_datasets; training does not "
    f"need TensorFlow), then pass data_dir='DIR' or nothing; (2) pass data_dir='DIR' with the archive {NPZ_NAME} in "
    "it, or the archive's own path."
)


class _Source(NamedTuple):
    """The official splits in memory: images uint8 [n, 32, 32, 3], labels and ids int32 [n]."""

    train: tuple[np.ndarray, np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray, np.ndarray]
    classes: tuple[str, ...]
    text: str


def load(
    seed: int,
    *,
    data_dir: str | os.PathLike | None = None,
    noise: float = 0.0,
    noise_kind: str = "flip",
    train_size: int | float | None = None,
    dev_size: int | float = 200,
    validation_size: int | float = 2_000,
    test_size: int | float | None = None,
) -> Splits:
    """CIFAR-10 with the official test set; the rest cut in three by class, training labels corrupted if asked.

    Args:
      seed: non-negative integer that decides the cut and, in a stream of its own, the noise; never the test set.
      data_dir: a TFDS root, data set or version directory; a directory with the npz archive; or the archive itself.
        None: the environment variable TFDS_DATA_DIR, else ~/tensorflow_datasets.
      noise: rate of `symmetric_noise` on the labels of train.
      noise_kind: "flip" (share of wrong labels, exact) or "redraw".
      train_size: count, fraction of the official training split, or None for all that remains of it.
      dev_size, validation_size: counts or fractions of the official training split.
      test_size: None for the whole official test split; a count or fraction takes a class-stratified subset of it, the
        same one for every seed, for quick runs.

    Returns:
      `Splits` with uint8 images [n, 32, 32, 3].

    Raises:
      FileNotFoundError: nothing readable at `data_dir`; the message says how to get the data.
      ValueError: damaged or unsuitable files, or from `four_way_split` and `symmetric_noise`.
      ImportError: a TFDS directory, but no tensorflow_datasets.
    """
    kind, path = find(data_dir)
    source = _read_npz(path) if kind == "npz" else _read_tfds(path)
    image, label, ids = source.train
    indices = four_way_split(
        label,
        num_classes=NUM_CLASSES,
        train_size=train_size,
        dev_size=dev_size,
        validation_size=validation_size,
        test_size=0,
        seed=seed,
    )
    parts = {
        name: make_examples(image[rows], label[rows], ids[rows])
        for name, rows in indices._asdict().items()
        if name != "test"
    }
    noisy = symmetric_noise(parts["train"]["true_label"], noise, NUM_CLASSES, seed, kind=noise_kind)
    parts["train"] |= noisy._asdict()
    image, label, ids = source.test
    if test_size is not None:
        rows = stratified_subset(label, test_size, num_classes=NUM_CLASSES, seed=0)
        image, label, ids = image[rows], label[rows], ids[rows]
    parts["test"] = make_examples(image, label, ids)
    text = f"CIFAR-10 (Krizhevsky, 2009) from {source.text}; official test split, the rest split with seed {seed}"
    splits = Splits(**parts, num_classes=NUM_CLASSES, classes=source.classes, source=text)
    check_splits(splits)
    return splits


def find(data_dir: str | os.PathLike | None) -> tuple[str, pathlib.Path]:
    """What lies at `data_dir` (see `load`): ("npz", archive) or ("tfds", version directory)."""
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = pathlib.Path(data_dir).expanduser()
    if root.is_file():
        return "npz", root
    if not root.exists():
        raise FileNotFoundError(f"{_WHERE}: there is no {root}. {_HOW_TO_GET}")
    # Newest version last; names that are no version (an interrupted preparation is "incomplete.*") do not count.
    versions = [
        (tuple(int(part) for part in info.parent.name.split(".")), info.parent)
        for pattern in ("*/dataset_info.json", "cifar10/*/dataset_info.json")
        for info in root.glob(pattern)
        if re.fullmatch(r"\d+(\.\d+)*", info.parent.name)
    ]
    prepared = root if (root / "dataset_info.json").is_file() else max(versions)[1] if versions else None
    archive = root / NPZ_NAME
    if prepared and archive.is_file():
        raise ValueError(
            f"{_WHERE}: data_dir={root} holds both {prepared} and {archive}, which are different sets of images; pass "
            "one of these two paths as data_dir."
        )
    if archive.is_file():
        return "npz", archive
    if prepared:
        return "tfds", prepared
    raise FileNotFoundError(
        f"{_WHERE}: {root} has neither a prepared cifar10 (cifar10/VERSION/dataset_info.json) nor {NPZ_NAME}; it has "
        f"{sorted(entry.name for entry in root.iterdir())[:10]}. {_HOW_TO_GET}"
    )


def decode(residuals: np.ndarray) -> np.ndarray:
    """Images uint8 [n, 32, 32, 3] from the archive's differences uint8 [n, 3, 32, 32]; sums wrap around at 256."""
    planes = np.cumsum(np.cumsum(residuals, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
    green = planes[:, 0]
    return np.stack([planes[:, 1] + green, green, planes[:, 2] + green], axis=-1)


def _read_npz(path: pathlib.Path) -> _Source:
    known = {"num_bytes": NPZ_BYTES, "sha256": NPZ_SHA256} if path.name == NPZ_NAME else {}
    arrays = load_npz(path, NPZ_KEYS, where=_WHERE, **known)
    classes = tuple(str(name) for name in arrays["classes"])
    _check_classes(len(classes), path)
    official = {}
    first_id = 0
    for name in ("train", "test"):
        residuals, label = arrays[f"r_{name}"], arrays[f"y_{name}"]
        if residuals.dtype != np.uint8 or residuals.ndim != 4 or residuals.shape[1:] != (3, 32, 32):
            raise ValueError(
                f"{_WHERE}: r_{name} in {path} must be uint8 [n, 3, 32, 32], got {residuals.dtype} {residuals.shape}."
            )
        if label.shape != residuals.shape[:1] or not np.issubdtype(label.dtype, np.integer):
            raise ValueError(
                f"{_WHERE}: y_{name} in {path} must be integers {residuals.shape[:1]}, one per image, got "
                f"{label.dtype} {label.shape}."
            )
        ids = np.arange(first_id, first_id + label.size, dtype=np.int32)
        official[name] = (decode(residuals), label.astype(np.int32), ids)
        first_id += label.size
    return _Source(**official, classes=classes, text=f"the archive {path.name}")


def _read_tfds(path: pathlib.Path) -> _Source:
    try:
        import tensorflow_datasets as tfds  # here, so that other data sets and the archive do without
    except ImportError as error:
        raise ImportError(
            f"{_WHERE}: {path} is a TensorFlow Datasets directory; reading it needs the packages tensorflow-datasets, "
            "array_record, importlib_resources and pillow (not TensorFlow itself)."
        ) from error

    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:  # protobuf's and TFDS's own errors, which share no base class
        raise ValueError(_damaged_tfds(path, error)) from error
    features = builder.info.features
    missing = [key for key in ("image", "label") if key not in features]
    missing += [f"split {name!r}" for name in ("train", "test") if name not in builder.info.splits]
    if missing or tuple(features["image"].shape) != _IMAGE_SHAPE:
        raise ValueError(
            f"{_WHERE}: {path} is no CIFAR-10: it has the features {sorted(features)} and splits "
            f"{sorted(builder.info.splits)}; wanted image {_IMAGE_SHAPE}, label, and the splits train and test."
        )
    _check_classes(getattr(features["label"], "num_classes", 0), path)
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"{_WHERE}: {path} is prepared as {builder.info.file_format.value}, which cannot be read by index; prepare "
            f"it once more as array_record, in another data_dir. {_HOW_TO_GET}"
        )
    train = _read_records(builder, "train", path, first_id=0)
    test = _read_records(builder, "test", path, first_id=train[1].size)
    text = f"TensorFlow Datasets {builder.info.full_name}"
    return _Source(train, test, classes=tuple(features["label"].names), text=text)


def _read_records(
    builder, split: str, path: pathlib.Path, *, first_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decodes one official split; rows come in the order of the ids, so they do not depend on sharding."""
    try:
        records = builder.as_data_source(split=split)
        total = len(records)
        image = np.empty((total, *_IMAGE_SHAPE), np.uint8)
        label = np.empty(total, np.int32)
        names = []
        for start in range(0, total, _CHUNK):
            rows = range(start, min(start + _CHUNK, total))
            for row, record in zip(rows, records.__getitems__(list(rows)), strict=True):
                image[row], label[row] = record["image"], record["label"]
                names.append(record.get("id", b""))
    except ImportError:  # a decoder that is not installed is no damage
        raise
    except Exception as error:  # array_record raises RuntimeError, IndexError or OSError, image decoders their own
        raise ValueError(_damaged_tfds(path, error)) from error
    ids = _official_ids(names, split)
    order = np.argsort(ids)
    return image[order], label[order], (first_id + ids[order]).astype(np.int32)


def _official_ids(names: list[bytes], split: str) -> np.ndarray:
    """The numbers in "train_00042" if every record has one of its own below n, else the position in the files."""
    prefix = f"{split}_".encode()
    numbers = [int(name[len(prefix) :]) for name in names if name.startswith(prefix) and name[len(prefix) :].isdigit()]
    if sorted(numbers) == list(range(len(names))):
        return np.asarray(numbers)
    return np.arange(len(names))


def _check_classes(count: int, path: pathlib.Path) -> None:
    if count != NUM_CLASSES:
        raise ValueError(f"{_WHERE}: {path} has {count} classes, wanted {NUM_CLASSES}: this is not CIFAR-10.")


def _damaged_tfds(path: pathlib.Path, error: Exception) -> str:
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    reason = str(error).split("\n", 1)[0]
    return (
        f"{_WHERE}: the TensorFlow Datasets directory {path} ({size} bytes in all) is truncated or corrupt "
        f"({type(error).__name__}: {reason}); delete it and prepare it again:  {_PREPARE}"
    )
