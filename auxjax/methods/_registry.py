"""The methods by name, each with facts that documentation, tests and benchmarks would otherwise keep by hand.

A method's function registers itself where it is defined:

    @register("hypergradient", needs={"auxiliary", "outer_batch"})
    def my_method(*, rate: float = 0.1) -> Method: ...

and `auxjax/methods/__init__.py` imports it.
"""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from auxjax._internal import checks
from auxjax.interface import Method

FAMILIES = (
    "control",
    "fixed weights",
    "search",
    "statistics of losses",
    "gradients",
    "hypergradient",
    "generated tasks",
)
NEEDS = {
    "auxiliary": "at least one auxiliary task",
    "outer_batch": "data of its own for the outer level, `step(outer_batch=)`, or `make_step(outer_data='inner')`",
    "features": "`TaskLosses.features`",
    "feature_loss": "`TaskModel.feature_loss`",
    "label_losses": "`TaskLosses.label_losses` or `TaskModel.soft_label_loss`",
    "ids": "ids of the examples, by an option `ids`",
}


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """What is known of a method without making it.

    Attributes:
      name: the name `get` knows it by, that of its function.
      function: keyword options to a `Method`.
      family: one of `FAMILIES`.
      needs: words of `NEEDS`: what the method asks of model and data with its default options.
      reference: the citation in the docstring of its file ("Reference: ..."), on one line; "" without one.
    """

    name: str
    function: Callable[..., Method]
    family: str
    needs: frozenset[str]
    reference: str

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(inspect.signature(self.function).parameters)

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the options without a default."""
        parameters = inspect.signature(self.function).parameters
        return tuple(name for name, about in parameters.items() if about.default is about.empty)


_KNOWN: dict[str, MethodInfo] = {}
_Function = TypeVar("_Function", bound=Callable[..., Method])


def register(family: str, *, needs: Iterable[str] = ()) -> Callable[[_Function], _Function]:
    """A decorator that makes a method known by the name of its function, which it returns unchanged.

    Args:
      family: one of `FAMILIES`.
      needs: words of `NEEDS`.

    Raises:
      ValueError: an unknown family or need; a name that a method of another module has.
    """
    needs = frozenset(needs)
    checks.one_of("register", FAMILIES, family=family)
    if not needs <= set(NEEDS):
        raise ValueError(f"register(needs={sorted(needs)}): expected words among {', '.join(map(repr, NEEDS))}.")

    def keep(function: _Function) -> _Function:
        name, module = function.__name__, function.__module__
        if name in _KNOWN and _KNOWN[name].function.__module__ != module:  # the same module again is a reload
            raise ValueError(
                f"There is a method {name!r} already, in {_KNOWN[name].function.__module__}; expected another name for "
                f"the one in {module}."
            )
        found = re.search(
            r"^Reference: (.*?\.)$", function.__globals__["__doc__"] or "", flags=re.DOTALL | re.MULTILINE
        )
        _KNOWN[name] = MethodInfo(name, function, family, needs, " ".join(found[1].split()) if found else "")
        return function

    return keep


def names() -> list[str]:
    """The names `get` and `info` know, sorted."""
    return sorted(_KNOWN)


def info(name: str) -> MethodInfo:
    """The facts about a method.

    Raises:
      ValueError: an unknown name; the message lists the known ones.
    """
    if name not in _KNOWN:
        near = difflib.get_close_matches(str(name), names(), n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"There is no method {name!r}.{hint} Known methods: {', '.join(names())}.")
    return _KNOWN[name]


def get(name: str, **options) -> Method:
    """Makes a method by name.

    Args:
      name: one of `names()`.
      **options: keyword arguments of the method of that name, e.g. `auxjax.methods.arml`.

    Raises:
      ValueError: an unknown name or option, or one that is needed and missing; the message lists what there is.
    """
    about = info(name)
    unknown = sorted(set(options) - set(about.options))
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r}. Its options: {', '.join(about.options) or 'none'}.")
    missing = [option for option in about.required if option not in options]
    if missing:
        raise ValueError(f"{name} needs the option {missing[0]!r}; see help(auxjax.methods.{name}).")
    return about.function(**options)
