"""Methods of auxiliary learning, all with one interface (`auxjax.methods.base.Method`), by name.

    auxjax.methods.get("jtds", outer_optimizer=optax.adam(1e-2))

A method is a function of its options in a file of its own name. One line here makes it known.
"""

import difflib
import inspect

from auxjax.methods.arml import arml as arml
from auxjax.methods.base import Context as Context
from auxjax.methods.base import Method as Method
from auxjax.methods.base import TaskLosses as TaskLosses
from auxjax.methods.base import TaskModel as TaskModel
from auxjax.methods.equal import equal as equal
from auxjax.methods.jtds import jtds as jtds
from auxjax.methods.stl import stl as stl

# What is a function here and has the name of its file is a method.
_METHODS = {
    name: value
    for name, value in sorted(globals().items())
    if inspect.isfunction(value) and value.__module__ == f"{__name__}.{name}"
}


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
