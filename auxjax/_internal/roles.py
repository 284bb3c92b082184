"""Solver, estimator or curvature: which of them a function is, by what it can be called with.

    solver      (matvec, b, *, init, key)
    estimator   (problem, params, meta, inner_batch, outer_batch, *, key)
    curvature   (level, batch)

One in the place of another, or the function that makes one, is refused where it is given and not deep inside of a step.
"""

import inspect


def solver(where: str, expected: str, **options) -> None:
    """Raises a TypeError unless each option can be called as a solver."""
    for name, value in options.items():
        if not _is_solver(value):
            raise TypeError(f"{where}({name}=): expected {expected}, got {_described(value)}.")


def estimator(where: str, expected: str, **options) -> None:
    """Raises a TypeError unless each option can be called as an estimator."""
    for name, value in options.items():
        if not _is_estimator(value):
            raise TypeError(f"{where}({name}=): expected {expected}, got {_described(value)}.")


def curvature(where: str, expected: str, **options) -> None:
    """Raises a TypeError unless each option can be called as a curvature and is not a solver."""
    for name, value in options.items():
        if not _can_be_called(value, 2) or _names(value, "init", "key"):
            raise TypeError(f"{where}({name}=): expected {expected}, got {_described(value)}.")


def _is_solver(value) -> bool:
    return _can_be_called(value, 2, "init", "key")


def _is_estimator(value) -> bool:
    return _can_be_called(value, 5, "key")


def _names(value, *keywords: str) -> bool:
    """Whether the function has these arguments by name; one that takes any keyword does not."""
    try:
        return set(keywords) <= set(inspect.signature(value).parameters)
    except (TypeError, ValueError):
        return False


def _can_be_called(value, count: int, *keywords: str) -> bool:
    if not callable(value):
        return False
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # some functions that are written in C have none
        return True
    try:
        signature.bind(*[None] * count, **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


def _described(value) -> str:
    if not callable(value):
        return type(value).__name__
    if _is_estimator(value):
        return "an estimator of hypergradients"
    if _is_solver(value):
        return "a solver; an estimator with it is implicit(solver)"
    name = getattr(value, "__name__", type(value).__name__)
    return f"the function {name}{inspect.signature(value)}; if it makes one, call it: {name}(...)"
