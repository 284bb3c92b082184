"""A tiny run of the benchmark: every method has its row, what is left out is said, and the two updates are the step."""

import json

import jax
import numpy as np
import optax
import pytest

import auxjax
from benchmarks.shared import timing
from benchmarks.train_step import __main__ as train_step
from benchmarks.train_step import report
from benchmarks.train_step.cases import GENERATING, ROWS, make_case

pytestmark = pytest.mark.slow

TINY = ["--batch", "4", "--inputs", "3", "--hidden", "4,5", "--image", "4", "--channels", "2,3"]
QUICK = [*TINY, "--repeats", "2", "--inner-steps", "2", "--methods", "arml,grid_search"]


def test_every_method_has_a_row():
    assert {row.method for row in ROWS.values()} == set(auxjax.methods.names()) - set(GENERATING)


@pytest.mark.slow
def test_small_run_is_shown_written_and_drawn(tmp_path, capsys, single_precision):
    path = tmp_path / "out.json"
    arguments = [*QUICK, "--tasks", "4,1", "--json", str(path), "--out", str(tmp_path / "plots")]
    result = train_step.main(arguments)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "plots" / "train_step.png").stat().st_size > 10_000
    assert "| grid_search, product | " in (tmp_path / "plots" / "train_step_tables.md").read_text()
    assert list(dict.fromkeys((row["model"], row["tasks"]) for row in result["rows"])) == [
        ("mlp", 1),
        ("mlp", 4),
        ("convnet", 1),
        ("convnet", 4),
    ]
    for row in result["rows"]:
        assert (row["outer_ms"] is None) == (row["row"] in ("stl", "stl, one head", "equal"))
        assert row["update_ms"]["turns"] == 2
        assert row["to_equal"]["median"] > 0
        assert all(program["kernels"] > 0 for program in row["programs"].values())
    # A grid of 5^4 candidates cannot be trained, and that is said.
    assert [(entry["row"], entry["tasks"]) for entry in result["left_out"]] == [("grid_search, product", 4)] * 2
    shown = capsys.readouterr().out
    assert "Left out: grid_search, product, MLP, K = 4: the product grid has 5^4 candidates" in shown
    assert "goal of at most" in shown
    assert {entry["row"] for entry in result["growth"]} == {"arml"}


def test_programs_that_are_too_large_are_left_out_with_their_size(capsys, single_precision):
    result = train_step.main([*QUICK, "--models", "mlp", "--tasks", "1", "--equations", "1"])
    assert [row["row"] for row in result["rows"]] == ["stl", "equal"]  # what the ratios are taken to always runs
    assert "equations, and more than --equations 1 take minutes" in capsys.readouterr().out


@pytest.mark.parametrize("label", ["arml", "ol_aux", "gradnorm, last layer"])
def test_the_two_updates_are_the_training_step(label, single_precision):
    """Inner updates and an outer one as they are timed give the params and weights that `make_step` gives."""
    options = train_step.parse([*TINY, "--inner-steps", "2"])
    case, row = make_case("mlp", 3, options), ROWS[label]
    runner = train_step.make_runner(row, case, options, float("inf"))
    method = auxjax.methods.get(row.method, **row.options(case))
    init, step = auxjax.make_step(
        case.model, method, optax.sgd(1e-3, momentum=0.9), inner_steps=2, draw_inner=lambda batch, key: batch
    )
    state = init(jax.random.key(0), case.params, case.inner)
    state, _ = step(state, case.inner, case.outer)  # the runner has made one step to warm up
    for found, wanted in zip(jax.tree.leaves(runner.state), jax.tree.leaves(state), strict=True):
        if not jax.dtypes.issubdtype(found.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_interval_of_a_median():
    """Known tables: the 1st and 6th of 6 values, the 6th and 15th of 20; none below 6."""
    six = timing.median_interval([6, 5, 4, 3, 2, 1])
    assert (six["median"], six["low"], six["high"]) == (3.5, 1.0, 6.0)
    twenty = timing.median_interval(range(1, 21))
    assert (twenty["low"], twenty["high"]) == (6.0, 15.0)
    five = timing.median_interval([1, 2, 3, 4, 5])
    assert five["low"] is None
    assert [report.ratio_text(ratio) for ratio in (twenty, five, None)] == [
        "10.50\n6.00-15.00",
        "3.00\n5 turns",
        "left out",
    ]


def test_equations_are_counted_inside_of_others():
    def function(x):
        return jax.jit(lambda y: y * y + y)(x) + 1.0

    traced = jax.jit(function).trace(1.0)
    # The inner jit itself, a product and a sum in it, and the sum outside.
    assert train_step.equations(traced.jaxpr) == 4


@pytest.mark.parametrize(
    "arguments", [["--tasks", "0"], ["--repeats", "0"], ["--methods", "none"], ["--models", "resnet"]]
)
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        train_step.main(arguments)
    assert "error" in capsys.readouterr().err


def test_a_file_with_other_settings_is_not_added_to(tmp_path, single_precision):
    path = tmp_path / "out.json"
    arguments = [*QUICK, "--models", "mlp", "--tasks", "1", "--json", str(path)]
    whole = train_step.main([*arguments, "--equations", "1"])
    written = path.read_text()
    assert train_step.main([*arguments, "--equations", "1"]) == json.loads(json.dumps(whole))  # nothing is measured
    assert path.read_text() == written
    with pytest.raises(SystemExit, match="times with another settings: equations 1 instead of 2"):
        train_step.main([*arguments, "--equations", "2"])
