"""How a method is named on the command line, in tables and in folders: NAME, options, and "+dev" if expected.

    stl        stl+dev        equal:auxiliary_weight=0.3        arml:form=merged+total=2+dev

Options are those of the method's function in `auxjax.methods` that take a number, a word, true, false or none. "+dev"
trains on the dev examples as well. One method with the same options has one label, whatever their order.
"""

import inspect
import re
import types
import typing
from collections.abc import Mapping
from typing import NamedTuple

from auxjax import Method, methods

WITH_DEV = "+dev"
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "none"}
_FORM = "NAME:OPTION=VALUE, more options behind a +, such as equal:auxiliary_weight=0.3+reduction=mean"


class Label(NamedTuple):
    """A method as it is to be run.

    Attributes:
      name: its name in `auxjax.methods`.
      options: `((option, value), ...)`, sorted.
      with_dev: whether it trains on the dev examples, too.
    """

    name: str
    options: tuple[tuple[str, typing.Any], ...]
    with_dev: bool


def parse(text: str) -> Label:
    """The label in a string.

    Raises:
      ValueError: an unknown method or option (the message lists those there are), a value of another kind.
    """
    bare, with_dev = text.removesuffix(WITH_DEV), text.endswith(WITH_DEV)
    name, colon, rest = bare.partition(":")
    if name not in methods.names():
        methods.get(name)
    options = {}
    for option, equals, value in _parts(rest) if colon else []:
        if not equals or not value or option in options:
            raise ValueError(f"method {text!r}: expected {_FORM}, each option once.")
        options[option] = _value(text, name, option, value)
    return Label(name, tuple(sorted(options.items())), with_dev)


def text_of(label: Label) -> str:
    """The label as a string; `parse` gives it back."""
    options = "+".join(f"{option}={_as_text(value)}" for option, value in label.options)
    return label.name + f":{options}" * bool(options) + WITH_DEV * label.with_dev


def folder_of(text: str) -> str:
    """A label as the name of a folder: letters, digits and `_.+-=` only."""
    return text.replace(":", "-")


def order_of(text: str) -> tuple:
    """Sort key of a label, known or not: single-task learning and equal weights first, numbers by their values."""
    name, _, rest = text.removesuffix(WITH_DEV).partition(":")
    options = [(option, _number(value)) for option, _, value in _parts(rest)]
    return {"stl": 0, "equal": 1}.get(name, 2), name, options, text


def make(text: str, defaults: Mapping[str, Mapping], **given) -> Method:
    """The method.

    Args:
      text: a label.
      defaults: `{method: options}`, what a config gives; the label's own options come first.
      **given: options that come before the label's, such as the traced numbers of a sweep.

    Raises:
      ValueError: options the method does not take.
    """
    label = parse(text)
    own = dict(label.options) | given
    options = {**defaults.get(label.name, {}), **own}
    if label.name == "arml" and options.get("form") == "merged":  # a config's numbers for sampling are of no use there
        for option in {"step_size", "temperature"} - own.keys():
            options.pop(option, None)
    try:
        return methods.get(label.name, **options)
    except TypeError as error:  # a number where only none will do, and the like
        raise ValueError(f"method {text!r}: {error}") from error


def numbers_of(name: str) -> list[str]:
    """The options of a method that take any number: no counts, words or choices."""
    parameters = inspect.signature(getattr(methods, name)).parameters
    return [option for option, about in parameters.items() if float in _kinds_of(about.annotation)]


def _kinds_of(annotation) -> list[type]:
    union = isinstance(annotation, types.UnionType)
    return [kind for kind in _KINDS if kind in (typing.get_args(annotation) if union else (annotation,))]


def _parts(options: str) -> list[tuple[str, str, str]]:
    """`[("a", "=", "1"), ("b", "=", "x")]` from "a=1+b=x"; a plus before a digit belongs to a number."""
    return [part.partition("=") for part in re.split(r"\+(?=[A-Za-z_])", options)]


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return 0.0


def _value(text: str, name: str, option: str, value: str):
    """The value in the type the method's signature has for it."""
    parameters = inspect.signature(getattr(methods, name)).parameters
    if option not in parameters:
        methods.get(name, **{option: value})  # raises, and lists the options
    kinds = _kinds_of(parameters[option].annotation)
    if kinds in ([], [type(None)]):
        raise ValueError(f"method {text!r}: {option} is not a number or word; a config has to set it.")
    for kind in kinds:
        try:
            if kind is type(None) or kind is bool:
                return {type(None): {"none": None}, bool: {"true": True, "false": False}}[kind][value.lower()]
            if kind is not str or re.fullmatch(r"[A-Za-z]\w*", value):
                return kind(value)
        except (KeyError, ValueError):
            continue
    raise ValueError(f"method {text!r}: {option} wants {' or '.join(_KINDS[kind] for kind in kinds)}, got {value!r}.")


def _as_text(value) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)
