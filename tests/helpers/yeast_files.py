"""Small files in the layout of yeast, several labels per example, with random features."""

import numpy as np

NUM_TRAIN, NUM_TEST = 120, 40
CLASSES = tuple(f"Class{number}" for number in range(1, 15))


def official():
    """Random features, and labels that depend on them, of the two official parts."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(103, 14))
    parts = {}
    for name, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        features = (0.1 * rng.normal(size=(count, 103))).astype(np.float32)
        features[:, 5] = 0.25  # a constant feature: no deviation to divide by
        parts[name] = features, (features @ mixing > 0.3).astype(np.uint8)
    return parts


def arff(features, labels, names=CLASSES):
    """A file in Mulan's layout."""
    lines = ["@relation 'MultiLabelData'", ""]
    lines += [f"@attribute Att{number} numeric" for number in range(1, features.shape[1] + 1)]
    lines += [f"@attribute {name} {{0,1}}" for name in names]
    lines += ["", "@data"]
    lines += [
        ",".join([*map(repr, row.tolist()), *map(str, label)]) for row, label in zip(features, labels, strict=True)
    ]
    return "\n".join(lines) + "\n"


def write_arff(folder):
    """The two files of `official()`; returns their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (features, labels) in official().items():
        (folder / f"yeast-{name}.arff").write_text(arff(features, labels))
    return folder
