"""Two processes of two devices each, joined by gloo, train as one device does."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import auxjax
from tests.helpers.commands import COMPILED, free_port
from tests.helpers.four_devices import train

ROOT = pathlib.Path(__file__).parents[2]
SHORT = ["equal", "jtds"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [SHORT, pytest.param([name for name in auxjax.methods.names() if name not in SHORT], marks=pytest.mark.slow)],
    ids=["some", "the_others"],
)
def test_two_processes_train_as_one_device(names, tmp_path, ordinary_promotion):
    address, file = f"localhost:{free_port()}", tmp_path / "params.npz"
    command = [sys.executable, "-m", "tests.helpers.one_of_two", address]
    environment = {**COMPILED, **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    two = [
        subprocess.Popen([*command, str(index), str(file), *names], cwd=ROOT, env=environment, **streams)
        for index in (0, 1)
    ]
    alone = {name: train(name, "one")[0].params["w"] for name in names}
    for process in two:
        out, _ = process.communicate(timeout=1500)
        assert process.returncode == 0, out
    with np.load(file) as together:
        assert set(together.files) == set(names)
        for name in names:
            np.testing.assert_allclose(together[name], alone[name], rtol=1e-10, atol=1e-12, err_msg=name)
