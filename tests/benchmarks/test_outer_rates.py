"""The grid of outer rates: rows that are kept, the table's reading of them, and its mistakes."""

import json

import pytest

from benchmarks import outer_rates

pytestmark = pytest.mark.usefixtures("single_precision")


@pytest.mark.slow
def test_rows_are_written_once_and_differ_by_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(outer_rates, "RATES", (1e-3, 1.0))
    arguments = ["--configs", "known_worth", "--methods", "ol_aux", "--seeds", "2", "--updates", "1,3"]
    assert outer_rates.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["optimizer"], row["rate"]) for row in rows] == [("default", 0.0), ("adam", 1e-3), ("adam", 1.0)]
    for row in rows:
        assert [len(of_seed) for of_seed in row["accuracy"]] == [2, 2]
    near, far = (abs(row["weights"]["helpful_0"][0][-1] - 1) for row in rows[1:])
    assert near < 0.02 < far
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert outer_rates.main([*arguments, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    assert "| known_worth | ol_aux | 3 |" in (tmp_path / "table.md").read_text()


def test_the_table_holds_the_default_against_the_best_rate():
    about = {"config": "known_worth", "method": "jtds", "moments": [50]}
    rows = [
        about | {"optimizer": "default", "rate": 0.0, "accuracy": [[0.8], [0.82]]},
        about | {"optimizer": "adam", "rate": 0.1, "accuracy": [[0.9], [0.92]]},
        about | {"optimizer": "adam", "rate": 1.0, "accuracy": [[0.5], [0.99]]},
    ]
    line = outer_rates.table(rows).splitlines()[2]
    assert "| jtds | 50 | 81.0 ± 12.7 | 0.1 | 91.0 ± 12.7 | yes |  |  |" in line
    rows[0]["weights"] = {"class": [[1.0], [1.0]], "helpful_0": [[2.0], [0.1]], "image_0": [[1.0], [1.0]]}
    assert outer_rates.table(rows).splitlines()[2].endswith("| 0.50 |  |")
    rows[1]["accuracy"] = [[0.9], [0.9001]]
    assert "no, -9.0" in outer_rates.table(rows).splitlines()[2]


def test_mistakes_are_named(tmp_path, capsys):
    for arguments, message in (
        (["--methods", "jtdss"], "'jtdss': expected one of jtds"),
        (["--configs", "yeast"], "'yeast': expected one of digits_noise"),
        (["--updates", "50,x"], "--updates 50,x: expected whole numbers, ascending"),
        (["--updates", "50,20"], "--updates 50,20: expected whole numbers, ascending"),
    ):
        with pytest.raises(SystemExit):
            outer_rates.main([*arguments, "--out", str(tmp_path)])
        assert message in capsys.readouterr().err
