"""The grid of a sweep: numbers times seeds, and the name that each of its runs has elsewhere.

A number is an option of the method (`auxiliary_weight`) or a setting of the config (`outer_learning_rate`). Anything
else (words, counts, sizes) decides what is computed, and runs that differ in it cannot be one program.
"""

import dataclasses
import inspect
import itertools
import math
from typing import Any, NamedTuple

from auxjax import methods
from experiments import configs
from experiments.methods import defaults, labels
from experiments.settings import check_seed, check_settings
from experiments.training.single import check_method


class Over(NamedTuple):
    """A number that takes several values.

    Attributes:
      name: the option's or the setting's.
      values: in the order given.
      is_setting: a setting of the config, not an option of the method.
    """

    name: str
    values: tuple[float, ...]
    is_setting: bool


class Sweep(NamedTuple):
    """All runs: every point of the grid with every seed.

    Attributes:
      config: name of a config.
      settings: its `Settings`.
      method: label of a method, see `methods.labels`, without the options that are swept.
      over: what is swept; none at all for several seeds of one run.
      seeds: the seeds.
    """

    config: str
    settings: Any
    method: str
    over: tuple[Over, ...]
    seeds: tuple[int, ...]

    def points(self) -> list[dict[str, float]]:
        """The grid, the last number changing fastest."""
        names = [over.name for over in self.over]
        return [
            dict(zip(names, values, strict=True)) for values in itertools.product(*(over.values for over in self.over))
        ]

    def runs(self) -> list[tuple[dict[str, float], int]]:
        """`(point, seed)` of every run, in the order of the sweep's axis of runs."""
        return [(point, seed) for point in self.points() for seed in self.seeds]

    def split(self, point) -> tuple[dict, dict]:
        """The part of a point that is options of the method, and the part that is settings."""
        settings = {over.name for over in self.over if over.is_setting}
        parts = {True: {}, False: {}}
        for name, value in point.items():
            parts[name in settings][name] = value
        return parts[False], parts[True]

    def label_of(self, point) -> str:
        """The method of a run, as `experiments.run --method` takes it."""
        label = labels.parse(self.method)
        return labels.text_of(
            label._replace(options=tuple(sorted((dict(label.options) | self.split(point)[0]).items())))
        )

    def settings_of(self, point):
        """The settings of a run; with traced numbers, those of all runs."""
        return dataclasses.replace(self.settings, **self.split(point)[1])


def text_of(point: dict[str, float]) -> str:
    """A point in words, such as "auxiliary_weight=0.3"."""
    return ", ".join(f"{name}={value:g}" for name, value in point.items())


def make(config: str, settings, method: str, assignments: list[str], seeds: list[int]) -> Sweep:
    """The sweep of a command line.

    Args:
      config: name of a config.
      settings: its `Settings`.
      method: a label.
      assignments: `["auxiliary_weight=0.1,0.3", ...]`, one per number.
      seeds: the seeds.

    Raises:
      ValueError: no such number of the method or the config, one that no program can leave open, or no values.
    """
    label = labels.parse(method)
    if label != label._replace(twice=False, then=""):
        raise ValueError(
            f"--method {method}: a sweep is one program for all runs and all their steps, without {labels.TWICE}, "
            f"{labels.REFIT} and {labels.KEEP}. Leave them out, or train one by one, with experiments.compare."
        )
    names = [assignment.partition("=")[0] for assignment in assignments]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--over {name}=... is there twice. Give all its values in one, separated by commas.")
        if name in dict(label.options):
            raise ValueError(f"--over {name}=...: the method {method} has a value for it already. Leave one out.")
    over = tuple(_over(label.name, settings, assignment) for assignment in assignments)
    return Sweep(config, settings, labels.text_of(label), over, tuple(seeds))


def _over(method: str, settings, assignment: str) -> Over:
    name, equals, text = assignment.partition("=")
    options = labels.numbers_of(method)
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    numbers = [field for field, value in fields.items() if isinstance(value, float)]
    if not equals:
        raise ValueError(f"--over {assignment}: expected NAME=VALUE,VALUE,... such as auxiliary_weight=0.1,0.3,1.")
    if name not in options and name not in numbers:
        known = name in fields or name in inspect.signature(getattr(methods, method)).parameters
        why = "cannot be swept in one compiled program" if known else f"is neither of {method} nor of the config"
        raise ValueError(
            f"--over {name}: {name} {why}. Numbers of {method}: {', '.join(options) or 'none'}; of the config: "
            f"{', '.join(numbers)}. For anything else, train one by one: experiments.compare takes a method per value."
        )
    try:
        values = tuple(float(part) for part in text.split(",") if part.strip())
        if not values or len(set(values)) != len(values) or not all(map(math.isfinite, values)):
            raise ValueError
    except ValueError:
        raise ValueError(f"--over {assignment}: expected finite numbers separated by commas, each once.") from None
    return Over(name, values, name not in options)


def check(sweep: Sweep) -> None:
    """Raises a ValueError for settings or options that some run cannot have, before any data are read."""
    for point in sweep.points():
        settings = sweep.settings_of(point)
        check_settings(settings)
        if settings.input != "device":
            raise ValueError(f"input={settings.input}: the data of a sweep lie on the device. Leave it out.")
        check_method(sweep.config, settings, sweep.label_of(point))
    for seed in sweep.seeds:
        check_seed(seed)


def describe(sweep: Sweep) -> dict:
    """What makes two sweeps the same, as plain values in the fields that a run has, too."""
    over = {over.name: list(over.values) for over in sweep.over}
    settings = dataclasses.asdict(sweep.settings) | {"over": over, "seeds": list(sweep.seeds)}
    return {"config": configs.label_of(sweep.config), "method": sweep.method, "settings": settings}


def build(sweep: Sweep, point, shapes):
    """The experiment and the method of a run; "+dev" is handled when the data are loaded. Numbers may be traced."""
    config, first = configs.get(sweep.config), sweep.points()[0]
    label = labels.text_of(labels.plain(labels.parse(sweep.label_of(first))))
    settings, options = sweep.settings_of(point), sweep.split(point)[0]
    method = labels.make(label, defaults.options_of(config, settings, shapes), **options)
    return config.build(settings, shapes), method
