"""Methods of auxiliary learning, all with one interface (`auxjax.methods.base.Method`), by name.

    auxjax.methods.get("jtds", outer_optimizer=optax.adam(1e-2))

A method is a function of its options in a file of its own name. One line here makes it known.
"""

import difflib
import inspect

from auxjax.methods.adaloss import adaloss as adaloss
from auxjax.methods.arml import arml as arml
from auxjax.methods.auto_lambda import auto_lambda as auto_lambda
from auxjax.methods.auxilearn import auxilearn as auxilearn
from auxjax.methods.auxinash import auxinash as auxinash
from auxjax.methods.base import Context as Context
from auxjax.methods.base import Method as Method
from auxjax.methods.base import TaskLosses as TaskLosses
from auxjax.methods.base import TaskModel as TaskModel
from auxjax.methods.cosine_similarity import cosine_similarity as cosine_similarity
from auxjax.methods.dtg_auxl import dtg_auxl as dtg_auxl
from auxjax.methods.dwa import dwa as dwa
from auxjax.methods.equal import equal as equal
from auxjax.methods.fixed_weights import fixed_weights as fixed_weights
from auxjax.methods.generation import Generator as Generator
from auxjax.methods.gradnorm import gradnorm as gradnorm
from auxjax.methods.grid_search import grid_search as grid_search
from auxjax.methods.jtds import jtds as jtds
from auxjax.methods.maoal import maoal as maoal
from auxjax.methods.maxl import maxl as maxl
from auxjax.methods.n_jtds import n_jtds as n_jtds
from auxjax.methods.ol_aux import ol_aux as ol_aux
from auxjax.methods.policy import Policy as Policy
from auxjax.methods.random_labels import random_labels as random_labels
from auxjax.methods.random_weights import random_weights as random_weights
from auxjax.methods.rl_aux import rl_aux as rl_aux
from auxjax.methods.stl import stl as stl
from auxjax.methods.uncertainty import uncertainty as uncertainty
from auxjax.methods.wamal import wamal as wamal

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
      ValueError: an unknown name or option, or one that is needed and missing; the message lists what there is.
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
    missing = [option for option, about in known.items() if about.default is about.empty and option not in options]
    if missing:
        raise ValueError(f"{name} needs the option {missing[0]!r}; see help(auxjax.methods.{name}).")
    return method(**options)
