"""Data sets as named pools with described columns: one loader module per data set, all returning `pools.Data`.

`digits.load(seed)` and `cifar10.load(seed, data_dir=...)` read a data set, cut it (`four_way_split`), corrupt the
training labels if asked (`symmetric_noise`) and check the result (`check_data`). Heavy readers are imported inside
the loaders, so importing this package costs no more than NumPy.
"""

from experiments.data.checking import check_data
from experiments.data.cutting import SplitIndices, four_way_split, group_split, stratified_subset
from experiments.data.examples import four_pools, make_examples
from experiments.data.noise import NoisyLabels, symmetric_noise, transition_matrix
from experiments.data.pools import Column, Data, Pool

__all__ = [
    "Column",
    "Data",
    "NoisyLabels",
    "Pool",
    "SplitIndices",
    "check_data",
    "four_pools",
    "four_way_split",
    "group_split",
    "make_examples",
    "stratified_subset",
    "symmetric_noise",
    "transition_matrix",
]
