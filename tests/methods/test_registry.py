"""The registry of methods, and the table of docs/methods.md that repeats its facts."""

import pathlib
import re

import pytest

from auxjax import methods
from auxjax.methods import _registry

ROOT = pathlib.Path(__file__).parents[2]
ROW = r"^\| `(\w+)`[^|]*\| ([^|]+) \|[^|]*\|[^|]*\| ([^|]+) \|([^|]*)\|$"


def test_every_file_of_a_method_registers_one_of_its_name():
    files = {path.stem[1:] for path in (ROOT / "auxjax/methods").glob("_[a-z]*.py")} - {"registry"}
    assert set(methods.names()) == files
    assert all(methods.info(name).function is getattr(methods, name) for name in files)


def test_the_table_of_the_documentation_says_what_the_registry_says():
    table = (ROOT / "docs/methods.md").read_text().split("\n## ")[0]
    rows = re.findall(ROW, table, flags=re.MULTILINE)
    assert sorted(name for name, *_ in rows) == methods.names()
    for name, family, outer_batch, needs in rows:
        about = methods.info(name)
        words = set(re.findall(r"`(\w+)`", needs)) | (set() if outer_batch == "no" else {"outer_batch"})
        assert (name, family, words) == (name, about.family, about.needs)
    explained = re.findall(r"^- `(\w+)`: (.*)$", table, flags=re.MULTILINE)
    assert [word for word, _ in explained] == [word for word in _registry.NEEDS if word != "outer_batch"]


def test_facts_of_a_method():
    about = methods.info("n_jtds")
    assert about.required == ("num_examples", "ids")
    assert "outer_optimizer" in about.options
    assert about.reference.startswith("Chen, Wang, Guan, Liu, Zhu, 2022, Auxiliary Learning")
    assert about.reference.endswith("(the variant without a parametric scheduler).")
    assert methods.info("stl").reference == ""


@pytest.mark.parametrize(
    ("find", "message"),
    [
        (lambda: methods.get("gradnrom"), "Did you mean 'gradnorm'"),
        (lambda: methods.info("gradnrom"), "Known methods: adaloss, arml"),
        (lambda: methods.get("equal", weight=1.0), "no option 'weight'. Its options: auxiliary_weight, reduction"),
        (lambda: methods.get("stl", weight=1.0), "Its options: none"),
        (lambda: methods.get("fixed_weights"), "needs the option 'weights'"),
        (lambda: methods.register("heuristics"), "family='heuristics'.*'gradients'"),
        (lambda: methods.register("gradients", needs={"labels"}), r"needs=\['labels'\].*'label_losses'"),
    ],
)
def test_errors(find, message):
    with pytest.raises(ValueError, match=message):
        find()


def test_two_methods_of_one_name_are_refused():
    def equal():
        return methods.stl()

    with pytest.raises(ValueError, match=r"a method 'equal' already, in auxjax\.methods\._equal"):
        methods.register("control")(equal)
    assert methods.info("equal").function is methods.equal
