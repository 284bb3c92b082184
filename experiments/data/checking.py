"""The checks of `pools.Data`, all derived from the descriptions of the columns.

Beyond shapes, dtypes and ranges: only train pools may have corrupted or hidden primary labels, hidden values are 0,
ids are unique in a pool, and no id or group occurs under two purposes.
"""

import difflib

import numpy as np

from experiments.data.pools import KINDS, PURPOSES, ROLES, Column, Data, Pool, chunks, count, joined, of_purpose

_COUNTED = ("class", "ordinal")
_PARENTS = {"mask": ("target",), "truth": ("target", "truth")}


def check_data(data: Data) -> None:
    """Raises a ValueError that names pool, column, cause and first example if the data break their description.

    To be called once before training, and before `with_dev`, which puts examples in two pools. It reads every number
    of float inputs once, in chunks, and otherwise only targets, masks, groups and ids.
    """
    for name, column in data.columns.items():
        _check_column(name, column, data)
    _known("primary", data.primary, [key for key, column in data.columns.items() if column.role == "target"])
    for name, pool in data.pools.items():
        _known(f"the purpose of pool {name!r}", pool.purpose, PURPOSES)
        _check_arrays(name, pool, data)
    for purpose in PURPOSES:
        if not of_purpose(data, purpose):
            raise ValueError(f"check_data: expected at least one pool for {purpose}, got {_listed(data)}.")
    for name in of_purpose(data, "dev"):
        joined(data, name)
    _check_same(data)
    for name, pool in data.pools.items():
        _check_values(name, pool, data)
    if not any(_known_rows(pool, data.primary, data).any() for pool in of_purpose(data, "train").values()):
        raise ValueError(
            f"check_data: no train pool has an example with {data.primary!r}; the primary task needs some."
        )
    _check_disjoint(data)


def _listed(data: Data) -> dict[str, str]:
    return {name: pool.purpose for name, pool in data.pools.items()}


def _known(what: str, word: str, words) -> None:
    if word not in words:
        near = difflib.get_close_matches(str(word), words, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"check_data: expected {what} to be one of {list(words)}, got {word!r}{hint}")


def _check_column(name: str, column: Column, data: Data) -> None:
    _known(f"the role of column {name!r}", column.role, ROLES)
    _known(f"the kind of column {name!r}", column.kind, KINDS)
    if column.role in _PARENTS:
        roles = _PARENTS[column.role]
        _known(f"'of' of column {name!r}", column.of, [key for key, c in data.columns.items() if c.role in roles])
        if column.of == name:
            raise ValueError(f"check_data: expected 'of' of column {name!r} to name another column, got itself.")
    elif column.of is not None:
        raise ValueError(
            f"check_data: expected no 'of' for column {name!r} of role {column.role!r}, got {column.of!r}."
        )
    if column.kind in _COUNTED and column.size < 1:
        raise ValueError(f"check_data: expected size >= 1 for column {name!r} of kind {column.kind!r}.")
    if column.kind in _COUNTED and column.names and len(column.names) != column.size:
        raise ValueError(
            f"check_data: expected {column.size} names for column {name!r} of size {column.size}, got "
            f"{len(column.names)}: {column.names}."
        )


def _dtypes(column: Column) -> tuple:
    if column.role == "mask":
        return (np.bool_,)
    if column.kind == "real":
        return (np.uint8, np.float32) if column.role == "input" else (np.float32,)
    if column.kind == "binary":
        return (np.bool_, np.int32)
    return (np.int32, np.int64) if column.role in ("id", "group") else (np.int32,)


def _check_arrays(name: str, pool: Pool, data: Data) -> None:
    """Known columns, one input at least, dtypes, ranks and the common leading axis of one pool."""
    for key, array in pool.arrays.items():
        _known(f"the array {key!r} of pool {name!r}", key, list(data.columns))
        column = data.columns[key]
        dtypes = [np.dtype(dtype).name for dtype in _dtypes(column)]
        if np.dtype(array.dtype).name not in dtypes or not array.shape:
            raise ValueError(
                f"check_data: expected {name}[{key!r}] to be {' or '.join(dtypes)} [n, ...], got {array.dtype} "
                f"{array.shape}."
            )
        if column.role in ("id", "group") and len(array.shape) != 1:
            raise ValueError(f"check_data: expected {name}[{key!r}] to be [n], got {array.shape}.")
        if column.names and column.kind not in _COUNTED and len(column.names) != (*array.shape, 0)[1]:
            raise ValueError(
                f"check_data: expected {name}[{key!r}] to be [n, {len(column.names)}], as it has names, got "
                f"{array.shape}."
            )
    if not any(data.columns[key].role == "input" for key in pool.arrays):
        raise ValueError(f"check_data: expected an input in pool {name!r}, got {sorted(pool.arrays)}.")
    if pool.purpose != "train" and data.primary not in pool.arrays:
        raise ValueError(f"check_data: expected {name!r} to have {data.primary!r}; only train pools may be unlabelled.")
    if len({array.shape[0] for array in pool.arrays.values()}) > 1:
        lengths = {key: array.shape[0] for key, array in pool.arrays.items()}
        raise ValueError(f"check_data: expected arrays of one length in pool {name!r}, got {lengths}.")
    if count(pool) == 0:
        raise ValueError(f"check_data: pool {name!r} is empty; each needs at least one example.")
    for key, array in pool.arrays.items():
        column = data.columns[key]
        if column.role in _PARENTS and column.of not in pool.arrays:
            raise ValueError(f"check_data: expected {column.of!r} beside {name}[{key!r}], got {sorted(pool.arrays)}.")
        if column.role in _PARENTS:
            whole = tuple(pool.arrays[column.of].shape)
            if tuple(array.shape) not in ((whole, whole[:1]) if column.role == "mask" else (whole,)):
                raise ValueError(
                    f"check_data: expected {name}[{key!r}] to have the shape {whole} of {column.of!r}, got "
                    f"{array.shape}."
                )


