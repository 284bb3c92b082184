"""The forms of a loop: they compute the same, and the table has each."""

import json

import numpy as np
import pytest

from benchmarks import loop_forms

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_precision")]


def test_the_forms_agree():
    made, start = loop_forms.programs(8, (4, 4), 4)
    plain, *others = (np.asarray(function(start)) for function in made.values())
    for other in others:
        np.testing.assert_allclose(other, plain, rtol=1e-3, atol=1e-4)


def test_each_form_has_a_row(tmp_path, capsys):
    path = tmp_path / "forms.json"
    assert loop_forms.main(["--side", "8", "--channels", "4", "--batch", "4", "--turns", "2", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["form"] for row in rows] == list(loop_forms.FORMS)
    assert rows[-1]["times_written_out"]["median"] == 1
    assert "loop, channels last" in capsys.readouterr().out


def test_mistakes_are_named(capsys):
    with pytest.raises(SystemExit):
        loop_forms.main(["--turns", "0"])
    assert "--turns 0: expected at least 1" in capsys.readouterr().err
