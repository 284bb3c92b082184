"""The package as a whole: what importing it costs, and what its public names are."""

import importlib
import json
import pathlib
import subprocess
import sys

import pytest

import auxjax

ROOT = pathlib.Path(__file__).parent.parent
FIXED_NAMES = """
    weighted_loss langevin_step add_langevin_noise fisher_divergence score_matching_gradient project_simplex
    BilevelProblem HypergradInfo SolveInfo implicit one_step finite_difference unrolled
    Solver Estimator Curvature LossFunction
    gauss_newton fisher optimizer_field optimizer_fixed_point OptimizerPoint
    Amortised amortise warm_started single_loop
    neumann cg normal_cg gmres bicgstab minres nystrom dense identity
    TaskLosses TaskModel Method Generator Policy methods make_step task_weights TrainState
    accumulate mixed_precision remat
""".split()
HEAVY = "jaxopt tensorflow tensorflow_datasets flax orbax matplotlib sklearn experiments".split()


def test_import_loads_no_heavy_dependency():
    code = "import auxjax, sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    for heavy in HEAVY:
        assert heavy not in loaded


def test_public_names_are_there_and_documented():
    for name in FIXED_NAMES:
        assert getattr(auxjax, name).__doc__, name


def test_wheel_metadata_comes_from_the_requirements_file():
    requirements = (ROOT / "requirements.txt").read_text().split()
    for package in ("jax", "flax", "optax", "jaxopt", "tensorflow-datasets", "chex", "orbax-checkpoint"):
        assert any(line.startswith(f"{package}>=") for line in requirements), package
    assert "install_requires = file: requirements.txt" in (ROOT / "setup.cfg").read_text()


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "auxjax/formulas").glob("[a-z]*.py")))
def test_formulas_keep_their_old_names(name):
    old, new = (importlib.import_module(f"auxjax.{place}{name}") for place in ("", "formulas."))
    assert old is new
