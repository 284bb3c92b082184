"""Small linear systems with their solutions."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class LinearSystem(NamedTuple):
    """A x = b, dense and as a function."""

    matrix: np.ndarray
    b: np.ndarray
    solution: np.ndarray
    matvec: Callable

    def residual(self, x) -> float:
        return np.linalg.norm(self.b - self.matrix @ np.asarray(x)) / np.linalg.norm(self.b)


def make(matrix, seed=1) -> LinearSystem:
    b = np.random.default_rng(seed).normal(size=len(matrix))
    device = jnp.asarray(matrix)
    return LinearSystem(matrix, jnp.asarray(b), np.linalg.solve(matrix, b), lambda x: device @ x)


def symmetric(eigenvalues, seed=0) -> LinearSystem:
    size = len(eigenvalues)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    matrix = rotation @ np.diag(eigenvalues) @ rotation.T
    return make((matrix + matrix.T) / 2)


def spd() -> LinearSystem:
    """Symmetric positive definite, eigenvalues between 0.3 and 4."""
    return symmetric(np.geomspace(0.3, 4, 8))


def nonsymmetric() -> LinearSystem:
    """Positive stable, and far from symmetric."""
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(8, 8))
    return make(1.5 * np.eye(8) + 0.35 * matrix)
