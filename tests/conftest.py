"""Strict settings for every test: float64 on, no silent promotion, warnings are errors, four CPU devices.

The devices are faked by XLA on one processor, so that the tests of sharding run everywhere.
"""

import gc
import os
import pathlib
import warnings

# Before jax starts a backend. Tests that need another setting run their code in a process of their own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Without the lines of Python in every operation of a program, an eighth of the time; no program computes otherwise.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax
import pytest

# What jax has traced lives long and is much: collected as often as by default it takes a twentieth of the time.
gc.collect()
gc.freeze()
gc.set_threshold(50_000, 20, 100)

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    """Turns every warning into an error; third-party deprecations at import time are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What Python could not raise, it tells when it pleases, in a test of something else: shown, no error.
        warnings.filterwarnings("default", category=pytest.PytestUnraisableExceptionWarning)
        yield


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_do_not_pile_up():
    """They hold memory maps, some 70 per test, and a process may have 65,530: beyond that XLA's compiler crashes."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()


@pytest.fixture
def ordinary_promotion():
    """For tests that run optax.adam, whose bias correction mixes an integer count with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def single_precision():
    """What a user has by default: float32, ordinary promotion."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
