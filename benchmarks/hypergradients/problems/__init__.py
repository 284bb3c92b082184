"""The problems of the hypergradient benchmark.

    problem = get("hypercleaning", size="large", seed=0)      built once, then read from the cache
    problem.inner(problem.params, problem.meta, problem.inner_batch)

A problem is a set of NumPy arrays and the name of its losses (`Problem`, in `exchange.py`), so that a process without
JAX can read it: nothing here imports JAX until a problem is built or one of its losses is asked for. The losses are in
`losses.py`; the files that draw data, solve the lower level and compute the reference in float64 are imported when
they are needed.

Seeds: everything that is random about a problem is drawn from `numpy.random.default_rng(seed)`.
"""

import importlib
import pathlib

from benchmarks.hypergradients.problems.exchange import LeftOut as LeftOut
from benchmarks.hypergradients.problems.exchange import Problem as Problem
from benchmarks.hypergradients.problems.exchange import Sequence as Sequence
from benchmarks.hypergradients.problems.exchange import is_sequence as is_sequence
from benchmarks.hypergradients.problems.exchange import load as load
from benchmarks.hypergradients.problems.exchange import load_sequence as load_sequence
from benchmarks.hypergradients.problems.exchange import save as save

CACHE = pathlib.Path(".cache/benchmarks")

# name -> (module with `make(size, seed, data_dir)`, sizes)
_MAKERS = {
    "ridge": ("ridge", ("",)),
    "hypercleaning": ("hypercleaning", ("small", "large")),
    "logistic": ("logistic", ("",)),
    "quadratics": ("quadratics", ("",)),
    "data_cleaning": ("data_cleaning", ("0.5", "0.7", "0.9")),
    "convnet": ("convnet", ("",)),
    "sequence": ("sequence", ("short", "small", "large")),
    "sweep": ("sweep", ("8", "64")),
}


def names() -> tuple[str, ...]:
    """All problems, with their sizes: `"ridge"`, `"hypercleaning-small"`, ..."""
    return tuple(f"{name}-{size}" if size else name for name, (_, sizes) in _MAKERS.items() for size in sizes)


def get(name: str, size: str = "", seed: int = 0, *, data_dir=None, cache=CACHE):
    """A problem, from the cache or built.

    Args:
      name: `"ridge"`, ..., or with the size, `"hypercleaning-small"`.
      size: `"small"`, ...; may be left out where there is one size only.
      seed: of everything random.
      data_dir: folder with data sets that cannot be drawn or installed (`data_cleaning`).
      cache: folder for the built problems.

    Returns:
      A `Problem`; for the names `sequence` and `sweep` a `Sequence`.

    Raises:
      ValueError: there is no such problem or size.
      LeftOut: a data set or a package is not there; the message says what to do.
    """
    path = get_path(name, size, seed, data_dir=data_dir, cache=cache)
    return load_sequence(path) if is_sequence(path) else load(path)


def get_path(name: str, size: str = "", seed: int = 0, *, data_dir=None, cache=CACHE) -> pathlib.Path:
    """The file of a problem, built if it is not there: what `load` and `load_sequence` read. As `get`."""
    name, size = _split(name, size)
    path = pathlib.Path(cache) / f"{'-'.join(part for part in (name, size) if part)}-seed{seed}.npz"
    if not path.exists():
        module = importlib.import_module(f"benchmarks.hypergradients.problems.{_MAKERS[name][0]}")
        save(module.make(size, seed, data_dir), path)
    return path


def _split(name: str, size: str) -> tuple[str, str]:
    """Name and size, checked."""
    if name not in _MAKERS and not size:
        name, _, size = name.partition("-")
    if name not in _MAKERS:
        raise ValueError(f"there is no problem {name!r}; expected one of: {', '.join(names())}")
    sizes = _MAKERS[name][1]
    if size not in sizes:
        wanted = ", ".join(f"{name}-{s}" if s else name for s in sizes)
        raise ValueError(f"the problem {name!r} has no size {size!r}; expected one of: {wanted}")
    return name, size
