"""Damaged archives: every way of breaking a file gives one kind of error, which names file, size and digest."""

import hashlib

import numpy as np
import pytest

from experiments.data.files import load_npz


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "some.npz"
    rng = np.random.default_rng(0)
    np.savez_compressed(path, a=rng.integers(0, 9, (40, 30), dtype=np.uint8), b=np.arange(50), c=np.array(["x", "yy"]))
    return path


def test_wanted_arrays_come_back_and_others_are_left(archive):
    arrays = load_npz(archive, ["b", "c"], where="here")
    assert set(arrays) == {"b", "c"}
    np.testing.assert_array_equal(arrays["b"], np.arange(50))


def test_missing_file_and_missing_keys(archive, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"here: there is no file .*none.npz"):
        load_npz(tmp_path / "none.npz", ["a"], where="here")
    with pytest.raises(ValueError, match=r"lacks the arrays \['d'\]; it has \['a', 'b', 'c'\], expected \['a', 'd'\]"):
        load_npz(archive, ["a", "d"], where="here")


def test_any_damage_is_one_error(archive):
    """Truncation at many lengths, overwritten and zeroed stretches: a ValueError, or the very same arrays."""
    whole = archive.read_bytes()
    intact = load_npz(archive, ["a", "b", "c"], where="here")
    rng = np.random.default_rng(1)
    damaged = [whole[:length] for length in range(0, len(whole), 7)]
    for _ in range(400):
        start, length = rng.integers(0, len(whole)), rng.integers(1, 40)
        broken = bytearray(whole)
        broken[start : start + length] = rng.bytes(len(broken[start : start + length]))
        damaged.append(bytes(broken))
    messages = []
    for content in damaged:
        archive.write_bytes(content)
        try:
            arrays = load_npz(archive, ["a", "b", "c"], where="here")
        except ValueError as error:
            messages.append(str(error))
        else:
            for key, value in intact.items():
                np.testing.assert_array_equal(arrays[key], value)
    assert all(message.startswith("here: ") for message in messages)
    assert len(messages) > 0.9 * len(damaged)


def test_the_error_quotes_size_and_digest(archive):
    half = archive.read_bytes()[:300]
    archive.write_bytes(half)
    digest = hashlib.sha256(half).hexdigest()
    with pytest.raises(ValueError, match=f"truncated or corrupt.*300 bytes; its sha256 is {digest}: compare"):
        load_npz(archive, ["a"], where="here")
    with pytest.raises(ValueError, match=f"300 bytes, expected 999; its sha256 is {digest}, expected abc; fetch"):
        load_npz(archive, ["a"], where="here", num_bytes=999, sha256="abc")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_what_is_no_archive(archive, content):
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"truncated or corrupt, or no npz archive"):
        load_npz(archive, ["a"], where="here")


def test_a_lone_array_and_pickled_objects_are_refused(tmp_path):
    np.save(tmp_path / "lone.npy", np.arange(3))
    with pytest.raises(ValueError, match=r"no npz archive"):
        load_npz(tmp_path / "lone.npy", ["a"], where="here")
    np.savez(tmp_path / "objects.npz", a=np.array([{}, None], dtype=object))
    with pytest.raises(ValueError, match=r"Object arrays cannot be loaded"):
        load_npz(tmp_path / "objects.npz", ["a"], where="here")
