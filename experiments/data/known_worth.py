"""Digits with auxiliary tasks whose worth is known: some help, some know the image alone, some are noise.

    helpful   a random half of the ten classes against the other: what the primary task needs as well
    image     the sign of a random direction of the pixels, after the mean of the class is taken out: can be learned,
              and says nothing of the class
    random    coin flips

Few images show their class, a pool of others shows the labels of the auxiliary tasks. A variant changes one thing, so
that each family of methods has a place where it can fail; in each the right weights win at least three times the
standard error of what they win. Everything is a function of the seed alone.
"""

from typing import NamedTuple

import numpy as np

from experiments.data.checking import check_data
from experiments.data.cutting import four_way_split, generator
from experiments.data.noise import symmetric_noise
from experiments.data.pools import Column, Data, Pool

NUM_CLASSES = 10
GROUPS = ("helpful", "image", "random")
_FOR_TRAINING = 1000  # labelled + dev + pool


class Variant(NamedTuple):
    """What is special about the tasks or the labels.

    Attributes:
      about: in words.
      tuning: whether options of methods may be chosen here; all others are for the comparison alone.
      sizes: number of helpful, image and random tasks.
      scale: of real targets of the useless tasks, with squared errors; 0 for yes-or-no ones.
      wrong: share of wrong labels of the helpful tasks.
      right_classes: classes in whose images the helpful tasks tell the truth; elsewhere they are coin flips.
      one_class: helpful tasks are one class against all others.
      pixel: image tasks look at one pixel alone, which is learned at once.
      rare: share of positives of the random tasks.
      copies: how often every useless task occurs, as many tasks with the same labels.
      labelled: images per class that show it in training.
      dev: and in the outer loss.
      noise: share of wrong classes among the labelled.
    """

    about: str
    tuning: bool = False
    sizes: tuple[int, int, int] = (4, 4, 4)
    scale: float = 0.0
    wrong: float = 0.0
    right_classes: int = NUM_CLASSES
    one_class: bool = False
    pixel: bool = False
    rare: float = 0.5
    copies: int = 1
    labelled: int = 5
    dev: int = 5
    noise: float = 0.0


VARIANTS = {
    "plain": Variant("four helpful, four image and four random tasks", tuning=True),
    "rare_random": Variant("random tasks with 2 % positives, whose gradients are small", tuning=True, rare=0.02),
    "easy_image": Variant("image tasks that are learned at once", tuning=True, pixel=True),
    "one_helpful": Variant("one helpful task among twelve", tuning=True, sizes=(1, 5, 6)),
    "noisy_helpful": Variant("helpful tasks with 20 % wrong labels", tuning=True, wrong=0.2),
    "dev_1": Variant("one dev label per class", tuning=True, dev=1),
    "dev_20": Variant("twenty dev labels per class", dev=20),
    "easy_helpful": Variant("helpful tasks of one class each, solved early", one_class=True),
    "large_scale": Variant("useless tasks are regressions at a scale of 3", scale=3.0),
    "repeated": Variant("every useless task occurs four times", sizes=(4, 2, 2), copies=4),
    "half_right": Variant("helpful tasks tell the truth in images of five classes", right_classes=5),
    "wrong_classes": Variant("40 % wrong classes among 20 labels per class", labelled=20, noise=0.4),
}


def load(seed: int, *, variant: str = "plain") -> Data:
    """The pools "labelled", "pool", "dev", "validation" and "test" of a variant.

    Args:
      seed: non-negative integer; decides the split, the tasks and all noise.
      variant: one of `VARIANTS`.

    Returns:
      `Data`, whose `tasks` are the primary one and the auxiliary ones, named by their group: "helpful_0".

    Raises:
      ValueError: an unknown variant.
    """
    chosen = variant_of(variant)
    image, label, source = _digits()
    dev_size, labelled_size = NUM_CLASSES * chosen.dev, NUM_CLASSES * chosen.labelled
    rows = four_way_split(
        label,
        num_classes=NUM_CLASSES,
        train_size=_FOR_TRAINING - dev_size,
        dev_size=dev_size,
        validation_size=200,
        test_size=label.size - _FOR_TRAINING - 200,
        seed=seed,
    )
    labelled, pool = labelled_and_pool(rows.train, label, labelled_size, seed)
    places = {"labelled": labelled, "pool": pool}
    places |= {name: getattr(rows, name) for name in ("dev", "validation", "test")}
    tasks = make_tasks(chosen, image, label, seed)
    return assemble(chosen, image, label, places, tasks, seed, f"{source}, variant {variant}, seed {seed}")


