"""Small files in the two published forms of CIFAR, with random images: an archive, and records written by TFDS."""

import io

import numpy as np
from PIL import Image


def random_official(num_train, num_test, num_classes):
    """Random images and labels of the two official splits, in official order: `{name: (image, label)}`."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, count in (("train", num_train), ("test", num_test)):
        image = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[name] = (image, rng.permutation(np.arange(count) % num_classes).astype(np.uint8))
    return arrays


def encode(image):
    """Images [n, 32, 32, 3] to differences [n, 3, 32, 32], modulo 256."""
    red, green, blue = np.moveaxis(image, -1, 0)
    planes = np.stack([green, red - green, blue - green], axis=1)
    rows = np.diff(planes, axis=2, prepend=np.zeros_like(planes[:, :, :1]))
    return np.diff(rows, axis=3, prepend=np.zeros_like(rows[..., :1]))


def write_archive(path, official, tables, changes):
    """The archive with arrays of `tables` beside the images; one that `changes` has as `None` is left out."""
    arrays = dict(tables)
    for name, (image, label) in official.items():
        arrays |= {f"r_{name}": encode(image), f"y_{name}": label}
    arrays |= changes
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def png(image):
    """The image [32, 32, 3] as an open PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    file.seek(0)
    return file


def write_records(root, class_name, official, classes, more):
    """A real array_record data set with CIFAR's features, written by TFDS without TensorFlow.

    Args:
      root: folder of all data sets.
      class_name: `Cifar10` or `Cifar100`; the data set's name is that in small letters.
      official: `{name: (image, label)}`.
      classes: names of the labels.
      more: features beside image and label, `{name: (TFDS feature, (key, index, label) -> value)}`.

    Returns:
      The folder of the version.
    """
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    features = {
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(names=classes),
        **{name: feature for name, (feature, _) in more.items()},
    }

    def info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def splits(self, dl_manager):
        return {name: self._generate_examples(name) for name in official}

    def examples(self, name):
        for index, (image, label) in enumerate(zip(*official[name], strict=True)):
            key = f"{name}_{index:05d}"
            added = {name: value(key, index, label) for name, (_, value) in more.items()}
            yield key, {"image": png(image), "label": int(label), **added}

    body = {
        "VERSION": tfds.core.Version("3.0.2"),
        "_info": info,
        "_split_generators": splits,
        "_generate_examples": examples,
    }
    with tfds.core.registered.skip_registration():
        builder = type(class_name, (tfds.core.GeneratorBasedBuilder,), body)
    builder(data_dir=root, file_format="array_record").download_and_prepare()
    return root / class_name.lower() / "3.0.2"


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_TRAIN, CIFAR10_TEST = 120, 40


def cifar10():
    """Random images and labels of the two official splits, in official order."""
    return random_official(CIFAR10_TRAIN, CIFAR10_TEST, 10)


def write_cifar10_archive(path, **changes):
    """The archive of `cifar10()`."""
    return write_archive(path, cifar10(), {"classes": np.array(CIFAR10_CLASSES)}, changes)


def write_cifar10_records(root, *, names=CIFAR10_CLASSES, with_ids=True):
    """The records of `cifar10()`."""
    import tensorflow_datasets as tfds

    more = {"id": (tfds.features.Text(), lambda key, index, label: key)} if with_ids else {}
    return write_records(root, "Cifar10", cifar10(), names, more)
