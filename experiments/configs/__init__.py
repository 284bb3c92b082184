"""Configs, one file per setting of a paper or a demonstration. The docstring gives command, time and expected result.

`experiments.contract` says what a config module has. One that lies elsewhere is named by its path,
`path/to/my_setting.py`: nothing is registered (docs/new_setting.md).
"""

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import pathlib
import pkgutil
import sys

from experiments.settings import RunSettings

PARTS = ("Settings", "load", "build")


def names() -> list[str]:
    """The configs there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str):
    """The module of a config: one of `names()`, or a file with the ending .py.

    Raises:
      ValueError: an unknown name (the message lists the nearest ones), or a file that is not a config.
    """
    if name.endswith(".py"):
        return _from_file(pathlib.Path(name).expanduser().resolve())
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"There is no config {name!r}.{hint} Known configs: {', '.join(names())}. "
            "A setting of your own is named by its path, with the ending .py."
        )
    return importlib.import_module(f"{__name__}.{name}")


def label_of(name: str) -> str:
    """What run.json calls a config: its name, or the name of its file, wherever that lies."""
    return pathlib.Path(name).name if name.endswith(".py") else name


@functools.cache
def _from_file(path: pathlib.Path):
    """The module in a file, which may import its neighbours, as a program may."""
    if not path.is_file():
        raise ValueError(f"There is no config file {path}.")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise ValueError(f"The config file {path} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    if missing := [part for part in PARTS if not hasattr(module, part)]:
        raise ValueError(f"The config file {path} lacks {', '.join(missing)}; a config has {', '.join(PARTS)}.")
    kind = module.Settings
    if not (isinstance(kind, type) and issubclass(kind, RunSettings) and "__dataclass_fields__" in vars(kind)):
        raise ValueError(f"{path}: expected Settings to be a frozen dataclass that extends RunSettings, got {kind!r}.")
    return module


def override(settings, assignments: list[str]):
    """Settings with some fields replaced, from strings `name=value` in the type of the field's default.

    Raises:
      ValueError: an unknown name (with the nearest ones), or a value of another type.
    """
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    changes = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment!r}: expected name=value, e.g. noise=0.2.")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=3, cutoff=0.4)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"--set {assignment!r}: no setting {name!r}.{hint} Settings: {', '.join(fields)}.")
        changes[name] = _parse(name, text, fields[name])
    return dataclasses.replace(settings, **changes)


_KINDS = {int: "whole number", float: "number", str: "word"}
_BOOLS = {"true": True, "false": False}


def _parse(name: str, text: str, default):
    if isinstance(default, bool):
        if text.lower() not in _BOOLS:
            raise ValueError(f"--set {name}={text}: expected true or false, such as {name}={as_text(default)}.")
        return _BOOLS[text.lower()]
    if not isinstance(default, tuple):
        kind, wanted, such_as = type(default), f"a {_KINDS[type(default)]}", default
    else:
        kind = type(default[0])
        wanted, such_as = f"{_KINDS[kind]}s separated by commas", as_text(default)
    try:
        return tuple(kind(part) for part in text.split(",") if part) if isinstance(default, tuple) else kind(text)
    except ValueError:
        raise ValueError(f"--set {name}={text}: expected {wanted}, such as {name}={such_as}.") from None


def as_text(value) -> str:
    """A setting's value as `--set` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
