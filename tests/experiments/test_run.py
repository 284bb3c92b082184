"""`python -m experiments.run`: what it writes, and that bad input ends before anything is trained."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training import loop, single
from tests.helpers.cifar_files import write_cifar10_archive as write_archive
from tests.helpers.commands import call, checkpoints, read, refused, tiny

pytestmark = pytest.mark.usefixtures("single_precision")


@pytest.fixture(autouse=True)
def steps_done(monkeypatch):
    """Counts the calls of training steps, of which bad input must make none."""
    done = []
    real = single.compiled

    def counting(*arguments):
        program = real(*arguments)

        def counted(state, *batches):
            if not isinstance(state.step, jax.core.Tracer):  # tracing, to check the shapes, computes nothing
                done.append(1)
            return program.step(state, *batches)

        return program._replace(step=counted)

    monkeypatch.setattr(single, "compiled", counting)
    return done


BAD = {
    "unknown method": (["--method", "jtdz"], "There is no method 'jtdz'. Did you mean 'jtds'"),
    "no method but +dev": (["--method", "+dev"], "There is no method ''"),
    "option without a value": (["--method", "equal:reduction"], "expected NAME:OPTION=VALUE"),
    "impossible option": (["--method", "dwa:window=0"], "dwa(window=0"),
    "+dev twice": (["--method", "stl+dev+dev"], "Did you mean 'stl+dev'"),
    "unknown setting": (["--set", "nois=0.2"], "no setting 'nois'. Did you mean noise"),
    "no value": (["--set", "noise"], "expected name=value"),
    "word for a number": (["--set", "noise=much"], "expected a number, such as noise=0.4"),
    "fraction of a unit": (["--set", "hidden=1.5"], "expected a whole number, such as hidden=128"),
    "noise above 1": (["--set", "noise=1.5"], "noise=1.5: expected a finite number of at least 0 and at most 1"),
    "negative noise": (["--set", "noise=-0.1"], "noise=-0.1: expected a finite number of at least 0"),
    "noise NaN": (["--set", "noise=nan"], "noise=nan: expected a finite number"),
    "infinite learning rate": (["--set", "learning_rate=inf"], "learning_rate=inf: expected a finite number"),
    "no dev": (["--set", "dev_size=0"], "dev is empty: dev_size=0"),
    "negative dev": (["--set", "dev_size=-1"], "dev_size=-1: expected"),
    "dev beyond the data": (["--set", "dev_size=1797"], "the sizes exceed the data"),
    "dev mode": (["--set", "dev=none"], "dev='none': expected one of held_out, train"),
    "no units": (["--set", "hidden=0"], "hidden=0: expected a whole number of at least 1"),
    "no steps": (["--steps", "0"], "steps=0: expected a whole number of at least 1"),
    "negative steps": (["--steps", "-5"], "steps=-5: expected"),
    "steps beyond the counter": (["--steps", str(2**31)], "expected a whole number of at least 1 (and below 2^31)"),
    "never logs": (["--set", "log_every=0"], "log_every=0: expected"),
    "unknown task": (["--set", "auxiliary=rotaton"], "unknown task 'rotaton'; known: rotation, decoy"),
    "nothing to weigh": (["--method", "arml", "--set", "auxiliary="], "arml weighs auxiliary tasks"),
    "negative seed": (["--seed", "-1"], "seed -1: expected a whole number from 0"),
    "huge seed": (["--seed", str(2**70)], "expected a whole number from 0 to 2^31 - 1"),
    "data nobody reads": (["--data-dir", "."], "the digits are bundled with scikit-learn"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line_before_training(tmp_path, capsys, steps_done, name):
    arguments, wanted = BAD[name]
    out = tmp_path / "out"
    command = ["digits_noise", "--method", "equal", *tiny(), "--out", out, *arguments]
    assert wanted in refused(capsys, "run", *command)
    assert not out.exists()
    assert not steps_done


def test_an_unknown_config_lists_the_nearest(tmp_path, capsys):
    message = refused(capsys, "run", "digit_noise", "--method", "stl", "--out", tmp_path / "out")
    assert "There is no config 'digit_noise'. Did you mean 'digits_noise'" in message


@pytest.mark.parametrize("arguments", [["--seed", "one"], ["--steps", "1.5"], [], ["--methods", "stl"]])
def test_what_argparse_refuses(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        call("run", "digits_noise", "--out", tmp_path / "out", *(["--method", "stl"] if arguments else []), *arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_help_teaches(capsys):
    for command in ("run", "compare", "report"):
        with pytest.raises(SystemExit) as stop:
            call(command, "--help")
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert f"python -m experiments.{command}" in text
        if command != "report":
            for part in ("cifar10_rotation:", "digits_noise:", "noise=0.4", "hidden=128", "Single-task", "NAME=VALUE"):
                assert part in text, (command, part)


def folder_with_other_files(folder):
    (folder / "letter.txt").write_text("Dear")
    return "holds no run.json, so it is not a run"


def damaged_description(folder):
    (folder / "run.json").write_text('{"config": "dig')
    return "run.json is damaged"


def description_that_is_none(folder):
    (folder / "run.json").write_text("[1]")
    return "run.json holds no JSON object"


@pytest.mark.parametrize("spoil", [folder_with_other_files, damaged_description, description_that_is_none])
def test_a_folder_that_is_no_run(tmp_path, capsys, steps_done, spoil):
    wanted = spoil(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert wanted in refused(capsys, "run", "digits_noise", "--method", "stl", *tiny(), "--out", tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert not steps_done


def test_a_folder_that_cannot_be_made(tmp_path, capsys, steps_done):
    (tmp_path / "file").write_text("")
    command = ["run", "digits_noise", "--method", "stl", *tiny(), "--out"]
    assert "file is a file" in refused(capsys, *command, tmp_path / "file")
    assert "Not a directory" in refused(capsys, *command, tmp_path / "file" / "below")
    assert not steps_done


def test_the_files_of_a_run(tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert call("run", "digits_noise", "--method", "jtds", "--seed", "5", *tiny(steps=50), "--out", out) == 0
    result, log = read(out)
    assert [line["step"] for line in log] == [20, 40, 50]
    assert result["step"] == 50
    assert result["selected_validation_accuracy"] == max(line["validation_accuracy"] for line in log)
    chosen = next(line for line in log if line["validation_accuracy"] == result["selected_validation_accuracy"])
    assert chosen["step"] == result["selected_step"]
    about = json.loads((out / "run.json").read_text())
    assert about["config"] == "digits_noise"
    assert about["method"] == "jtds"
    assert about["seed"] == 5
    assert about["settings"]["hidden"] == 16
    assert about["versions"]["jax"]
    with np.load(out / "weights.npz") as arrays:
        assert arrays["weight/class"].shape == arrays["corrupted"].shape == (897,)
        assert arrays["corrupted"].sum() == round(0.4 * 897)
    assert checkpoints(out) == [40, 50]
    shown = capsys.readouterr().out
    assert f"{100 * result['test_accuracy']:.2f}" in shown
    assert str(out) in shown


def test_another_run_in_the_same_folder_is_refused_with_what_differs(tmp_path, capsys, steps_done):
    command = ["digits_noise", "--method", "equal", *tiny()]
    assert call("run", *command, "--out", tmp_path / "a") == 0
    before = (tmp_path / "a" / "result.json").read_bytes()
    steps_done.clear()
    for other, wanted in (
        (["--steps", "60"], "steps is 40 there and 60 here"),
        (["--seed", "1"], "seed is 0 there and 1 here"),
        (["--method", "stl"], "method is 'equal' there and 'stl' here"),
        (["--set", "noise=0.1"], "noise is 0.4 there and 0.1 here"),
        (["--set", "auxiliary=rotation,decoy"], "auxiliary is ['rotation'] there and ['rotation', 'decoy'] here"),
    ):
        assert wanted in refused(capsys, "run", *command, *other, "--out", tmp_path / "a")
    assert not steps_done
    (tmp_path / "a" / "result.json").write_text("{")
    assert "result.json is damaged" in refused(capsys, "run", *command, "--out", tmp_path / "a")
    (tmp_path / "a" / "result.json").unlink()
    assert call("run", *command, "--out", tmp_path / "a") == 0
    assert (tmp_path / "a" / "result.json").read_bytes() == before
    assert not steps_done


def test_a_run_goes_on_with_the_data_it_began_with_only(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["run", "cifar10_rotation", "--method", "stl", "--out", out, *CIFAR]
    archive = write_archive(tmp_path / "data.npz")
    assert call(*command, "--data-dir", archive) == 0
    (out / "result.json").unlink()
    with np.load(archive) as arrays:
        pixels = arrays["r_test"].copy()
    pixels[0, 0, 0, 0] ^= 1
    write_archive(archive, r_test=pixels)
    assert "data_crc32 is" in refused(capsys, *command, "--data-dir", archive)


CIFAR = ["--steps", "2"]
for assignment in ("inner_steps=2", "channels=4", "batch_size=16", "outer_batch_size=8", "dev_size=20"):
    CIFAR += ["--set", assignment]
CIFAR += ["--set", "validation_size=30"]


def test_cifar10_from_a_truncated_file_or_none(tmp_path, capsys, steps_done):
    command = ["run", "cifar10_rotation", "--method", "stl", "--out", tmp_path / "out", *CIFAR]
    assert "there is no" in refused(capsys, *command, "--data-dir", tmp_path / "nowhere")
    assert "has neither" in refused(capsys, *command, "--data-dir", tmp_path)
    archive = write_archive(tmp_path / "data.npz")
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    assert "is truncated or corrupt" in refused(capsys, *command, "--data-dir", archive)
    assert "channels=4,x: expected whole numbers separated by commas, such as channels=64,64,128,128" in refused(
        capsys, *command, "--set", "channels=4,x", "--data-dir", archive
    )
    assert not (tmp_path / "out").exists()
    assert not steps_done


@pytest.mark.slow
def test_dev_examples_can_be_trained_on(tmp_path):
    sizes = {}
    for method, dev in (("equal+dev", "held_out"), ("jtds", "train")):
        out = tmp_path / f"{method}-{dev}"
        assert call("run", "digits_noise", "--method", method, *tiny(dev=dev, steps=20), "--out", out) == 0
        with np.load(out / "weights.npz") as arrays:
            sizes[method] = arrays["example_id"].size
            assert np.unique(arrays["example_id"]).size == sizes[method]
            assert arrays["corrupted"].sum() == round(0.4 * 897)
    assert sizes == {"equal+dev": 1097, "jtds": 1097}  # and 897 without, see above


def test_a_learning_rate_that_breaks_the_run(tmp_path, capsys):
    command = ["digits_noise", "--method", "equal", "--set", "learning_rate=1e38", "--out", tmp_path / "out"]
    assert call("run", *command, *tiny(inner_steps=1, log_every=10, checkpoint_every=1)) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: ")
    assert "so training stopped" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "result.json").exists()
    assert (tmp_path / "out" / "run.json").exists()


@pytest.fixture
def after_each_step(monkeypatch):
    """Lets a test change the state and metrics that a training step returns."""
    real = single.compiled

    def change_by(change):
        def changing(*arguments):
            program = real(*arguments)

            def changed(state, *batches):
                state, metrics = program.step(state, *batches)
                return (state, metrics) if isinstance(state.step, jax.core.Tracer) else change(state, metrics)

            return program._replace(step=changed)

        monkeypatch.setattr(single, "compiled", changing)

    return change_by


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_params_that_are_not_finite_stop_the_run_though_the_last_loss_was(tmp_path, capsys, after_each_step, value):
    def spoil(state, metrics):
        leaves, structure = jax.tree.flatten(state.params)
        leaves[-1] = leaves[-1].at[..., -1].set(value)
        return state._replace(params=jax.tree.unflatten(structure, leaves)), metrics

    after_each_step(spoil)
    command = ["digits_noise", "--method", "equal", *tiny(steps=10, inner_steps=10), "--out", tmp_path / "out"]
    assert call("run", *command) == 2
    assert "a parameter is not finite at step 10, so training stopped" in capsys.readouterr().err


def test_a_metric_that_is_no_loss_may_be_nan(tmp_path, after_each_step):
    after_each_step(lambda state, metrics: (state, {**metrics, "slope/class": jnp.float32(np.nan)}))
    assert call("run", "digits_noise", "--method", "equal", *tiny(steps=10), "--out", tmp_path / "out") == 0


def test_logs_and_checkpoints_from_before_a_broken_loss_stay(tmp_path, capsys, after_each_step):
    def breaks_at_60(state, metrics):
        return state, {**metrics, "loss/class": jnp.float32(np.nan)} if state.step == 60 else metrics

    after_each_step(breaks_at_60)
    command = ["digits_noise", "--method", "equal", *tiny(steps=80), "--out", tmp_path / "out"]
    assert call("run", *command) == 2
    assert "loss/class is nan at step 60, so training stopped" in capsys.readouterr().err
    log = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [20, 40]
    assert checkpoints(tmp_path / "out") == [20, 40]


def test_control_c_ends_with_a_hint_and_status_130(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save", interrupted)
    assert call("run", "digits_noise", "--method", "stl", *tiny(), "--out", tmp_path / "out") == 130
    assert "stopped: the same command resumes from the newest checkpoint." in capsys.readouterr().err
