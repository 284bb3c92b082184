"""The settings that all configs share, and the bounds that settings carry.

    class Settings(RunSettings):
        hidden: int = setting(128, least=1)
        noise: float = setting(0.4, most=1.0)
        network: str = setting("convnet", choices=("convnet", "vgg16"))

A plain default is a number of at least 0, a word or a bool.
"""

import dataclasses
import math
from typing import Any

DEV_MODES = ("held_out", "train")
INPUTS = ("device", "stream")
_LARGEST = 2**31  # counts become int32 on the device


def setting(default, *, least: float = 0, most: float = math.inf, choices: tuple = ()) -> Any:
    """A field of `Settings` with bounds, which hold for every entry of a tuple.

    Args:
      default: its default, a plain value or a tuple of such; it fixes the type.
      least, most: bounds of numbers, both allowed.
      choices: the words allowed; all if empty.
    """
    return dataclasses.field(default=default, metadata={"least": least, "most": most, "choices": choices})


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The settings of any run: sizes in examples, `steps` and everything with "every" in inner updates.

    Attributes:
      steps: inner updates, rounded up to whole outer updates.
      inner_steps: inner updates per outer update.
      outer_steps: outer updates after every `inner_steps` inner ones.
      batch_size: examples of an inner batch.
      outer_batch_size: examples of an outer batch.
      learning_rate: of the params.
      outer_learning_rate: of outer variables that are not weights, such as the scheduler of JTDS.
      weight_learning_rate: of outer variables that are weights.
      temperature: of Langevin sampling, divided by the number of training examples.
      dev: the outer loss is on held-out dev examples, or on train, to which dev is then added.
      dev_size: dev examples.
      input: all data lie on the device, or the host reads them as a stream.
      log_every: updates between lines of the log.
      checkpoint_every: updates between checkpoints.
    """

    steps: int = setting(1000, least=1)
    inner_steps: int = setting(10, least=1)
    outer_steps: int = setting(1, least=1)
    batch_size: int = setting(64, least=1)
    outer_batch_size: int = setting(64, least=1)
    learning_rate: float = 1e-3
    outer_learning_rate: float = 1e-2
    weight_learning_rate: float = 1e-2
    temperature: float = 0.01
    dev: str = setting("held_out", choices=DEV_MODES)
    dev_size: int = 200
    input: str = setting("device", choices=INPUTS)
    log_every: int = setting(100, least=1)
    checkpoint_every: int = setting(500, least=1)


def check_settings(settings: RunSettings) -> None:
    """Raises a ValueError for a setting out of its bounds; what concerns data is the loader's responsibility."""
    for field in dataclasses.fields(settings):
        value, bounds = getattr(settings, field.name), _bounds(type(settings), field)
        for part in value if isinstance(value, tuple) else (value,):
            _check_part(f"{field.name}={value!r}" if isinstance(value, str) else f"{field.name}={value}", part, bounds)


def check_seed(seed: int) -> None:
    """Raises a ValueError for a seed that not every random generator takes."""
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed {seed}: expected a whole number from 0 to 2^31 - 1.")


def _bounds(kind: type, field: dataclasses.Field) -> dict:
    """The bounds of a field; a class that gives a field of its base another default alone keeps the bounds."""
    for base in kind.__mro__:
        found = getattr(base, "__dataclass_fields__", {}).get(field.name)
        if found is not None and found.metadata:
            return dict(found.metadata)
    return {"least": 0, "most": math.inf, "choices": ()}


def _check_part(what: str, part, bounds: dict) -> None:
    if isinstance(part, str):
        if bounds["choices"] and part not in bounds["choices"]:
            raise ValueError(f"{what}: expected one of {', '.join(bounds['choices'])}.")
        return
    least, most = bounds["least"], bounds["most"]
    up_to = f" and at most {most:g}" if math.isfinite(most) else ""
    if isinstance(part, int) and least >= 1 and not least <= part <= min(most, _LARGEST - 1):
        raise ValueError(f"{what}: expected a whole number of at least {least}{up_to or ' (and below 2^31)'}.")
    if not math.isfinite(part) or not least <= part <= most:
        raise ValueError(f"{what}: expected a finite number of at least {least:g}{up_to}.")
