"""Methods of auxiliary learning, all with one interface (`auxjax.methods.base.Method`), by name.

auxjax.methods.get("jtds", outer_optimizer=optax.adam(1e-2))
"""

import difflib
import inspect

from auxjax.methods.arml import arml
from auxjax.methods.base import Context, Method, TaskLosses, TaskModel
from auxjax.methods.equal import equal
from auxjax.methods.jtds import jtds
from auxjax.methods.stl import stl

__all__ = ["Context", "Method", "TaskLosses", "TaskModel", "arml", "equal", "get", "jtds", "names", "stl"]

_METHODS = {"stl": stl, "equal": equal, "arml": arml, "jtds": jtds}


def names() -> list[str]:
    """The names `get` knows."""
    return list(_METHODS)


def get(name: str, **options) -> Method:
    """Makes a method by name.

    Args:
      name: one of `names()`.
      **options: keyword arguments of the method of that name, e.g. `auxjax.methods.arml`.

    Raises:
      ValueError: an unknown name or option; the message lists the nearest ones.
    """
    if name not in _METHODS:
        near = difflib.get_close_matches(str(name), _METHODS, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"There is no method {name!r}.{hint} Known methods: {', '.join(_METHODS)}.")
    method = _METHODS[name]
    known = inspect.signature(method).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r}. Its options: {', '.join(known) or 'none'}.")
    return method(**options)
