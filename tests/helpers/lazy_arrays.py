"""Arrays whose rows are made when they are asked for."""

import numpy as np


class Lazy:
    """An array that is read by a list of integers only, as a decoder of files would be."""

    def __init__(self, array):
        self._array = np.asarray(array)
        self.shape, self.dtype = self._array.shape, self._array.dtype

    def __getitem__(self, rows):
        assert isinstance(rows, list)
        return self._array[rows]
