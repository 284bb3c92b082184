"""Data as named pools of examples, with columns that describe their arrays.

A pool serves one purpose: `train` (the inner loss), `dev` (the outer loss), `validation` (choosing), `test` (the final
number). There may be several of each: labelled and unlabelled ones, one per domain. What an array is stands in its
`Column`, and every check, the checksum, what training sees and the shapes that a model needs are derived from there.
"""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

PURPOSES = ("train", "dev", "validation", "test")
ROLES = ("input", "target", "mask", "group", "id", "truth")
KINDS = ("real", "class", "binary", "ordinal", "integer")
_HIDDEN = ("id", "truth")
_CHUNK = 1 << 24  # bytes read at once


class Column(NamedTuple):
    """What an array [n, ...] of a pool is.

    Attributes:
      role: one of `ROLES`. A mask is True where its target is known. A truth is what the source says of a target; the
        truth of a truth is the flag of where that differs from the target.
      kind: one of `KINDS`; images of bytes are real.
      size: C where values lie in [0, C); required of class and ordinal.
      of: the target that a mask or truth belongs to, or the truth that a flag belongs to.
      names: of the C classes or levels, or of the columns of a [n, K] array of another kind.
      visible: whether training sees the array; None hides id and truth, and shows the others.
    """

    role: str
    kind: str
    size: int = 0
    of: str | None = None
    names: tuple[str, ...] = ()
    visible: bool | None = None


class Pool(NamedTuple):
    """Examples of one purpose.

    Attributes:
      purpose: one of `PURPOSES`.
      arrays: {column: array [n, ...]}, NumPy or anything with `shape`, `dtype` and indexing by a list of integers.
        A column may be absent, as targets are in an unlabelled pool.
      joins: for dev, the train pool that a baseline without an outer loss adds it to; None for the only one that has
        the primary target.
    """

    purpose: str
    arrays: dict[str, Any]
    joins: str | None = None


class Data(NamedTuple):
    """Pools, and what their arrays are.

    Attributes:
      pools: {name: `Pool`}.
      columns: {name: `Column`}.
      primary: the column of the primary target.
      source: one sentence that says where the data came from.
      tasks: names of the primary task and of the auxiliary ones, where the data have them.
    """

    pools: dict[str, Pool]
    columns: dict[str, Column]
    primary: str
    source: str
    tasks: tuple[str, ...] = ()


class PoolShape(NamedTuple):
    """A pool without its numbers: `arrays` are (column, shape of one example, dtype)."""

    name: str
    purpose: str
    num_examples: int
    arrays: tuple[tuple[str, tuple[int, ...], str], ...]


