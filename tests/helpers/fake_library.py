"""A library for the tests of the benchmark, in NumPy: its errors are known, and it fails in every way."""

import os

import numpy as np

from benchmarks.hypergradients.problems.exchange import LeftOut

NAME, VERSION = "fake", "1.0"


def available():
    """It can be used."""
    return None


def entries(kind: str) -> dict:
    """Results that are off by a known factor, and failures."""
    del kind
    tolerances = {f"off tol={value:g} warm": _off(value) for value in (1e-1, 1e-2, 2e-3, 1e-4)}
    failures = {"left out": _left_out, "raises": _raises, "dies": _dies, "not finite": _off(float("nan"))}
    return {
        "off K=20": _off(0.5),
        "off tol=0.001": _off(1e-3),
        **tolerances,
        **failures,
        "never K=10": _off(0.1),
        "never K=160": _off(0.02),
    }


def _off(factor: float):
    def make(problem, options):
        assert "seed" in options

        def run(other=None, restart=False):
            del restart
            here = problem if other is None else other
            return {key: np.asarray(leaf * (1 + factor)) for key, leaf in here.reference.items()}

        return run, 20, lambda: {"relative_residual": factor}

    return make


def _left_out(problem, options):
    raise LeftOut("for other problems")


def _raises(problem, options):
    raise RuntimeError("this library has a defect")


def _dies(problem, options):
    return lambda other=None, restart=False: os._exit(3), None