def variant_of(name: str) -> Variant:
    """The variant of a name.

    Raises:
      ValueError: there is none.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant={name!r}: expected one of {', '.join(VARIANTS)}.")
    return VARIANTS[name]


def labelled_and_pool(rows, label, labelled_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the rows of a training set in those that show their class, as many of each, and all others."""
    cut = four_way_split(
        label[rows],
        num_classes=NUM_CLASSES,
        train_size=None,
        dev_size=labelled_size,
        validation_size=0,
        test_size=0,
        seed=seed,
    )
    return rows[cut.dev], rows[cut.train]


def assemble(variant: Variant, image, label, places: dict, tasks, seed: int, source: str) -> Data:
    """The pools.

    Args:
      variant: of `VARIANTS`.
      image, label: of all examples.
      places: `{pool: rows}`.
      tasks: names and targets `[n, K]` of the auxiliary tasks, as `make_tasks` returns them.
      seed: of the wrong labels.
      source: where the images are from.
    """
    names, targets = tasks
    binary = variant.scale == 0
    kinds = {"binary": [name for name in names if binary or name.startswith("helpful")]}
    kinds["real"] = [name for name in names if name not in kinds["binary"]]
    kinds = {kind: tuple(of_kind) for kind, of_kind in kinds.items() if of_kind}
    pools = {}
    for name, at in places.items():
        arrays = {"image": image[at], "example_id": at.astype(np.int32)}
        if name == "pool":
            for kind, of_kind in kinds.items():
                columns = [names.index(task) for task in of_kind]
                arrays[kind] = targets[np.ix_(at, columns)].astype(np.int32 if kind == "binary" else np.float32)
        else:
            true = label[at].astype(np.int32)
            rate = variant.noise if name == "labelled" else 0.0
            noisy = symmetric_noise(true, rate, NUM_CLASSES, seed)
            arrays |= {"label": noisy.label, "true_label": true, "corrupted": noisy.corrupted}
        purpose = "train" if name in ("labelled", "pool") else name
        pools[name] = Pool(purpose, arrays, joins="labelled" if name == "dev" else None)
    columns = {
        "image": Column("input", "real"),
        "label": Column("target", "class", size=NUM_CLASSES),
        "true_label": Column("truth", "class", size=NUM_CLASSES, of="label"),
        "corrupted": Column("truth", "binary", of="true_label"),
        "example_id": Column("id", "integer"),
        **{kind: Column("target", kind, names=of_kind) for kind, of_kind in kinds.items()},
    }
    data = Data(pools, columns, "label", source, ("class", *names))
    check_data(data)
    return data


def make_tasks(variant: Variant, image, label, seed: int) -> tuple[list[str], np.ndarray]:
    """Names of the auxiliary tasks and their targets for all images, float64 `[n, K]`."""
    rng = np.random.default_rng([generator(seed, "known_worth").integers(2**32), 17])
    helpful, of_image, at_random = variant.sizes
    found = [_helpful(variant, number, label, rng) for number in range(helpful)]
    pixels = image.reshape(len(image), -1).astype(np.float64)
    means = np.stack([pixels[label == kind].mean(axis=0) for kind in range(NUM_CLASSES)])
    centred = pixels - means[label]
    for _ in range(of_image):
        found += [_of_image(variant, centred, pixels, rng)] * variant.copies
    for _ in range(at_random):
        found += [_at_random(variant, label.size, rng)] * variant.copies
    counts = (helpful, of_image * variant.copies, at_random * variant.copies)
    names = [f"{group}_{number}" for group, count in zip(GROUPS, counts, strict=True) for number in range(count)]
    return names, np.stack(found, axis=1)


def _helpful(variant: Variant, number: int, label, rng):
    if variant.one_class:
        truth = label == number
    else:
        truth = np.isin(label, rng.choice(NUM_CLASSES, NUM_CLASSES // 2, replace=False))
    flipped = rng.random(label.size) < variant.wrong
    guessed = (label >= variant.right_classes) & (rng.random(label.size) < 0.5)
    return truth ^ flipped ^ guessed


def _of_image(variant: Variant, centred, pixels, rng):
    if variant.pixel:
        lively = np.argsort(pixels.std(axis=0))[-20:]
        value = pixels[:, rng.choice(lively)]
        return value > np.median(value)
    value = centred @ rng.normal(size=centred.shape[1])
    return variant.scale * value / value.std() if variant.scale else value > 0


def _at_random(variant: Variant, count: int, rng):
    return variant.scale * rng.normal(size=count) if variant.scale else rng.random(count) < variant.rare


def _digits():
    from sklearn.datasets import load_digits  # here, because it takes a second that other data sets need not pay

    data = load_digits()
    image = (data.images / 16.0).astype(np.float32)[..., None]
    return image, data.target.astype(np.int32), "scikit-learn's load_digits"
