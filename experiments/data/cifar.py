"""What CIFAR-10 and CIFAR-100 share (Krizhevsky, 2009, Learning multiple layers of features from tiny images): finding
the files, reading them in one of two forms, and cutting the official training split.

    TFDS   a directory in the array_record format, as `tfds.builder("cifar10", file_format="array_record")` prepares it
           (preparing, once, needs tensorflow-cpu). Its PNG images decode at roughly 5,000 a second on one core.
    npz    arrays r_train, y_train, r_test, y_test and class names. r_* is uint8 [n, 3, 32, 32], the image as
           differences modulo 256: channels (green, red - green, blue - green), each differenced along both image axes,
           so that lossless compression is worth its while. Roughly 20,000 images a second.

Neither imports TensorFlow. Ids are the index in the official order where the TFDS records carry it ("train_00042"),
else the row in the archive; test ids continue after the last training id. Nothing is cached: the whole set fits in
memory and on a device.
"""

import os
import pathlib
import re
from typing import NamedTuple

import numpy as np

from experiments.data.cutting import four_way_split, stratified_subset
from experiments.data.files import load_npz

_IMAGE_SHAPE = (32, 32, 3)
_CHUNK = 2_000  # records decoded at a time: bounds the memory of decoded images that are not yet in the array


class DataSet(NamedTuple):
    """What tells one of the two sets from the other.

    Attributes:
      name: in TFDS, and of the module that loads it.
      title: for people.
      labels: `{label of a TFDS record: (array of its class names in the archive, number of classes)}`; the archive's
        y_* is "label".
      npz_name, npz_bytes, npz_sha256: name, size and digest of the archive.
      npz_keys: further arrays that the archive must have.
    """

    name: str
    title: str
    labels: dict[str, tuple[str, int]]
    npz_name: str
    npz_bytes: int
    npz_sha256: str
    npz_keys: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The loader, for messages."""
        return f"{self.name}.load"

    @property
    def prepare(self) -> str:
        """The command that prepares the TFDS form."""
        return (
            f"python -c \"import tensorflow_datasets as tfds; tfds.builder('{self.name}', file_format='array_record')"
            '.download_and_prepare()"'
        )

    @property
    def how_to_get(self) -> str:
        """Both ways to the data, for messages."""
        return (
            "Get the data in one of two ways: (1) once, with tensorflow-cpu installed, possibly in another "
            f"environment, run  {self.prepare}  (add data_dir='DIR' to tfds.builder for another place than "
            "~/tensorflow_datasets; training does not need TensorFlow), then pass data_dir='DIR' or nothing; (2) pass "
            f"data_dir='DIR' with the archive {self.npz_name} in it, or the archive's own path."
        )


class Part(NamedTuple):
    """Examples: images uint8 [n, 32, 32, 3], labels `{name: int32 [n]}` and ids int32 [n]."""

    image: np.ndarray
    labels: dict[str, np.ndarray]
    ids: np.ndarray

    def take(self, rows: np.ndarray) -> "Part":
        """The examples at `rows`."""
        return Part(self.image[rows], {key: label[rows] for key, label in self.labels.items()}, self.ids[rows])


class Source(NamedTuple):
    """A data set in memory.

    Attributes:
      train, test: the official splits, with the labels that the form has: an archive only "label".
      classes: `{label: class names}`, for all labels of the `DataSet`.
      further: the archive's `npz_keys`; empty for TFDS.
      path: what was read.
      text: the same, for the data set's source.
    """

    train: Part
    test: Part
    classes: dict[str, tuple[str, ...]]
    further: dict[str, np.ndarray]
    path: pathlib.Path
    text: str


def find(data_dir: str | os.PathLike | None, data_set: DataSet) -> tuple[str, pathlib.Path]:
    """What lies at `data_dir`: ("npz", archive) or ("tfds", version directory).

    Args:
      data_dir: a TFDS root, data set or version directory; a directory with the npz archive; or the archive itself.
        None: the environment variable TFDS_DATA_DIR, else ~/tensorflow_datasets.
      data_set: which data set.

    Raises:
      FileNotFoundError: nothing readable there; the message says how to get the data.
      ValueError: both forms lie there.
    """
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = pathlib.Path(data_dir).expanduser()
    if root.is_file():
        return "npz", root
    if not root.exists():
        raise FileNotFoundError(f"{data_set.where}: there is no {root}. {data_set.how_to_get}")
    # Newest version last; names that are not a version (an interrupted preparation is "incomplete.*") do not count.
    versions = [
        (tuple(int(part) for part in info.parent.name.split(".")), info.parent)
        for pattern in ("*/dataset_info.json", f"{data_set.name}/*/dataset_info.json")
        for info in root.glob(pattern)
        if re.fullmatch(r"\d+(\.\d+)*", info.parent.name)
    ]
    prepared = root if (root / "dataset_info.json").is_file() else max(versions)[1] if versions else None
    archive = root / data_set.npz_name
    if prepared and archive.is_file():
        raise ValueError(
            f"{data_set.where}: data_dir={root} holds both {prepared} and {archive}, which are different sets of "
            "images; pass one of these two paths as data_dir."
        )
    if archive.is_file():
        return "npz", archive
    if prepared:
        return "tfds", prepared
    raise FileNotFoundError(
        f"{data_set.where}: {root} has neither a prepared {data_set.name} ({data_set.name}/VERSION/dataset_info.json) "
        f"nor {data_set.npz_name}; it has {sorted(entry.name for entry in root.iterdir())[:10]}. {data_set.how_to_get}"
    )


def read(data_dir: str | os.PathLike | None, data_set: DataSet) -> Source:
    """The official splits, from whatever form lies at `data_dir`.

    Raises:
      FileNotFoundError: as `find`.
      ValueError: damaged or unsuitable files.
      ImportError: a TFDS directory, but no tensorflow_datasets.
    """
    kind, path = find(data_dir, data_set)
    return _read_npz(path, data_set) if kind == "npz" else _read_tfds(path, data_set)


def cut(
    source: Source,
    strata: dict[str, int],
    *,
    train_size: int | float | None,
    dev_size: int | float,
    validation_size: int | float,
    test_size: int | float | None,
    seed: int,
) -> dict[str, Part]:
    """Train, dev and validation from the official training split, and the official test split or a subset of it.

    Args:
      source: the official splits.
      strata: `{label: number of classes}`, finest first. A cut is stratified by the first label of which each of its
        parts can hold every class, else by the last one.
      train_size, dev_size, validation_size: as in `four_way_split`.
      test_size: None for the whole official test split; a count or fraction takes a stratified subset of it, the same
        one for every seed.
      seed: of the cut.

    Raises:
      ValueError: from `four_way_split`.
    """
    for key, num_classes in strata.items():
        indices = four_way_split(
            source.train.labels[key],
            num_classes=num_classes,
            train_size=train_size,
            dev_size=dev_size,
            validation_size=validation_size,
            test_size=0,
            seed=seed,
        )
        if min(rows.size for rows in indices if rows.size) >= num_classes:
            break
    parts = {name: source.train.take(rows) for name, rows in indices._asdict().items() if name != "test"}
    if test_size is None:
        return parts | {"test": source.test}
    for key, num_classes in strata.items():
        rows = stratified_subset(source.test.labels[key], test_size, num_classes=num_classes, seed=0)
        if rows.size >= num_classes:
            break
    return parts | {"test": source.test.take(rows)}


def decode(residuals: np.ndarray) -> np.ndarray:
    """Images uint8 [n, 32, 32, 3] from the archive's differences uint8 [n, 3, 32, 32]; sums wrap around at 256."""
    planes = np.cumsum(np.cumsum(residuals, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
    green = planes[:, 0]
    return np.stack([planes[:, 1] + green, green, planes[:, 2] + green], axis=-1)


def _read_npz(path: pathlib.Path, data_set: DataSet) -> Source:
    where = data_set.where
    known = {"num_bytes": data_set.npz_bytes, "sha256": data_set.npz_sha256} if path.name == data_set.npz_name else {}
    names = tuple(name for name, _ in data_set.labels.values())
    keys = ("r_train", "y_train", "r_test", "y_test", *names, *data_set.npz_keys)
    arrays = load_npz(path, keys, where=where, **known)
    classes = {key: tuple(str(name) for name in arrays[names]) for key, (names, _) in data_set.labels.items()}
    _check_classes({key: len(found) for key, found in classes.items()}, path, data_set)
    official = {}
    first_id = 0
    for name in ("train", "test"):
        residuals, label = arrays[f"r_{name}"], arrays[f"y_{name}"]
        if residuals.dtype != np.uint8 or residuals.ndim != 4 or residuals.shape[1:] != (3, 32, 32):
            raise ValueError(
                f"{where}: r_{name} in {path} must be uint8 [n, 3, 32, 32], got {residuals.dtype} {residuals.shape}."
            )
        if label.shape != residuals.shape[:1] or not np.issubdtype(label.dtype, np.integer):
            raise ValueError(
                f"{where}: y_{name} in {path} must be integers {residuals.shape[:1]}, one per image, got "
                f"{label.dtype} {label.shape}."
            )
        ids = np.arange(first_id, first_id + label.size, dtype=np.int32)
        official[name] = Part(decode(residuals), {"label": label.astype(np.int32)}, ids)
        first_id += label.size
    further = {key: arrays[key] for key in data_set.npz_keys}
    return Source(**official, classes=classes, further=further, path=path, text=f"the archive {path.name}")


def _read_tfds(path: pathlib.Path, data_set: DataSet) -> Source:
    where = data_set.where
    try:
        import tensorflow_datasets as tfds  # here, so that other data sets and the archive do without
    except ImportError as error:
        raise ImportError(
            f"{where}: {path} is a TensorFlow Datasets directory; reading it needs the packages tensorflow-datasets, "
            "array_record, importlib_resources and pillow (not TensorFlow itself)."
        ) from error

    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:  # protobuf's and TFDS's own errors, which share no base class
        raise ValueError(_damaged_tfds(path, data_set, error)) from error
    features = builder.info.features
    missing = [key for key in ("image", *data_set.labels) if key not in features]
    missing += [f"split {name!r}" for name in ("train", "test") if name not in builder.info.splits]
    if missing or tuple(features["image"].shape) != _IMAGE_SHAPE:
        raise ValueError(
            f"{where}: {path} is not {data_set.title}: it has the features {sorted(features)} and splits "
            f"{sorted(builder.info.splits)}; expected image {_IMAGE_SHAPE}, {', '.join(data_set.labels)}, and the "
            "splits train and test."
        )
    _check_classes({key: getattr(features[key], "num_classes", 0) for key in data_set.labels}, path, data_set)
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"{where}: {path} is prepared as {builder.info.file_format.value}, which cannot be read by index; prepare "
            f"it once more as array_record, in another data_dir. {data_set.how_to_get}"
        )
    train = _read_records(builder, "train", path, data_set, first_id=0)
    test = _read_records(builder, "test", path, data_set, first_id=train.ids.size)
    classes = {key: tuple(features[key].names) for key in data_set.labels}
    text = f"TensorFlow Datasets {builder.info.full_name}"
    return Source(train, test, classes=classes, further={}, path=path, text=text)


def _read_records(builder, split: str, path: pathlib.Path, data_set: DataSet, *, first_id: int) -> Part:
    """Decodes one official split; rows come in the order of the ids, so they do not depend on sharding."""
    try:
        records = builder.as_data_source(split=split)
        total = len(records)
        image = np.empty((total, *_IMAGE_SHAPE), np.uint8)
        labels = {key: np.empty(total, np.int32) for key in data_set.labels}
        names = []
        for start in range(0, total, _CHUNK):
            rows = range(start, min(start + _CHUNK, total))
            for row, record in zip(rows, records.__getitems__(list(rows)), strict=True):
                image[row] = record["image"]
                for key, label in labels.items():
                    label[row] = record[key]
                names.append(record.get("id", b""))
    except ImportError:  # a decoder that is not installed is not damage
        raise
    except Exception as error:  # array_record raises RuntimeError, IndexError or OSError, image decoders their own
        raise ValueError(_damaged_tfds(path, data_set, error)) from error
    ids = _official_ids(names, split)
    part = Part(image, labels, (first_id + ids).astype(np.int32))
    return part.take(np.argsort(ids))


def _official_ids(names: list[bytes], split: str) -> np.ndarray:
    """The numbers in "train_00042" if every record has one of its own below n, else the position in the files."""
    prefix = f"{split}_".encode()
    numbers = [int(name[len(prefix) :]) for name in names if name.startswith(prefix) and name[len(prefix) :].isdigit()]
    if sorted(numbers) == list(range(len(names))):
        return np.asarray(numbers)
    return np.arange(len(names))


def _check_classes(counts: dict[str, int], path: pathlib.Path, data_set: DataSet) -> None:
    for key, (what, wanted) in data_set.labels.items():
        if counts[key] != wanted:
            raise ValueError(
                f"{data_set.where}: {path} has {counts[key]} {what}, expected {wanted}: this is not {data_set.title}."
            )


def _damaged_tfds(path: pathlib.Path, data_set: DataSet, error: Exception) -> str:
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    reason = str(error).split("\n", 1)[0]
    return (
        f"{data_set.where}: the TensorFlow Datasets directory {path} ({size} bytes in all) is truncated or corrupt "
        f"({type(error).__name__}: {reason}); delete it and prepare it again:  {data_set.prepare}"
    )
