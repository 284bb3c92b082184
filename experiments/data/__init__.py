"""Data sets as four disjoint NumPy splits: one loader module per data set, all returning `Splits`.

`digits.load(seed)` and `cifar10.load(seed, data_dir=...)` read a data set, cut it (`four_way_split`), corrupt the
training labels if asked (`symmetric_noise`) and check the result (`check_splits`). Heavy readers are imported inside
the loaders, so importing this package costs no more than NumPy.
"""

from experiments.data.checking import check_data
from experiments.data.cutting import SplitIndices, four_way_split, group_split, stratified_subset
from experiments.data.noise import NoisyLabels, symmetric_noise, transition_matrix
from experiments.data.pools import Column, Data, Pool
from experiments.data.splits import (
    Splits,
    check_splits,
    make_examples,
    merge,
    to_data,
)

__all__ = [
    "Column",
    "Data",
    "NoisyLabels",
    "Pool",
    "SplitIndices",
    "Splits",
    "check_data",
    "check_splits",
    "four_way_split",
    "group_split",
    "make_examples",
    "merge",
    "stratified_subset",
    "symmetric_noise",
    "to_data",
    "transition_matrix",
]
