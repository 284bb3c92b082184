"""Reading NumPy archives, with errors that say what is wrong with the file and what to do.

`np.load` answers a damaged archive with any of six exceptions, at opening or only at the first access to an array,
and calls an empty or half file "pickled data". Here all become one ValueError with size and digest of the file. Not
for archives larger than memory: all expected arrays are read at once.
"""

import hashlib
import pathlib
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np


def load_npz(
    path: str | pathlib.Path,
    keys: Sequence[str],
    *,
    where: str,
    num_bytes: int | None = None,
    sha256: str | None = None,
) -> dict[str, np.ndarray]:
    """The arrays named `keys` of an npz archive, read and checked against its checksums; other arrays are not read.

    Args:
      path: the archive.
      keys: names of the expected arrays.
      where: the caller's name, for messages.
      num_bytes, sha256: size and digest of an intact file if known; they are quoted when reading fails, and a file
        that can be read is never refused for differing from them.

    Returns:
      {key: array}.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, corrupt or no archive, or lacks a key.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no file {path}.")
    try:
        # Opened here: given a path, np.load leaves the file open when the archive's directory is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            there = list(archive.files)
            arrays = {key: archive[key] for key in keys if key in there}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, TypeError, ValueError) as error:
        # RuntimeError: damaged flags look like encryption or an unknown compression. TypeError: a lone .npy array.
        raise ValueError(_damage(path, where, num_bytes, sha256, error)) from error
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise ValueError(f"{where}: {path} lacks the arrays {missing}; it has {sorted(there)}, expected {list(keys)}.")
    return arrays


def _damage(path: pathlib.Path, where: str, num_bytes: int | None, sha256: str | None, error: Exception) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = f"{path.stat().st_size} bytes" + (f", expected {num_bytes}" if num_bytes else "")
    known = f", expected {sha256}" if sha256 else ": compare it with the one published beside the file"
    return (
        f"{where}: the file {path} is truncated or corrupt, or no npz archive ({type(error).__name__}: {error}); "
        f"it has {size}; its sha256 is {digest}{known}; fetch the file again."
    )