class Shapes(NamedTuple):
    """What a config's `build` may know of the data; hashable."""

    pools: tuple[PoolShape, ...]
    columns: tuple[tuple[str, Column], ...]
    primary: str
    tasks: tuple[str, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """Shape of one example's input, where there is one input."""
        names = [name for name, column in self.columns if column.role == "input"]
        if len(names) != 1:
            raise ValueError(f"Shapes.inputs: expected one input column, got {names}; read `pools` instead.")
        return next(shape for pool in self.pools for name, shape, _ in pool.arrays if name == names[0])

    @property
    def num_classes(self) -> int:
        """Classes of the primary target; 0 for a real one."""
        column = dict(self.columns)[self.primary]
        return 2 if column.kind == "binary" else column.size

    @property
    def num_train(self) -> int:
        """Examples of all train pools."""
        return sum(pool.num_examples for pool in self.pools if pool.purpose == "train")


def length(arrays: Mapping[str, Any]) -> int:
    """Number of examples of arrays with a common leading axis."""
    return next(iter(arrays.values())).shape[0]


def count(pool: Pool) -> int:
    """Number of examples of a pool."""
    return length(pool.arrays)


def is_visible(column: Column) -> bool:
    """Whether training sees a column."""
    return column.role not in _HIDDEN if column.visible is None else column.visible


def of_purpose(data: Data, purpose: str) -> dict[str, Pool]:
    """The pools that serve a purpose, by name."""
    if purpose not in PURPOSES:
        raise ValueError(f"of_purpose: expected one of {PURPOSES}, got {purpose!r}.")
    return {name: pool for name, pool in data.pools.items() if pool.purpose == purpose}


def visible(data: Data, pool: str) -> dict[str, Any]:
    """The arrays of a pool, given by name, that training may see."""
    return {name: array for name, array in data.pools[pool].arrays.items() if is_visible(data.columns[name])}


def joined(data: Data, dev: str) -> str:
    """The name of the train pool that a dev pool joins."""
    wanted, train = data.pools[dev].joins, of_purpose(data, "train")
    labelled = [name for name, pool in train.items() if data.primary in pool.arrays]
    if wanted is None and len(labelled) == 1:
        return labelled[0]
    if wanted not in train:
        raise ValueError(
            f"pools: expected joins of {dev!r} to name one of the train pools {list(train)}, got {wanted!r}."
        )
    return wanted


def with_dev(data: Data) -> Data:
    """The data of a fair single-task baseline: every dev pool also lies in the train pool it joins, after its rows.

    NumPy arrays are copied, others are read when asked for.

    Raises:
      ValueError: two pools with different columns, or arrays that do not stack.
    """
    pools = dict(data.pools)
    for name, dev in of_purpose(data, "dev").items():
        target = joined(data, name)
        train = pools[target]
        if set(train.arrays) != set(dev.arrays):
            raise ValueError(
                f"with_dev: {target!r} has the columns {sorted(train.arrays)}, {name!r} has {sorted(dev.arrays)}; "
                "they must be the same."
            )
        arrays = {key: _stack(key, array, dev.arrays[key]) for key, array in train.arrays.items()}
        pools[target] = train._replace(arrays=arrays)
    return data._replace(pools=pools)


def dev_only(data: Data) -> Data:
    """The data of a control that sees nothing but dev: every dev pool in the place of the train pool it joins.

    Raises:
      ValueError: a dev pool that lacks columns of that train pool.
    """
    pools = dict(data.pools)
    for name, dev in of_purpose(data, "dev").items():
        target = joined(data, name)
        if lacking := sorted(set(pools[target].arrays) - set(dev.arrays)):
            raise ValueError(f"dev_only: {name!r} lacks the columns {lacking} of {target!r}, whose place it takes.")
        pools[target] = pools[target]._replace(arrays={key: dev.arrays[key] for key in pools[target].arrays})
    return data._replace(pools=pools)


def checksum(data: Data) -> int:
    """CRC-32 over every array of every pool, with names, purposes, shapes and dtypes, whatever the order of the dicts.

    An array with an attribute `fingerprint` is represented by it; others are read in chunks.
    """
    found = 0
    for name, pool in sorted(data.pools.items()):
        for key, array in sorted(pool.arrays.items()):
            title = (name, pool.purpose, key, str(np.dtype(array.dtype)), tuple(array.shape))
            found = zlib.crc32(repr(title).encode(), found)
            if hasattr(array, "fingerprint"):
                found = zlib.crc32(repr(array.fingerprint).encode(), found)
                continue
            for _, part in chunks(array):
                found = zlib.crc32(np.ascontiguousarray(part), found)
    return found


def shapes(data: Data) -> Shapes:
    """The data without their numbers."""
    pools = tuple(
        PoolShape(
            name,
            pool.purpose,
            count(pool),
            tuple((key, tuple(a.shape[1:]), str(np.dtype(a.dtype))) for key, a in pool.arrays.items()),
        )
        for name, pool in data.pools.items()
    )
    return Shapes(pools, tuple(data.columns.items()), data.primary, data.tasks)


def chunks(array):
    """Yields (first row, rows as NumPy) over an array, about 16 MiB at a time."""
    row = int(np.prod(array.shape[1:], dtype=np.int64)) * np.dtype(array.dtype).itemsize
    step = max(1, _CHUNK // max(row, 1))
    for at in range(0, array.shape[0], step):
        stop = min(at + step, array.shape[0])
        yield at, rows(array, at, stop)


def rows(array, start: int, stop: int) -> np.ndarray:
    """Rows of an array, lazy or not, as NumPy."""
    return array[start:stop] if isinstance(array, np.ndarray) else np.asarray(array[list(range(start, stop))])


def at_rows(array, indices: np.ndarray) -> np.ndarray:
    """The rows at some indices of an array, lazy or not, as NumPy."""
    return array[indices] if isinstance(array, np.ndarray) else np.asarray(array[indices.tolist()])


class _Stacked:
    """The rows of two lazy arrays, one after the other."""

    def __init__(self, first, second):
        self.first, self.second = first, second
        self.shape, self.dtype = (first.shape[0] + second.shape[0], *first.shape[1:]), first.dtype

    def __getitem__(self, rows):
        rows = np.asarray(rows)
        rows = np.where(rows < 0, rows + self.shape[0], rows)
        out = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        early = rows < self.first.shape[0]
        if early.any():
            out[early] = self.first[rows[early].tolist()]
        if not early.all():
            out[~early] = self.second[(rows[~early] - self.first.shape[0]).tolist()]
        return out


def _stack(key: str, first, second):
    if tuple(first.shape[1:]) != tuple(second.shape[1:]) or first.dtype != second.dtype:
        raise ValueError(
            f"with_dev: {key!r} is {first.dtype} {first.shape} in train and {second.dtype} {second.shape} in dev; all "
            "but the leading axis must be the same."
        )
    if type(first) is np.ndarray and type(second) is np.ndarray:
        return np.concatenate([first, second])
    return _Stacked(first, second)
