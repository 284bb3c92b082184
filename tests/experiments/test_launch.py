"""`experiments/launch`: the scripts' help, the commands they would run, and, where no cluster is needed, what they do.

gcloud, ssh and Slurm's commands are stood in for by scripts that write down their arguments. What the launch scripts
hand to a shell on another machine is run by a shell here.
"""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "experiments" / "launch"
SCRIPTS = ["tpu_vm.sh", "hosts.sh", "one_host.sh", "slurm.sbatch"]
SLICE = ["--name", "my-tpu", "--zone", "us-west4-a"]
TRAINING = ["digits_noise", "--method", "jtds", "--data-dir", "it's a folder", "--out", "out/x"]
GCLOUD = ["gcloud", "compute", "tpus", "tpu-vm"]

# Writes its name and arguments, each ended by NUL, and one more NUL.
RECORDER = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@"
printf '\\0'
"""
# Stands in for python: shows its arguments and two variables, then works until SIGTERM, or for a minute.
WORKER = """#!/bin/bash
trap 'echo saved; exit 143' TERM
printf '<%s>' "$@"
echo " devices=${JAX_NUM_CPU_DEVICES:-} collectives=${JAX_CPU_COLLECTIVES_IMPLEMENTATION:-}"
for ((i = 0; i < 3000; i++)); do sleep 0.02; done
"""


def call(script, *arguments, **environment):
    """Runs a script from the root, with none of this machine's settings."""
    clean = {name: text for name, text in os.environ.items() if not name.startswith(("SLURM", "TPU_", "HOSTS", "CUDA"))}
    line = ["bash", str(LAUNCH / script), *map(str, arguments)]
    return subprocess.run(
        line, cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def executable(path: pathlib.Path, text: str) -> pathlib.Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def commands(output: str) -> list[list[str]]:
    """What recorders wrote, a list of words per command."""
    assert output == "" or output.endswith("\0\0"), output
    return [record.split("\0") for record in output.split("\0\0")[:-1]]


@pytest.fixture
def recorders(tmp_path):
    """A folder with recorders of everything that a dry run may show."""
    folder = tmp_path / "recorders"
    folder.mkdir()
    for name in ("gcloud", "ssh", "git", "mkdir", "env", "srun"):
        executable(folder / name, RECORDER)
    return folder


@pytest.fixture
def planned(recorders):
    """Runs a script with --dry-run; returns the commands it shows, as a shell reads them."""

    def read(script, *arguments, **environment):
        found = call(script, *arguments, **environment)
        assert found.returncode == 0, found.stderr
        shell = [shutil.which("bash"), "-c", found.stdout]
        again = subprocess.run(shell, env={"PATH": str(recorders)}, capture_output=True, text=True, check=True)
        return commands(again.stdout)

    return read


def wait_until(ready, process=None):
    for _ in range(500):
        if ready():
            return
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("not within 10 s")


@pytest.mark.parametrize("script", ["common.sh", *SCRIPTS])
def test_the_shell_can_read_it(script):
    assert subprocess.run(["bash", "-n", LAUNCH / script], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_setting(script):
    found = call(script, "--help")
    assert (found.returncode, found.stderr) == (0, "")
    text = (LAUNCH / script).read_text()
    settings = set(re.findall(r"^ +(--[a-z-]+)\)", text, re.MULTILINE))
    settings |= set(re.findall(r"\$\{([A-Z]+_[A-Z]+):-", text))
    settings -= {name for name in settings if name.startswith("SLURM_")}  # set by Slurm, not by people
    assert len(settings) >= 2
    for setting in settings:
        assert setting in found.stdout, setting
    assert "docs/launch.md" in found.stdout
    assert "set -euo" not in found.stdout


REFUSED = {
    "no subcommand": (["tpu_vm.sh"], "'' is not a subcommand: expected create"),
    "unknown subcommand": (["tpu_vm.sh", "make"], "'make' is not a subcommand"),
    "no name": (["tpu_vm.sh", "log", "--zone", "z"], "--name NAME or TPU_NAME"),
    "no zone": (["tpu_vm.sh", "log", "--name", "n"], "--zone ZONE or TPU_ZONE"),
    "no value": (["tpu_vm.sh", "log", "--name"], "--name needs a value"),
    "unknown setting": (["tpu_vm.sh", "log", "--nam", "n"], "unknown setting '--nam'"),
    "no type": (["tpu_vm.sh", "create", *SLICE], "--accelerator-type TYPE or TPU_TYPE"),
    "unknown type": (["tpu_vm.sh", "create", *SLICE, "--accelerator-type", "v99-8"], "no --version is known for"),
    "no revision": (["tpu_vm.sh", "setup", *SLICE, "--repository", "u"], "which revision of u?"),
    "no training": (["tpu_vm.sh", "run", *SLICE], "nothing to train"),
    "no out": (["tpu_vm.sh", "run", *SLICE, "--", "digits_noise"], "no --out"),
    "no variable": (["tpu_vm.sh", "run", *SLICE, "--env", "x"], "--env is 'x': expected NAME=VALUE"),
    "no variable's value": (["tpu_vm.sh", "run", *SLICE, "--env"], "--env needs a value"),
    "fetch nothing": (["tpu_vm.sh", "fetch", *SLICE], "--from PATH"),
    "fetch nowhere": (["tpu_vm.sh", "fetch", *SLICE, "--from", "out"], "--to PATH"),
    "delete unasked": (["tpu_vm.sh", "delete", *SLICE], "nothing is deleted"),
    "no hosts": (["hosts.sh", "log"], "--hosts A,B,... or HOSTS"),
    "hosts, no training": (["hosts.sh", "run", "--hosts", "a"], "nothing to train"),
    "port": (["hosts.sh", "log", "--hosts", "a", "--port", "http"], "--port is 'http': expected a whole number"),
    "one host, no training": (["one_host.sh"], "nothing to train"),
    "no devices": (["one_host.sh", "--devices", "0", "--", *TRAINING], "--devices is '0': expected a whole number"),
    "both": (["one_host.sh", "--devices", "2", "--processes", "2", "--", *TRAINING], "say --devices-per-process"),
    "one of both": (["one_host.sh", "--devices-per-process", "2", "--", *TRAINING], "needs --processes"),
    "distributed": (["one_host.sh", "--", *TRAINING, "--distributed", "auto"], "leave --distributed out"),
    "Slurm, no training": (["slurm.sbatch"], "nothing to train"),
    "Slurm, no out": (["slurm.sbatch", "digits_noise"], "no --out"),
    "Slurm, distributed": (["slurm.sbatch", *TRAINING, "--distributed=auto"], "leave --distributed out"),
    "no job": (["slurm.sbatch", *TRAINING], "this is no Slurm job: submit it with sbatch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_is_said_in_one_line(case):
    (script, *arguments), message = REFUSED[case]
    found = call(script, *arguments)
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1
    assert found.stderr.startswith("error: ")
    assert message in found.stderr


def test_processes_and_gpus_of_a_node_must_agree():
    found = call("slurm.sbatch", "--dry-run", *TRAINING, SLURM_NTASKS_PER_NODE="2", SLURM_GPUS_ON_NODE="4")
    assert found.returncode == 2
    assert "2 processes for the 4 GPUs of a node: expected --ntasks-per-node=4 or 1" in found.stderr


@pytest.mark.parametrize(
    ("kind", "software"),
    [("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v6e-8", "v2-alpha-tpuv6e"), ("v4-32", "tpu-ubuntu2204-base")],
)
def test_create(planned, kind, software):
    settings = ["--accelerator-type", kind, "--spot", "--project", "p"]
    (found,) = planned("tpu_vm.sh", "create", *SLICE, *settings, "--dry-run")
    kinds = [f"--accelerator-type={kind}", f"--version={software}", "--spot"]
    assert found == [*GCLOUD, "create", "my-tpu", *kinds, "--zone=us-west4-a", "--project=p"]


def test_setup_copies_the_last_commit(planned):
    archive, copy, install = planned("tpu_vm.sh", "setup", *SLICE, "--bucket", "b", "--jax", "0.10.2", "--dry-run")
    file = archive[-2].removeprefix("--output=")
    assert archive == ["git", "-C", f"{LAUNCH}/../..", "archive", "--format=tar.gz", f"--output={file}", "HEAD"]
    assert copy == [*GCLOUD, "scp", file, "my-tpu:auxjax.tar.gz", "--worker=all", "--zone=us-west4-a"]
    assert install[:-2] == [*GCLOUD, "ssh", "my-tpu", "--worker=all"]
    for part in ("tar -xzf auxjax.tar.gz -C auxjax", "'.[experiments]' 'jax[tpu]==0.10.2'", "0 b bucket"):
        assert part in install[-2]


def test_setup_clones_a_revision(planned):
    settings = ["--repository", "https://example.org/auxjax", "--revision", "v1"]
    (install,) = planned("tpu_vm.sh", "setup", *SLICE, *settings, "--dry-run")
    assert "git clone https://example.org/auxjax auxjax" in install[-2]
    assert "git -C auxjax fetch origin v1" in install[-2]
    assert "gcsfuse" not in install[-2]


def test_other_subcommands_of_a_slice(planned):
    zone = "--zone=us-west4-a"
    plan = [
        (["fetch", "--from", "out/a b", "--to", "here"], ["scp", "--recurse", "my-tpu:auxjax/out/a b", "here"]),
        (["ssh"], ["ssh", "my-tpu"]),
        (
            ["ssh", "--worker", "all", "--dry-run", "--", "ls", "a b"],
            ["ssh", "my-tpu", "--worker=all", "--command=ls 'a b'"],
        ),
        (["delete"], ["delete", "my-tpu", "--quiet"]),
    ]
    for (subcommand, *rest), wanted in plan:
        *_, found = planned("tpu_vm.sh", subcommand, *SLICE, "--dry-run", *rest)
        if subcommand in ("fetch", "ssh") and "--worker=all" not in wanted:
            wanted = [*wanted, "--worker=0"]
        assert found == [*GCLOUD, *wanted, zone]


def test_a_dry_run_shows_what_a_run_does(planned, recorders):
    arguments = ["run", *SLICE, "--env", "A=b c"]
    shown = planned("tpu_vm.sh", *arguments, "--dry-run", "--", *TRAINING)
    done = call("tpu_vm.sh", *arguments, "--", *TRAINING, PATH=f"{recorders}:{os.environ['PATH']}")
    # The recorders stand before the real commands, env among them; the launch script itself calls gcloud alone.
    assert done.returncode == 0, done.stderr
    assert commands(done.stdout) == shown
    assert "--distributed auto >>" in shown[0][-2]


def test_settings_from_the_environment(planned):
    variables = {"TPU_NAME": "other", "TPU_ZONE": "z", "TPU_TYPE": "v3-8"}
    (found,) = planned("tpu_vm.sh", "create", "--dry-run", **variables)
    assert found[5:] == ["other", "--accelerator-type=v3-8", "--version=tpu-ubuntu2204-base", "--zone=z"]


def test_hosts_get_their_index_and_the_first_one_coordinates(planned):
    found = planned("hosts.sh", "run", "--hosts", "me@a, b,c", "--port", "7000", "--dry-run", "--", *TRAINING)
    assert [line[:-1] for line in found] == [["ssh", "-n", "-o", "BatchMode=yes", host] for host in ("me@a", "b", "c")]
    for index, line in enumerate(found):
        assert f"--distributed a:7000,3,{index} >>" in line[-1]


def test_a_run_on_a_host_is_detached_shown_and_stopped(planned, tmp_path):
    worker = executable(tmp_path / "worker", WORKER)
    settings = ["--hosts", "a", "--folder", str(tmp_path), "--python", worker, "--dry-run"]

    def remotely(subcommand, *training):
        ((*_, command),) = planned("hosts.sh", subcommand, *settings, *training)
        return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=10)

    started = remotely("run", "--", *TRAINING)
    assert "started process" in started.stdout, started.stderr
    words = "".join(f"<{word}>" for word in ("-m", "experiments.run", *TRAINING, "--distributed", "a:8476,1,0"))
    wait_until(lambda: words in remotely("log").stdout)
    assert "running" in remotely("log").stdout
    again = remotely("run", "--", *TRAINING)
    assert again.returncode == 1
    assert "a run is going on" in again.stderr
    assert "saves and stops" in remotely("stop").stdout
    wait_until(lambda: "ended" in remotely("log").stdout)
    assert remotely("log").stdout.endswith("saved\n")
    assert "nothing is running" in remotely("stop").stdout


def fake_gpus(tmp_path, *modules):
    """The environment of a host with two GPUs where the modules are installed beside jax."""
    executable(tmp_path / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: A'; echo 'GPU 1: A'\n")
    for module in modules:
        (tmp_path / f"{module}.py").touch()
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": ""}


def test_one_process_takes_all_gpus(planned, tmp_path):
    settings = ["--python", "python3", "--dry-run", "--", *TRAINING]
    host = fake_gpus(tmp_path, "jax_cuda13_plugin")
    run = ["python3", "-m", "experiments.run", *TRAINING, "--devices"]
    (found,) = planned("one_host.sh", *settings, **host)
    assert found == ["env", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9", *run, "2"]
    (found,) = planned("one_host.sh", *settings, **host, CUDA_VISIBLE_DEVICES="1")
    assert found[-1] == "1"
    (found,) = planned("one_host.sh", "--shared", "--devices", "1", *settings, **host)
    assert found == ["env", "XLA_PYTHON_CLIENT_PREALLOCATE=false", *run, "1"]
    (found,) = planned("one_host.sh", "--devices", "3", *settings, **{**host, "JAX_PLATFORMS": "cpu"})
    assert found == ["env", "JAX_NUM_CPU_DEVICES=3", *run, "3"]


def test_gpus_without_a_jax_that_can_use_them(tmp_path):
    found = call("one_host.sh", "--python", "python3 -S", "--dry-run", "--", *TRAINING, **fake_gpus(tmp_path))
    assert found.returncode != 0  # "python3 -S" is no program: a path with spaces stays one word
    python = executable(tmp_path / "bare python", '#!/bin/sh\nexec python3 -S "$@"\n')  # no installed packages
    found = call("one_host.sh", "--python", python, "--dry-run", "--", *TRAINING, **fake_gpus(tmp_path))
    assert found.returncode == 2
    assert "2 GPUs here, but jax for CPU only" in found.stderr


@pytest.fixture
def interruptible():
    """Ctrl-C reaches what the test starts, also where these tests run behind a shell's `&`, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_processes_of_a_host(tmp_path, number):
    worker = executable(tmp_path / "worker", WORKER)
    settings = ["--processes", "2", "--devices-per-process", "3", "--port", "7001", "--python", str(worker)]
    line = ["bash", LAUNCH / "one_host.sh", *settings, "--", *TRAINING]
    first, second = tmp_path / "first", tmp_path / "out" / "launch" / socket.gethostname() / "process-1.log"
    with open(first, "w") as out:
        process = subprocess.Popen(line, cwd=tmp_path, stdout=out, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: all(log.exists() and "devices" in log.read_text() for log in (first, second)), process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    for index, log in enumerate((first, second)):
        text = log.read_text()
        assert f"<--distributed><127.0.0.1:7001,2,{index}> devices=3 collectives=gloo" in text
        assert text.endswith("saved\n")


def test_slurm_starts_one_process_per_task(planned):
    (found,) = planned("slurm.sbatch", "--dry-run", *TRAINING, AUXJAX_PYTHON="my python")
    run = ["my python", "-m", "experiments.run", *TRAINING, "--distributed", "auto"]
    assert found == ["srun", "--kill-on-bad-exit=1", *run]


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("COMPLETING", False)])
def test_a_time_limit_saves_and_requeues(tmp_path, state, requeued):
    folder = tmp_path / "slurm"
    folder.mkdir()
    executable(folder / "srun", f'#!/bin/bash\necho $$ >{tmp_path}/pid\nshift\nexec "$@"\n')
    executable(folder / "scancel", f'#!/bin/bash\n[ "$*" = "--signal=TERM 7" ] && kill -TERM "$(cat {tmp_path}/pid)"\n')
    executable(folder / "squeue", f"#!/bin/bash\necho {state}\n")
    executable(folder / "scontrol", f'#!/bin/bash\necho "$@" >{tmp_path}/scontrol\n')
    worker = executable(tmp_path / "worker", WORKER)
    job = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "1", "AUXJAX_PYTHON": str(worker)}
    environment = {**os.environ, **job, "PATH": f"{folder}:{os.environ['PATH']}"}
    line = ["bash", LAUNCH / "slurm.sbatch", *TRAINING]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT)
    wait_until(lambda: "devices=" in (tmp_path / "log").read_text(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 143
    assert "saved" in (tmp_path / "log").read_text()
    asked = tmp_path / "scontrol"
    assert (asked.read_text() if asked.exists() else None) == ("requeue 7\n" if requeued else None)
