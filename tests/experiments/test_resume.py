"""Killed in the middle and started again, a run ends with the same numbers, to the bit."""

import json
import random
import shutil
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from auxjax.training.checkpoint import open_checkpoints
from tests.experiments.commands import (
    assert_same_run,
    call,
    checkpoints,
    finish,
    read,
    refused,
    start,
    tiny,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("single_precision")
# Long enough that a busy machine does not end a run before the signal reaches it.
JTDS = ["digits_noise", "--method", "jtds", "--seed", "3", "--steps", "4000"]
JTDS += ["--set", "log_every=80", "--set", "checkpoint_every=80", "--set", "hidden=32"]


def final_tree(directory, step):
    """Everything in the last checkpoint: params, optimiser, method, key, best params."""
    with open_checkpoints(directory / "checkpoints") as manager:
        assert manager.latest_step() == step
        found = manager.restore(step, args=ocp.args.Composite(tree=ocp.args.StandardRestore()))["tree"]
    leaves = jax.tree_util.tree_leaves_with_path(found)
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return {
        jax.tree_util.keystr(path): np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        for path, leaf in leaves
    }


@pytest.mark.filterwarnings("ignore:.*[Ss]harding.*")
def test_a_run_killed_at_any_moment_ends_as_if_nothing_had_happened(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start("run", *JTDS, "--out", whole))
    chance = random.Random(0)
    for least, how in ((80, signal.SIGKILL), (160, signal.SIGKILL), (240, signal.SIGINT)):
        process = start("run", *JTDS, "--out", broken)
        wait_until(process, lambda least=least: max(checkpoints(broken), default=0) >= least)
        time.sleep(chance.uniform(0.0, 0.1))
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
        assert not (broken / "result.json").exists()
        if how == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 130
            assert "the same command goes on" in err
            assert "Traceback" not in err
    out, _ = finish(start("run", *JTDS, "--out", broken))
    assert "corrupted AUROC" in out
    assert_same_run(whole, broken)
    one, other = final_tree(whole, 4000), final_tree(broken, 4000)
    assert one.keys() == other.keys()
    assert any("prototype" in name for name in one)
    for name in one:
        assert one[name].tobytes() == other[name].tobytes(), name
    timing = (whole / "timing.jsonl").read_text().splitlines()
    finish(start("run", *JTDS, "--out", whole))
    assert (whole / "timing.jsonl").read_text().splitlines() == timing  # shown again, not trained again


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
    """A run that was stopped after step 40 of 60: its checkpoints are 20 and 40. And the same run, finished."""
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


@pytest.mark.parametrize("part", ["tree/manifest.ocdbt", "tree/_METADATA", "tree/d", "note/metadata"])
def test_a_damaged_checkpoint_is_named_and_without_it_the_run_goes_on(copied, capsys, part):
    command, whole, run = copied
    newest = run / "checkpoints" / "50"  # stands for one that was saved after that of step 40
    shutil.copytree(run / "checkpoints" / "40", newest)
    known = json.loads((run / "checkpoints.json").read_text())
    (run / "checkpoints.json").write_text(json.dumps({**known, "50": known["40"]}))
    path = newest / part if (newest / part).is_file() else next((newest / part).iterdir())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    path.write_bytes(content)
    message = refused(capsys, "run", *command, "--out", run)
    assert f"The checkpoint {newest} is damaged" in message
    assert "Delete that folder to go on from step 40" in message
    shutil.rmtree(newest)
    assert call("run", *command, "--out", run) == 0
    assert_same_run(whole, run)


def test_without_any_good_checkpoint_the_run_starts_again(copied, capsys):
    command, whole, run = copied
    (run / "checkpoints" / "40" / "tree" / "manifest.ocdbt").unlink()
    assert "Delete that folder to start again" in refused(capsys, "run", *command, "--out", run)
    shutil.rmtree(run / "checkpoints" / "40")
    assert call("run", *command, "--out", run) == 0
    assert_same_run(whole, run)


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
