"""Bounds of settings: they belong to the field, and a new default keeps them."""

import dataclasses
import math
import pathlib

import pytest

from experiments import cli
from experiments.settings import RunSettings, check_settings, setting


@dataclasses.dataclass(frozen=True)
class Settings(RunSettings):
    batch_size: int = 32
    depth: int = setting(3, least=2, most=9)
    share: float = setting(0.5, most=1.0)
    shift: float = setting(0.0, least=-math.inf)
    kind: str = setting("a", choices=("a", "b"))
    widths: tuple[int, ...] = setting((8, 8), least=1)
    words: tuple[str, ...] = ("any",)


def test_defaults_and_values_on_the_bounds_pass():
    check_settings(Settings())
    check_settings(Settings(depth=9, share=1.0, shift=-3.0, kind="b", batch_size=1, learning_rate=0.0, words=()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 1}, "depth=1: expected a whole number of at least 2 and at most 9"),
        ({"depth": 10}, "depth=10: expected a whole number of at least 2 and at most 9"),
        ({"share": 1.5}, "share=1.5: expected a finite number of at least 0 and at most 1"),
        ({"share": math.nan}, "share=nan: expected a finite number"),
        ({"shift": -math.inf}, "shift=-inf: expected a finite number"),
        ({"kind": "c"}, "kind='c': expected one of a, b"),
        ({"widths": (8, 0)}, r"widths=\(8, 0\): expected a whole number of at least 1"),
        ({"batch_size": 0}, r"batch_size=0: expected a whole number of at least 1 \(and below 2\^31\)"),
        ({"steps": 2**31}, "steps=2147483648: expected a whole number"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001: expected a finite number of at least 0"),
        ({"dev": "test"}, "dev='test': expected one of held_out, train"),
        ({"input": "disk"}, "input='disk': expected one of device, stream"),
    ],
)
def test_values_out_of_bounds_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_settings(Settings(**changes))


def test_a_path_may_begin_with_the_home_folder():
    """The shell leaves `~` alone behind `=`."""
    found = cli.parser("run", "A command.").parse_args(["digits_noise", "--out=~/x", "--data-dir=~/data"])
    assert found.out == pathlib.Path.home() / "x"
    assert found.data_dir == str(pathlib.Path.home() / "data")
