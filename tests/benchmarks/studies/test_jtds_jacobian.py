"""A tiny run of the benchmark: its exact hypergradient against differences, and that only the form of J differs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from auxjax import BilevelProblem
from auxjax.methods._jtds import TaskSchedule
from benchmarks.studies import jtds_jacobian
from tests.helpers.bilevel_problems import ridge

pytestmark = pytest.mark.slow

TINY = ["--seeds", "0", "--hidden", "2", "--train", "40", "--dev", "20", "--steps", "3", "--decay", "0.03"]


@pytest.mark.slow
def test_tiny_run_is_checked_and_written(tmp_path, capsys, ordinary_promotion):
    path = tmp_path / "out.json"
    result = jtds_jacobian.main([*TINY, "--check", "0", "--out", str(path)])
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert [(row["standardise"], row["phase"]) for row in result["rows"]] == [
        (True, "initial"),
        (True, "trained"),
        (False, "initial"),
        (False, "trained"),
    ]
    for row in result["rows"]:
        assert row["inner_grad_norm"] <= 1e-10
        assert row["relative_residual"] < 1e-9
        assert row["difference_error"] < 1e-6
        assert row["least_real_part"] > 0
        assert row["parts"]["total"]["relative_error"] > 0
    assert len(result["summary"]) == 2 * 2 * 5
    assert "cosine" in capsys.readouterr().out


def test_comparison_is_by_parts_over_all_tasks():

    plain = TaskSchedule(jnp.ones(()), jnp.ones(2), jnp.ones(()), jnp.ones(()))

    def schedule(importance, slope):
        return {
            "a": plain._replace(importance=jnp.asarray(importance)),
            "b": plain._replace(slope=jnp.asarray(slope)),
        }

    found = jtds_jacobian.compare(schedule(3.0, 1.0), schedule(1.0, -1.0))
    np.testing.assert_allclose(found["importance"]["relative_error"], 2 / np.sqrt(2))
    np.testing.assert_allclose(found["slope"]["cosine"], 0, atol=1e-15)
    np.testing.assert_allclose(found["prototype"]["relative_error"], 0)
    np.testing.assert_allclose(found["total"]["relative_error"], np.sqrt(8 / 10))


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [0, 2])
def test_both_forms_have_the_same_fixed_points_and_the_decay(hidden, ordinary_promotion):
    options = jtds_jacobian.parse([*TINY, "--hidden", str(hidden)])
    case = jtds_jacobian.make_case(0, options)
    lower = jtds_jacobian.make_lower(case, True, options)
    params, schedule = jtds_jacobian.train(lower, case, 0, 0)
    flat = ravel_pytree(params)[0]
    by_loss = jax.grad(lower.held_fixed.inner)(params, schedule, case.train)
    field = lower.field(flat, schedule, case.train)
    np.testing.assert_allclose(ravel_pytree(by_loss)[0], field, rtol=1e-10, atol=1e-13)
    with pytest.raises(SystemExit, match="not solved"):
        jtds_jacobian.fixed_point(lower, case, params, schedule, most=0)


def test_decay_enters_losses_and_fields_alike():
    plain = ridge()
    field = BilevelProblem(update_field=jax.grad(plain.problem.inner), outer=plain.problem.outer)
    by_loss = jax.grad(jtds_jacobian.with_decay(plain.problem, 0.3).inner)
    by_field = jtds_jacobian.with_decay(field, 0.3).update_field
    params = jax.tree.map(lambda leaf: leaf + 1.7, plain.params)
    for found in (by_loss, by_field):
        came = ravel_pytree(found(params, plain.meta, plain.inner_batch))[0]
        bare = ravel_pytree(field.update_field(params, plain.meta, plain.inner_batch))[0]
        np.testing.assert_allclose(came, bare + 0.3 * ravel_pytree(params)[0], rtol=1e-12)


@pytest.mark.parametrize("arguments", [["--seeds", "a"], ["--train", "1"], ["--decay", "0"], ["--hidden", "-1"]])
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        jtds_jacobian.parse(arguments)
    assert "error" in capsys.readouterr().err
