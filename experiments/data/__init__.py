"""Data sets as four disjoint NumPy splits: one loader module per data set, all returning `Splits`.

`digits.load(seed)` and `cifar10.load(seed, data_dir=...)` read a data set, cut it (`four_way_split`), corrupt the
training labels if asked (`symmetric_noise`) and check the result (`check_splits`). Heavy readers are imported inside
the loaders, so importing this package costs no more than NumPy.
"""

from experiments.data.noise import NoisyLabels, symmetric_noise, transition_matrix
from experiments.data.splits import (
    SplitIndices,
    Splits,
    check_splits,
    four_way_split,
    make_examples,
    merge,
    stratified_subset,
)

__all__ = [
    "NoisyLabels",
    "SplitIndices",
    "Splits",
    "check_splits",
    "four_way_split",
    "make_examples",
    "merge",
    "stratified_subset",
    "symmetric_noise",
    "transition_matrix",
]
