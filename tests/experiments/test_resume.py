"""Stopped in any way and started again, a run ends with the same numbers, to the bit: `make endurance` in short."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import time

import jax
import pytest

from auxjax.training.checkpoint import arrays
from experiments.configs import digits_noise
from experiments.runtime import interruption
from experiments.training import single
from tests.helpers.commands import assert_same_run, call, checkpoints, finish, read, refused, start, tiny, wait_until

pytestmark = pytest.mark.usefixtures("single_precision")
# Long enough that a busy machine does not end a run before the signal reaches it.
JTDS = ["digits_noise", "--method", "jtds", "--seed", "3", "--steps", "4000"]
JTDS += ["--set", "log_every=80", "--set", "checkpoint_every=80", "--set", "hidden=32"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*[Ss]harding.*")
def test_a_run_killed_at_any_moment_ends_as_if_nothing_had_happened(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start("run", *JTDS, "--out", whole))
    chance = random.Random(0)
    stops = (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
    for least, how in zip((80, 160, 240, 320), stops, strict=True):
        process = start("run", *JTDS, "--out", broken)
        wait_until(process, lambda least=least: max(checkpoints(broken), default=0) >= least)
        time.sleep(chance.uniform(0.0, 0.1))
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
        assert not (broken / "result.json").exists()
        assert process.returncode == (-how if how == signal.SIGKILL else 128 + how), err
        if how == signal.SIGINT:
            assert err.strip().splitlines()[-1] == interruption.HINT
        if how == signal.SIGTERM:
            preempted_at = max(checkpoints(broken))
            assert f"preempted at step {preempted_at}, saved; the same command resumes." in err
        assert "Traceback" not in err
    out, _ = finish(start("run", *JTDS, "--out", broken))
    assert "corrupted AUROC" in out
    assert_same_run(whole, broken)
    one, other = (arrays(folder / "checkpoints", 4000) for folder in (whole, broken))
    assert one.keys() == other.keys()
    assert any("prototype" in name for name in one)
    for name in one:
        assert one[name].tobytes() == other[name].tobytes(), name
    timing = (whole / "timing.jsonl").read_text().splitlines()
    finish(start("run", *JTDS, "--out", whole))
    assert (whole / "timing.jsonl").read_text().splitlines() == timing  # shown again, not trained again


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_repeats_no_finished_run(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = ["digits_noise", "--methods", "equal", "--seeds", "0,1", *tiny(steps=300)]
    finish(start("compare", *command, "--out", whole))
    process = start("compare", *command, "--out", broken)
    wait_until(process, lambda: checkpoints(broken / "equal" / "seed_1"))
    process.kill()
    process.communicate(timeout=60)
    assert not (broken / "equal" / "seed_1" / "result.json").exists()
    assert not (broken / "table.csv").exists()
    files = [broken / "equal" / "seed_0" / name for name in ("result.json", "weights.npz", "metrics.jsonl")]
    before = [path.stat().st_mtime_ns for path in files]
    finish(start("compare", *command, "--out", broken))
    assert [path.stat().st_mtime_ns for path in files] == before
    for seed in ("seed_0", "seed_1"):
        assert_same_run(whole / "equal" / seed, broken / "equal" / seed)
    assert (whole / "table.csv").read_bytes() == (broken / "table.csv").read_bytes()


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """A run that was stopped after step 40 of 60: its checkpoint is 40. And the same run, finished."""
    folder = tmp_path_factory.mktemp("half")
    command = ["digits_noise", "--method", "jtds", *tiny(steps=60)]
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert call("run", *command, "--out", folder / "whole") == 0
    half = folder / "half"
    shutil.copytree(folder / "whole", half)
    for name in ("result.json", "weights.npz", "timing.jsonl"):
        (half / name).unlink()
    shutil.rmtree(half / "checkpoints" / "60")
    return command, folder / "whole", half


@pytest.fixture
def copied(half_done, tmp_path):
    command, whole, half = half_done
    return command, whole, shutil.copytree(half, tmp_path / "run")


def test_lines_after_the_checkpoint_are_dropped_and_a_cut_one_too(copied):
    command, whole, run = copied
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 60, "loss/cl')
    assert call("run", *command, "--out", run) == 0
    assert_same_run(whole, run)


def test_a_folder_claimed_by_a_process_that_died_at_once_is_free(half_done, tmp_path):
    command, whole, _ = half_done
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock").touch()
    (run / "run.partial").write_text("{")
    assert call("run", *command, "--out", run) == 0
    assert_same_run(whole, run)


def test_killed_between_the_last_checkpoint_and_the_result(half_done, tmp_path):
    command, whole, _ = half_done
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "result.json").unlink()
    (run / "weights.npz").write_bytes(b"half")
    assert call("run", *command, "--out", run) == 0
    assert_same_run(whole, run)


@pytest.mark.parametrize("there", [None, 1, 99])
def test_a_run_of_another_format_is_refused_and_stays(copied, capsys, there):
    command, _, run = copied
    about = json.loads((run / "run.json").read_text())
    del about["format"]
    (run / "run.json").write_text(json.dumps(about if there is None else about | {"format": there}))
    assert f"in another format: expected 2, got {there or 1}." in refused(capsys, "run", *command, "--out", run)
    assert checkpoints(run) == [40]


def warned(capsys, *command) -> str:
    """Goes on with a run, which must warn in one line and end well; returns that line."""
    capsys.readouterr()
    assert call("run", *command) == 0
    lines = capsys.readouterr().err.splitlines()
    (found,) = (line for line in lines if line.startswith("warning: "))
    assert lines[0] == found
    return found


def add_newer(run) -> pathlib.Path:
    """Adds a checkpoint 50 that stands for one saved after that of step 40."""
    shutil.copytree(run / "checkpoints" / "40", run / "checkpoints" / "50")
    known = json.loads((run / "checkpoints.json").read_text())
    (run / "checkpoints.json").write_text(json.dumps({**known, "50": known["40"]}))
    return run / "checkpoints" / "50"


PARTS = ["tree/d", *(pytest.param(f"tree/{name}", marks=pytest.mark.slow) for name in ("manifest.ocdbt", "_METADATA"))]


@pytest.mark.parametrize("part", [*PARTS, "note/metadata"])
def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(copied, capsys, part):
    command, whole, run = copied
    newest = add_newer(run)
    path = newest / part if (newest / part).is_file() else next((newest / part).iterdir())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    path.write_bytes(content)
    message = warned(capsys, *command, "--out", run)
    assert f"the checkpoint of step 50 in {run} is damaged: its files are not those that were saved." in message
    assert f"It is now {run / 'damaged' / '50'}. The run resumes from step 40." in message
    assert (run / "damaged" / "50" / path.relative_to(newest)).read_bytes() == content
    assert checkpoints(run) == [40, 60]
    assert_same_run(whole, run)


@pytest.mark.parametrize("part", ["tree", "tree/_METADATA"])
def test_a_checkpoint_without_a_checksum_that_cannot_be_read_is_set_aside(copied, capsys, part):
    command, whole, run = copied
    path = add_newer(run) / part
    (run / "checkpoints.json").write_text("{half a file")
    shutil.rmtree(path) if path.is_dir() else path.write_bytes(b"")
    assert "of step 50" in (message := warned(capsys, *command, "--out", run))
    assert "cannot be read" in message
    assert_same_run(whole, run)


def test_without_any_good_checkpoint_the_run_starts_again(copied, capsys):
    command, whole, run = copied
    (run / "checkpoints" / "40" / "tree" / "manifest.ocdbt").unlink()
    (run / "damaged" / "40").mkdir(parents=True)  # from another time
    message = warned(capsys, *command, "--out", run)
    assert (
        f"It is now {run / 'damaged' / '40-2'}. No earlier one is available; the run starts again, from step 0."
        in message
    )
    assert_same_run(whole, run)


def test_a_whole_checkpoint_of_another_program_is_refused_and_stays(copied, capsys, monkeypatch):
    command, _, run = copied
    real = single.compiled
    larger = dataclasses.replace(digits_noise.Settings(), hidden=8)
    monkeypatch.setattr(single, "compiled", lambda config, settings, *rest: real(config, larger, *rest))
    assert call("run", *command, "--out", run) == 2
    assert "Use the settings it was made with" in capsys.readouterr().err
    assert checkpoints(run) == [40]


def test_what_a_save_that_was_killed_left_is_removed(copied):
    command, whole, run = copied
    shutil.copytree(run / "checkpoints" / "40", run / "checkpoints" / "60.orbax-checkpoint-tmp")
    (run / "checkpoints" / "60.orbax-checkpoint-tmp" / "tree" / "_METADATA").unlink()
    assert call("run", *command, "--out", run) == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["40", "60"]
    assert_same_run(whole, run)


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_on_the_disk_costs_nothing(copied):
    command, whole, run = copied
    limited = ("sh", "-c", 'ulimit -f 16 && exec "$@"', "sh")  # 8 kB in one file: fewer than a checkpoint's
    process = start("run", *command, "--out", run, through=limited)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    assert err.splitlines()[-1] == (
        "error: the disk is full: the checkpoint of step 60 could not be written (File too large). The checkpoint of "
        f"step 40 is whole, and the log in {run} is good. Free some space; the same command then resumes."
    )
    assert "Traceback" not in err
    assert checkpoints(run) == [40]
    assert call("run", *command, "--out", run) == 0
    assert_same_run(whole, run)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize(("partial", "file"), [("result", "result.json"), ("weights", "weights.npz")])
def test_a_result_that_does_not_fit_on_the_disk_is_written_later(copied, capsys, partial, file):
    command, whole, run = copied
    (run / f"{partial}.partial").symlink_to("/dev/full")
    assert call("run", *command, "--out", run) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"error: the disk is full: {run / file} could not be written (No space left on device)." in message
    assert "The checkpoint of step 60 is whole" in message
    (run / f"{partial}.partial").unlink()
    assert call("run", *command, "--out", run) == 0
    assert_same_run(whole, run)


@pytest.mark.parametrize(
    "at", [pytest.param(10, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.slow), 30, 60]
)
def test_preempted_at_any_step_a_run_saves_and_goes_on(half_done, tmp_path, capsys, monkeypatch, at):
    command, whole, _ = half_done
    run = tmp_path / "run"
    real = interruption.preemption_requested

    def asked_at(call):  # the signal comes at a known step: the question is asked once for every ten
        if call == at // 10:
            signal.raise_signal(signal.SIGTERM)
        return real(call)

    with monkeypatch.context() as patched:
        patched.setattr(interruption, "preemption_requested", asked_at)
        assert call("run", *command, "--out", run) == 143
    assert capsys.readouterr().err.splitlines()[-1] == f"preempted at step {at}, saved; the same command resumes."
    assert max(checkpoints(run)) == at
    assert not (run / "result.json").exists()
    assert call("run", *command, "--out", run) == 0
    assert_same_run(whole, run)


def test_preempted_before_the_first_step_there_is_nothing_to_save(half_done, tmp_path, capsys, monkeypatch):
    command, whole, _ = half_done
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(interruption, "preemption_requested", lambda call: True)
        assert call("run", *command, "--out", run) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "preempted before the first step; the same command resumes."
    assert checkpoints(run) == []
    assert call("run", *command, "--out", run) == 0
    assert_same_run(whole, run)


def test_a_preempted_comparison_stops_as_a_whole(half_done, tmp_path, capsys, monkeypatch):
    command, whole, _ = half_done
    folder = tmp_path / "all"
    arguments = [command[0], "--methods", "jtds", "--seeds", "0,1", *command[3:], "--out", folder]
    real = interruption.preemption_requested
    with monkeypatch.context() as patched:
        patched.setattr(interruption, "preemption_requested", lambda call: call == 3 or real(call))
        assert call("compare", *arguments) == 143
    assert "preempted at step 30, saved" in capsys.readouterr().err
    assert not (folder / "jtds" / "seed_1").exists()
    assert not (folder / "table.csv").exists()
    assert call("compare", *arguments) == 0
    assert_same_run(whole, folder / "jtds" / "seed_0")


def test_a_checkpoint_whose_checksum_was_not_yet_written_is_used(copied):
    command, whole, run = copied
    (run / "checkpoints.json").write_text("{}")
    assert call("run", *command, "--out", run) == 0
    assert_same_run(whole, run)


def test_a_log_damaged_before_the_checkpoint_is_refused(copied, capsys):
    command, _, run = copied
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([b"\xff\x00" + lines[0][:20] + b"\n", *lines[1:]]))
    assert "metrics.jsonl, line 1, is damaged" in refused(capsys, "run", *command, "--out", run)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[1:2]))
    assert "has 1 lines up to step 40, and there were 2" in refused(capsys, "run", *command, "--out", run)
    (run / "metrics.jsonl").unlink()
    assert "has 0 lines up to step 40, and there were 2" in refused(capsys, "run", *command, "--out", run)


def test_two_processes_cannot_work_on_one_run(copied, capsys):
    import fcntl

    command, _, run = copied
    with (run / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "Another process is working on" in refused(capsys, "run", *command, "--out", run)
    assert call("run", *command, "--out", run) == 0
    assert read(run)[0]["step"] == 60
