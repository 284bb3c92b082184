"""Checks of arguments, each with its message: what was given, and what was expected.

    f(option=value): expected A.              values that are short enough to be shown
    f(option=): expected A, got B.            anything else, by its type, dtype or shape

A wrong type is a TypeError, a value out of range a ValueError. Tracers pass where an option may be one: a sweep traces
the numbers of its points, which are known only when the compiled program runs.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def is_traced(*values) -> bool:
    """Whether any of these values is a tracer, which has no truth value."""
    return any(isinstance(value, Tracer) for value in values)


def one_of(where: str, allowed: Sequence, **options) -> None:
    """Raises a ValueError unless each option is among the allowed values."""
    *first, last = map(repr, allowed)
    for name, value in options.items():
        if value not in allowed:
            raise ValueError(f"{where}({name}={value!r}): expected {', '.join(first)} or {last}.")


def number(where: str, *, least=None, above=None, most=None, below=None, known: bool = False, **options: Any) -> None:
    """Raises unless each option is one finite number within the bounds.

    Args:
      where: name of the public function, for the message.
      least: smallest value that is allowed.
      above: value that has to be exceeded.
      most: largest value that is allowed.
      below: value that must not be reached.
      known: whether a tracer is refused; otherwise it passes.
      **options: the values by their names.

    Raises:
      TypeError: not one number, or a tracer with `known`.
      ValueError: out of bounds, or not finite.
    """
    for name, value in options.items():
        if is_traced(value):
            if known:
                raise TypeError(f"{where}({name}=): expected a number known at trace time, got a traced value.")
            continue
        expected = _bounded(least, above, most, below)
        if not hasattr(value, "__float__") or jnp.shape(value) != ():
            raise TypeError(f"{where}({name}=): expected {expected}, got {_described(value)}.")
        fits = math.isfinite(value) and (least is None or value >= least) and (above is None or value > above)
        if not (fits and (most is None or value <= most) and (below is None or value < below)):
            raise ValueError(f"{where}({name}={value}): expected {expected}.")


def count(where: str, least: int, **options: int) -> None:
    """Raises unless each option is a whole number of at least `least`, known at trace time.

    Raises:
      TypeError: not a whole number, or a tracer.
      ValueError: too small.
    """
    for name, value in options.items():
        if is_traced(value) or isinstance(value, bool) or not hasattr(value, "__index__"):
            shown = f"{name}=" if is_traced(value) else f"{name}={value!r}"
            raise TypeError(f"{where}({shown}): expected a whole number >= {least}, known at trace time.")
        if value < least:
            raise ValueError(f"{where}({name}={value}): expected a whole number >= {least}.")


def sizes(where: str, **options: Sequence[int]) -> None:
    """Raises a ValueError unless each option is a sequence of whole numbers >= 1, which may be empty."""
    for name, values in options.items():
        if not all(isinstance(size, int) and size >= 1 for size in values):
            raise ValueError(f"{where}({name}={values!r}): expected whole numbers >= 1.")


def function(where: str, expected: str = "a function", **options) -> None:
    """Raises a TypeError unless each option can be called; `expected` says what it is a function of."""
    for name, value in options.items():
        if not callable(value):
            raise TypeError(f"{where}({name}=): expected {expected}, got {type(value).__name__}.")


def optimizer(where: str, **options) -> None:
    """Raises a TypeError unless each option is an optax transformation or `None`."""
    for name, value in options.items():
        if value is None or (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
            continue
        got = type(value).__name__
        if isinstance(value, int | float):
            got = f"{value}; for steps of that size write optax.sgd({value})"
        elif callable(value):
            called = getattr(value, "__name__", got)
            got = f"the function {called}; if it makes one, call it: {called}(...)"
        raise TypeError(f"{where}({name}=): expected an optax transformation, such as optax.adam(1e-2), got {got}.")


def key(where: str, key) -> None:
    """Raises a TypeError unless `key` is one typed PRNG key.

    Typed keys (`jax.random.key(0)`) carry their generator and cannot be mistaken for data; old-style keys
    (`jax.random.PRNGKey(0)`) are plain `uint32` arrays, which a batch axis or a checkpoint can silently reshape.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{where}(key=): expected a typed PRNG key, got {_described(key)}. Make one with jax.random.key(seed); "
            "an old-style uint32 key becomes one through jax.random.wrap_key_data(old_key)."
        )
    if jnp.ndim(key) != 0:
        raise TypeError(
            f"{where}(key=): expected one PRNG key, got an array of keys of shape {key.shape}. "
            "Pass a single key, or map over them with jax.vmap."
        )


def floating(what: str, tree):
    """`tree` with its leaves as arrays; raises unless there are some and all are real floating."""
    tree = jax.tree.map(jnp.asarray, tree)
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise ValueError(f"{what} has no leaves.")
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{what} has a leaf of dtype {leaf.dtype}; expected real floating arrays.")
    return tree


def like(what: str, tree, other, name: str) -> None:
    """Raises a ValueError unless `tree` has the structure and the shapes of `other`, which messages call `name`."""
    got, expected = jax.tree.structure(tree), jax.tree.structure(other)
    if got != expected:
        raise ValueError(f"{what} has the structure {got}; expected that of {name}, {expected}.")
    pairs = zip(jax.tree.leaves_with_path(other), jax.tree.leaves(tree), strict=True)
    for (path, there), leaf in pairs:
        if jnp.shape(leaf) != jnp.shape(there):
            raise ValueError(
                f"{what} has a leaf of shape {jnp.shape(leaf)} at {jax.tree_util.keystr(path)!r}; "
                f"{name} has {jnp.shape(there)} there."
            )


def _bounded(least, above, most, below) -> str:
    """`a finite number > 0`, or `a number in [0, 1)` where both ends are given."""
    low, high = (above if least is None else least), (below if most is None else most)
    if low is None and high is None:
        return "a finite number"
    if high is None:
        return f"a finite number {'>' if least is None else '>='} {low}"
    if low is None:
        return f"a finite number {'<' if most is None else '<='} {high}"
    return f"a number in {'(' if least is None else '['}{low}, {high}{')' if most is None else ']'}"


def _described(value) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return type(value).__name__ if dtype is None else f"an array of dtype {dtype}, shape {shape}"
