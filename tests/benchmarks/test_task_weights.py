"""A tiny run of the benchmark: what it writes, that it checks results before timing, and its command line."""

import json

import pytest

from benchmarks import task_weights

pytestmark = pytest.mark.slow

TINY = ["--tasks", "1,3", "--repeats", "2", "--batch", "2", "--image", "4", "--channels", "2,3"]


def test_small_run_agrees_and_is_written(tmp_path, capsys, single_precision):
    path = tmp_path / "out.json"
    result = task_weights.main([*TINY, "--json", str(path)])
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert [row["tasks"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert row["disagreement"] < 1e-4
        assert row["score_matching"]["repeats"] == 2
        assert row["score_matching"]["ratio_of_median"] > 0
        assert row["separate_gradients"]["median_s"] > 0
    assert result["machine"]["cpu_count"] >= 1
    assert "score" in capsys.readouterr().out


def test_disagreement_stops_it(single_precision):
    with pytest.raises(SystemExit, match="differ"):
        task_weights.main([*TINY, "--tolerance", "0"])


@pytest.mark.parametrize("arguments", [["--tasks", "0"], ["--repeats", "0"], ["--tasks", "a"]])
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        task_weights.main(arguments)
    assert "error" in capsys.readouterr().err
