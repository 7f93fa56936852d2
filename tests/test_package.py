"""The package as it is installed: what importing it costs, and what its wheel holds."""

import email
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent

IMPORTS = """
import sys, torch
before = {name.partition(".")[0] for name in sys.modules}
import torch_pathloss, torch_pathloss.schedules, torch_pathloss.weighting
after = {name.partition(".")[0] for name in sys.modules}
print(*sorted(after - before - sys.stdlib_module_names))
print("torch._dynamo" in sys.modules)
"""


def test_importing_it_imports_torch_and_optree_and_nothing_else():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    imported, has_dynamo = done.stdout.splitlines()
    assert set(imported.split()) <= {"optree", "torch_pathloss", "typing_extensions"}  # optree needs the last
    assert has_dynamo == "False"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy, so that nothing is left in the checkout."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "torch_pathloss", copy / "torch_pathloss", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*command, str(copy)], check=True)
    (path,) = out.iterdir()
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_says_that_it_is_typed(wheel):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "torch_pathloss").rglob("*.py")}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == {*modules, "torch_pathloss/py.typed"}


@pytest.mark.slow
def test_the_wheel_requires_torch_and_optree_only(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    requirements = email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist")
    assert sorted(r for r in requirements if "extra ==" not in r) == ["optree>=0.13", "torch>=2.11"]
