"""The trial of endurance tells phases and differences apart. The trial itself, in short, is in `test_resume`."""

import json

import pytest

from benchmarks.studies import endurance
from experiments.runtime import records

pytestmark = pytest.mark.slow


def log(run, step, name="metrics.jsonl"):
    run.mkdir(exist_ok=True)
    (run / name).unlink(missing_ok=True)
    records.append_line(run / name, {"step": step})


def test_the_phase_is_told_from_what_a_killed_process_left(tmp_path):
    run, saves = tmp_path / "run", tmp_path / "run" / "checkpoints"
    nothing = endurance.look(run)
    assert endurance.phase_of(run, nothing) == "start-up"
    (saves / "40.orbax-checkpoint-tmp").mkdir(parents=True)
    assert endurance.phase_of(run, nothing) == "saving a checkpoint"
    left = endurance.look(run)
    assert endurance.phase_of(run, left) == "start-up"  # the process before it left that folder
    log(run, 20, "new")
    (run / "new").rename(run / "metrics.jsonl")
    assert endurance.phase_of(run, left) == "training"
    (saves / "40").mkdir()
    assert endurance.phase_of(run, left) == "saving a checkpoint"  # its checksum is missing
    records.note_checkpoints(run, [40], 40)
    assert endurance.phase_of(run, left) == "training"
    records.save_arrays(run / "weights.npz")
    assert endurance.phase_of(run, left) == "after the last step"


@pytest.mark.parametrize("differ", [[], ["metrics.jsonl"]])
def test_a_run_that_ended_otherwise_ends_with_status_1(tmp_path, capsys, monkeypatch, differ):
    kill = {"phase": "training", "logged": 60, "checkpoint": 40, "temporary_left": False}
    killed = [{"kills": [kill, {**kill, "phase": "start-up"}], "differences": []}]
    done = {
        "kills": [*killed, {"kills": [], "differences": differ}],
        "preemptions": [{"preemptions": [{"step": 50, "seconds_to_leave": 0.25}], "differences": []}],
        "damaged": [{"case": "one bit", "differences": []}],
        "full_disk": [{"case": "16 kB", "status": 2, "differences": []}],
    }
    monkeypatch.setattr(endurance, "measure", lambda options, folder, save: save(done))
    path = tmp_path / "new" / "found.json"
    assert endurance.main(["--out", str(path)]) == len(differ)
    assert json.loads(path.read_text()) == done
    out, err = capsys.readouterr()
    assert f"{2 - len(differ)} of 2 runs equal" in out
    assert "at most 20 steps to repeat" in out
    assert ("not as the run left alone: a run: metrics.jsonl" in err) == bool(differ)
