"""A run on several devices, and on several processes, is the run of one device; it may go on with another number."""

import json
import shutil
import signal

import numpy as np
import pytest

from experiments.runtime import processes
from tests.helpers.commands import (
    assert_same_run,
    call,
    checkpoints,
    copy_interrupted,
    finish,
    free_port,
    read,
    refused,
    start,
    tiny,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("single_precision")
RUN = ["digits_noise", "--method", "jtds", *tiny(steps=60)]


def assert_close_run(one, other):
    """Equal up to the order of sums, which Adam's first steps and 40 more enlarge."""
    (result, log), (result_other, log_other) = read(one), read(other)
    assert result.keys() == result_other.keys()
    assert [row["step"] for row in log] == [row["step"] for row in log_other]
    for row, row_other in zip(log, log_other, strict=True):
        for name in ("loss/class", "loss/rotation", "weight/class", "validation_accuracy"):
            np.testing.assert_allclose(row[name], row_other[name], rtol=2e-4, err_msg=name)
    with np.load(one / "weights.npz") as a, np.load(other / "weights.npz") as b:
        np.testing.assert_allclose(a["weight/class"], b["weight/class"], rtol=1e-3)


@pytest.fixture(scope="module", params=["equal", pytest.param("jtds", marks=pytest.mark.slow)])
def whole(request, tmp_path_factory):
    """The command of a run, and its folders: on one device and on four."""
    import jax

    command = ["digits_noise", "--method", request.param, *tiny(steps=60)]
    folder = tmp_path_factory.mktemp("devices")
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert call("run", *command, "--out", folder / "one") == 0
        assert call("run", *command, "--devices", 4, "--out", folder / "four") == 0
    return command, folder / "one", folder / "four"


@pytest.mark.slow
def test_four_devices_give_the_run_of_one(whole):
    _, one, four = whole
    assert_close_run(one, four)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_begun_on_four_devices_goes_on_with_fewer(whole, tmp_path, devices):
    command, one, four = whole
    copy_interrupted(four, tmp_path / "half")
    assert call("run", *command, "--devices", devices, "--out", tmp_path / "half") == 0
    assert_close_run(one, tmp_path / "half")


def test_a_run_begun_on_one_device_goes_on_with_four(whole, tmp_path):
    command, one, _ = whole
    copy_interrupted(one, tmp_path / "half")
    assert call("run", *command, "--devices", 4, "--out", tmp_path / "half") == 0
    assert_close_run(one, tmp_path / "half")


@pytest.mark.slow
def test_a_comparison_runs_on_several_devices(tmp_path):
    out = tmp_path / "comparison"
    command = ["digits_noise", "--methods", "equal", "--seeds", "0", *tiny(steps=20)]
    assert call("compare", *command, "--devices", 2, "--out", out) == 0
    assert (out / "table.csv").exists()


def test_devices_that_are_not_there_and_batches_they_cannot_share(tmp_path, capsys):
    out = ["--out", tmp_path / "run"]
    assert "this process sees 4 devices" in refused(capsys, "run", *RUN, "--devices", 5, *out)
    assert "--devices 0: expected a whole number" in refused(capsys, "run", *RUN, "--devices", 0, *out)
    odd = ["--set", "batch_size=33", "--devices", 4]
    assert "has 33 examples, which 4 devices cannot share" in refused(capsys, "run", *RUN, *odd, *out)
    odd = ["--set", "outer_batch_size=30", "--devices", 4]
    assert "has 30 examples, which 4 devices cannot share" in refused(capsys, "run", *RUN, *odd, *out)
    odd = ["--set", "batch_size=33", "--set", "input=stream", "--devices", 4]
    assert "A batch of 33 examples: 4 devices cannot share" in refused(capsys, "run", *RUN, *odd, *out)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("how", ["somewhere", "host:1,2,2", "host:1,2", "host:0,1,0", ":1,2,0", "host,2,0", "h:x,2,0"])
def test_processes_that_cannot_be_found_are_refused(how):
    with pytest.raises(ValueError, match="expected auto, or HOST:PORT,COUNT,INDEX"):
        processes.start(how)


@pytest.mark.slow
def test_a_single_process_with_several_devices_uses_them_all(tmp_path, capsys):
    """As on one host of a TPU slice: `--distributed` means all devices, however many processes there are."""
    process = start(
        "run", *RUN, "--distributed", f"localhost:{free_port()},1,0", "--dry-run", "--out", tmp_path, devices=4
    )
    assert call("run", *RUN, "--dry-run", "--out", tmp_path) == 0
    whole = capsys.readouterr().out
    split, _ = finish(process)
    assert whole != split  # a quarter of the batch on each device


def start_both(*command):
    """Two processes of two devices each, the second first."""
    how = f"localhost:{free_port()},2,"
    two = [start("run", *command, "--distributed", f"{how}{index}", devices=2) for index in (1, 0)]
    return two[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["equal", pytest.param("jtds", marks=pytest.mark.slow)])
def test_two_processes_of_two_devices_give_the_run_of_one(tmp_path, method):
    """Only the first writes logs; both write checkpoints, which one process on one device can resume from."""
    one, out = tmp_path / "one", tmp_path / "run"
    command = ["digits_noise", "--method", method, *tiny(steps=60)]
    both = start_both(*command, "--out", out)
    assert call("run", *command, "--out", one) == 0
    first, second = (finish(process) for process in both)
    assert "Files:" in first[0]
    assert "Files:" not in second[0]
    assert_close_run(one, out)
    assert len((out / "timing.jsonl").read_text().splitlines()) == 1
    assert json.loads((out / "checkpoints.json").read_text()).keys() == {str(step) for step in checkpoints(out)}
    copy_interrupted(out, tmp_path / "half")
    assert call("run", *command, "--out", tmp_path / "half") == 0
    assert_close_run(one, tmp_path / "half")


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(tmp_path):
    out = tmp_path / "run"
    for process in start_both(*RUN, "--out", out):
        finish(process)
    copy_interrupted(out, tmp_path / "half")
    for process in start_both(*RUN, "--out", tmp_path / "half"):
        finish(process)
    for name in ("result.json", "metrics.jsonl", "weights.npz"):
        assert (out / name).read_bytes() == (tmp_path / "half" / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["jtds"], indirect=True)
def test_both_processes_end_where_the_first_cannot_begin(whole, tmp_path):
    command, one, _ = whole
    out = tmp_path / "run"
    shutil.copytree(one, out)
    (out / "result.json").unlink()
    description = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**description, "data_crc32": 1}))
    first, second = start_both(*command, "--out", out)
    messages = [process.communicate(timeout=120)[1] for process in (first, second)]
    assert (first.returncode, second.returncode) == (2, 2)
    assert "data_crc32 is 1 there" in messages[0]
    assert "failed in the first process" in messages[1]


@pytest.mark.slow
def test_when_one_process_is_to_leave_both_save_and_leave(tmp_path):
    """SIGTERM to the second: both save the same step and end with 143; both go on to the end of the whole run."""
    command = ["digits_noise", "--method", "equal", *tiny(steps=1000, checkpoint_every=100)]
    for process in start_both(*command, "--out", tmp_path / "whole"):
        finish(process)
    both = start_both(*command, "--out", tmp_path / "run")
    wait_until(both[1], lambda: checkpoints(tmp_path / "run"))
    both[1].send_signal(signal.SIGTERM)
    messages = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [143, 143], messages
    step = max(checkpoints(tmp_path / "run"))
    assert 100 < step < 1000
    assert all(f"preempted at step {step}, saved" in message for message in messages)
    for process in start_both(*command, "--out", tmp_path / "run"):
        finish(process)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
