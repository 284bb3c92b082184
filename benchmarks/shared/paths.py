"""Paths on the command line."""

import pathlib


def home_path(text: str) -> pathlib.Path:
    """A path with `~` as the home folder: the shell leaves it alone in `--out=~/x`."""
    return pathlib.Path(text).expanduser()
