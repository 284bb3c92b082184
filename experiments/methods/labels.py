"""How a method is named on the command line, in tables and in folders: NAME, options, and suffixes if expected.

    stl    stl+dev    equal:auxiliary_weight=0.3    arml:form=merged+total=2+dev    equal+dev+twice    jtds+refit

Options are those of the method's function in `auxjax.methods` that take a number, a word, true, false or none. One
method with the same options has one label, whatever their order. The suffixes come in this order:

    +dev             trains on the dev examples as well
    +dev_only        trains on the dev examples and on no others: what they are worth alone
    +twice           trains for twice the config's steps: the control that costs what a refit costs
    +refit, +keep    trains a second time, from scratch, on train and dev, with the weights that the first run has
                     learned, held fixed; or with the tasks and examples whose weights stand out, and no others
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping
from typing import NamedTuple

from auxjax import Method, learn_weights, make_rounds, methods

WITH_DEV, DEV_ONLY, TWICE, REFIT, KEEP = "+dev", "+dev_only", "+twice", "+refit", "+keep"
SUFFIXES = f"{WITH_DEV} or {DEV_ONLY}, {TWICE}, and {REFIT} or {KEEP}"
HELP = (  # of the commands
    f"{WITH_DEV} trains on the dev examples, too, {DEV_ONLY} on nothing else; {TWICE} trains for twice the steps; "
    f"{REFIT} trains a second time, from scratch, on train and dev, with the weights learned, held fixed, and {KEEP} "
    "with those tasks and examples alone whose weights stand out; in this order"
)
CROSS_FIT = "cross_fit"  # no method of `auxjax.methods`: `auxjax.learn_weights`, which learns weights and nothing else
_SUFFIXES = re.compile(r"(?:\+(?:dev|dev_only|twice|refit|keep))+$")
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "none"}
_FORM = "NAME:OPTION=VALUE, more options behind a +, such as equal:auxiliary_weight=0.3+reduction=mean"


class Label(NamedTuple):
    """A method as it is to be run.

    Attributes:
      name: its name in `auxjax.methods`.
      options: `((option, value), ...)`, sorted.
      with_dev: whether it trains on the dev examples, too.
      twice: whether it trains for twice the config's steps.
      then: "refit" or "keep" for a second run with what the first has learned, "" for none.
      dev_only: whether it trains on the dev examples in place of the train pools that they join.
    """

    name: str
    options: tuple[tuple[str, typing.Any], ...]
    with_dev: bool
    twice: bool = False
    then: str = ""
    dev_only: bool = False


def parse(text: str) -> Label:
    """The label in a string.

    Raises:
      ValueError: an unknown method or option (the message lists those there are), a value of another kind, suffixes in
        another order.
    """
    bare, suffixes = _apart(text)
    ordered = [suffix for suffix in (WITH_DEV, DEV_ONLY, TWICE, REFIT, KEEP) if suffix in suffixes]
    for one, other in ((REFIT, KEEP), (WITH_DEV, DEV_ONLY)):
        if one in ordered and other in ordered:
            ordered.remove(other)
    if suffixes != ordered:
        raise ValueError(
            f"method {text!r}: expected the suffixes {SUFFIXES} in this order, each at most once. Did you mean "
            f"{bare + ''.join(ordered)!r}?"
        )
    name, colon, rest = bare.partition(":")
    if name != CROSS_FIT and name not in methods.names():
        methods.get(name)
    options = {}
    for option, equals, value in _parts(rest) if colon else []:
        if not equals or not value or option in options:
            raise ValueError(f"method {text!r}: expected {_FORM}, each option once.")
        options[option] = _value(text, name, option, value)
    then = next((suffix[1:] for suffix in ordered if suffix in (REFIT, KEEP)), "")
    if name == CROSS_FIT and {WITH_DEV, DEV_ONLY, TWICE} & set(ordered):
        raise ValueError(
            f"method {text!r}: {CROSS_FIT} learns from train and dev in rounds of its own length; leave {ordered[0]} "
            "out."
        )
    if then and DEV_ONLY in ordered:
        raise ValueError(f"method {text!r}: a refit trains on train and dev; leave {DEV_ONLY} out.")
    given = (WITH_DEV in ordered, TWICE in ordered, then, DEV_ONLY in ordered)
    return Label(name, tuple(sorted(options.items())), *given)


def text_of(label: Label) -> str:
    """The label as a string; `parse` gives it back."""
    options = "+".join(f"{option}={_as_text(value)}" for option, value in label.options)
    suffixes = (
        WITH_DEV * label.with_dev
        + DEV_ONLY * label.dev_only
        + TWICE * label.twice
        + f"+{label.then}" * bool(label.then)
    )
    return label.name + f":{options}" * bool(options) + suffixes


def plain(label: Label) -> Label:
    """The method alone, without suffixes: what is compiled."""
    return Label(label.name, label.options, with_dev=False)


def learning(label: Label) -> Label | None:
    """The run whose weights a refit takes, `None` for a label that learns its own."""
    return label._replace(then="") if label.then else None


def settings_of(label: Label, settings):
    """The settings with which a run of the label trains."""
    return dataclasses.replace(settings, steps=2 * settings.steps) if label.twice else settings


def updates_of(label: Label, settings) -> int:
    """Inner updates of a label, those of both runs for a refit, before they are rounded up to whole outer updates."""
    return settings_of(label, settings).steps * (2 if label.then and label.name != CROSS_FIT else 1)


def folder_of(text: str) -> str:
    """A label as the name of a folder: letters, digits and `_.+-=` only."""
    return text.replace(":", "-")


def order_of(text: str) -> tuple:
    """Sort key of a label, known or not: single-task learning and equal weights first, numbers by their values."""
    name, _, rest = _apart(text)[0].partition(":")
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
    if "outer_updates" in own:  # asks for the method's own optimiser, made for as many
        options.pop("outer_optimizer", None)
    try:
        return methods.get(label.name, **options)
    except TypeError as error:  # a number where only none will do, and the like
        raise ValueError(f"method {text!r}: {error}") from error


def numbers_of(name: str) -> list[str]:
    """The options of a method that take any number: no counts, words or choices."""
    parameters = _parameters(name)
    return [option for option, about in parameters.items() if float in _kinds_of(about.annotation)]


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    """The parameters of a method's function; of `cross_fit`, those of its rounds and how many there are."""
    if name != CROSS_FIT:
        return inspect.signature(getattr(methods, name)).parameters
    rounds = inspect.signature(learn_weights).parameters["rounds"]
    return {"rounds": rounds, **inspect.signature(make_rounds).parameters}


def _kinds_of(annotation) -> list[type]:
    union = isinstance(annotation, types.UnionType)
    return [kind for kind in _KINDS if kind in (typing.get_args(annotation) if union else (annotation,))]


def _apart(text: str) -> tuple[str, list[str]]:
    """`("stl", ["+dev", "+twice"])` from "stl+dev+twice", whatever the order of the suffixes."""
    found = _SUFFIXES.search(text)
    return (text, []) if found is None else (text[: found.start()], re.findall(r"\+[a-z_]+", found[0]))


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
    parameters = _parameters(name)
    if option not in parameters and name == CROSS_FIT:
        raise ValueError(
            f"method {text!r}: {CROSS_FIT} has no option {option!r}. Its options: {', '.join(parameters)}."
        )
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