def _check_same(data: Data) -> None:
    """One shape and one dtype per column over all pools."""
    first = {}
    for name, pool in data.pools.items():
        for key, array in pool.arrays.items():
            here = (tuple(array.shape[1:]), np.dtype(array.dtype).name)
            where, wanted = first.setdefault(key, (name, here))
            if here != wanted:
                raise ValueError(
                    f"check_data: {key!r} is {wanted[1]} {wanted[0]} in {where} and {here[1]} {here[0]} in {name}; a "
                    "model takes one shape and one dtype."
                )


def _per_row(flags: np.ndarray) -> np.ndarray:
    return flags.reshape(flags.shape[0], -1).any(axis=1)


def _read(array) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else np.concatenate([part for _, part in chunks(array)])


def _known_rows(pool: Pool, key: str, data: Data) -> np.ndarray:
    """Where a target is known: its mask, with axes for the rest of the target; [n, ...] bool."""
    if key not in pool.arrays:
        return np.zeros(1, bool)
    shape = tuple(pool.arrays[key].shape)
    known = np.ones(shape, bool)
    for name, array in pool.arrays.items():
        if data.columns[name].role == "mask" and data.columns[name].of == key:
            mask = _read(array)
            known &= mask if mask.shape == shape else mask.reshape(-1, *[1] * (len(shape) - 1))
    return known


def _check_values(name: str, pool: Pool, data: Data) -> None:
    """Numbers in range, hidden values at 0, honest truths and unique ids of one pool."""
    ids = [(key, _read(a)) for key, a in pool.arrays.items() if data.columns[key].role == "id"]
    shown = ids[0] if ids else ("row", np.arange(count(pool)))
    for key, array in pool.arrays.items():
        column = data.columns[key]
        if column.role == "id":
            values = _read(array)
            repeated = values.size - np.unique(values).size
            if repeated:
                raise ValueError(f"check_data: {name} holds {repeated} repeated {key}.")
        elif column.role not in ("mask", "group"):
            bad, what = _outside(array, column)
            _refuse(bad, shown, f"{name}[{key!r}] {what}", "repair or drop these examples, or correct the column")
        if column.role == "target":
            hidden = ~_known_rows(pool, key, data) & (_read(array) != 0)
            _refuse(
                _per_row(hidden), shown, f"{name}[{key!r}] is not 0 where masked", "a hidden value must not be seen"
            )
        if column.role == "truth" and column.of is not None:
            _check_truth(name, key, pool, data, shown)
    if pool.purpose != "train":
        unknown = _per_row(~_known_rows(pool, data.primary, data))
        _refuse(unknown, shown, f"{name} lacks {data.primary!r}", "only train may have unlabelled examples")


def _outside(array, column: Column) -> tuple[np.ndarray, str]:
    """[n] bool, where values are not what the kind allows, and the words for that."""
    if column.kind == "real":
        if np.dtype(array.dtype).kind != "f":
            return np.zeros(array.shape[0], bool), ""
        return np.concatenate([_per_row(~np.isfinite(part)) for _, part in chunks(array)]), "has NaN or infinite values"
    low, high = (0, 2) if column.kind == "binary" else (0, column.size)
    if not high:
        return np.zeros(array.shape[0], bool), ""
    found = [_per_row((part < low) | (part >= high)) for _, part in chunks(array)]
    return np.concatenate(found), "is neither 0 nor 1" if column.kind == "binary" else f"is outside [0, {high})"


def _check_truth(name: str, key: str, pool: Pool, data: Data, shown) -> None:
    """A truth equals its target where that is known, in train except where flagged; a flag is where the two differ."""
    of = data.columns[key].of
    if data.columns[of].role == "truth":
        target = data.columns[of].of
        differs = _known_rows(pool, target, data) & (_read(pool.arrays[target]) != _read(pool.arrays[of]))
        wrong = _per_row(differs != _read(pool.arrays[key]).astype(bool))
        _refuse(wrong, shown, f"{name}[{key!r}] is not {target} != {of}", "recompute it")
        return
    if pool.purpose != "train":
        differs = _known_rows(pool, of, data) & (_read(pool.arrays[of]) != _read(pool.arrays[key]))
        _refuse(_per_row(differs), shown, f"{name} has corrupted {of!r}", "only train may; corrupt after splitting")


def _refuse(bad: np.ndarray, shown: tuple[str, np.ndarray], what: str, advice: str) -> None:
    if bad.any():
        raise ValueError(
            f"check_data: {what} in {np.count_nonzero(bad)} of {bad.size} examples, the first with {shown[0]} "
            f"{shown[1][np.argmax(bad)]}; {advice}."
        )


def _check_disjoint(data: Data) -> None:
    """No id and no group under two purposes."""
    for key, column in data.columns.items():
        if column.role not in ("id", "group"):
            continue
        here = [(name, pool) for name, pool in data.pools.items() if key in pool.arrays]
        for position, (name, pool) in enumerate(here):
            for other, second in here[position + 1 :]:
                if pool.purpose == second.purpose:
                    continue
                shared = np.intersect1d(_read(pool.arrays[key]), _read(second.arrays[key]))
                if shared.size:
                    raise ValueError(
                        f"check_data: {name} and {other} share {shared.size} "
                        f"{'examples' if column.role == 'id' else 'groups'}, the first with {key} {shared[0]}; pools "
                        "of different purposes must be disjoint."
                    )
