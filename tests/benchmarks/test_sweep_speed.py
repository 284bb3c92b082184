"""The speed of a sweep: both sides train the same runs, and its mistakes."""

import json

import pytest

from benchmarks import sweep_speed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_precision")]
TINY = ["hidden=8", "batch_size=8", "inner_steps=2", "steps=20"]


@pytest.fixture
def cache_setting():
    """The benchmark turns the compilation cache off; other tests want it as it was."""
    import jax

    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def test_both_sides_are_timed(tmp_path, capsys, cache_setting):
    path = tmp_path / "speed.json"
    arguments = [part for value in TINY for part in ("--set", value)]
    over = ["--over", "auxiliary_weight=0.5,2", "--seeds", "0,1", "--turns", "6"]
    assert sweep_speed.main(["digits_noise", "--method", "equal", *over, "--json", str(path), *arguments]) == 0
    result = json.loads(path.read_text())
    assert (result["runs"], result["steps"]) == (4, 20)
    assert [row["side"] for row in result["rows"]] == ["one program", "one by one"]
    for row in result["rows"]:
        calls = 20 / 2
        once = row["ms_per_update"]["median"] * 2 / 1e3
        assert row["total_s"] == pytest.approx(row["first_call_s"] + (calls - 1) * once)
        assert row["updates_per_second"] == pytest.approx(2 * 4 / once)
    assert result["ratios"]["speed"]["low"] <= result["ratios"]["speed"]["median"]
    assert "times as fast per update" in capsys.readouterr().out


def test_mistakes_are_named(capsys, cache_setting):
    assert sweep_speed.main(["digits_noise", "--method", "equal", "--over", "reduction=sum,mean"]) == 2
    assert "cannot be swept in one compiled program" in capsys.readouterr().err
