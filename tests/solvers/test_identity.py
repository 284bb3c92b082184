import numpy as np
import pytest

from auxjax import identity, neumann
from tests.helpers.linear_systems import nonsymmetric


def test_is_a_multiple_of_the_right_hand_side():
    system = nonsymmetric()
    x, info = identity()(system.matvec, system.b)
    np.testing.assert_array_equal(x, system.b)
    np.testing.assert_allclose(info.relative_residual, system.residual(x), rtol=1e-12)
    assert info.num_matvecs == 1
    assert not info.converged


def test_with_a_scale_it_is_the_first_term_of_the_neumann_series():
    system = nonsymmetric()
    x, info = identity(scale=0.3)(system.matvec, system.b)
    first, first_info = neumann(0, 0.3)(system.matvec, system.b)
    np.testing.assert_allclose(x, first, rtol=1e-15)
    np.testing.assert_allclose(info.relative_residual, first_info.relative_residual, rtol=1e-12)


def test_the_identity_matrix_is_solved_exactly():
    _, info = identity()(lambda x: x, nonsymmetric().b)
    assert info.relative_residual == 0
    assert info.converged


def test_refuses_a_negative_scale():
    with pytest.raises(ValueError, match="scale"):
        identity(scale=-1.0)
