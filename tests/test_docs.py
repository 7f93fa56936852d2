"""The set-up that runs the examples of README.md and docs/: cuts across conftest.py and pyproject.toml."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@pytest.fixture
def project(tmp_path):
    """A project with our set-up of pytest and examples that are broken on purpose."""
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    files = {
        "README.md": "```python\n>>> 1 + 1\n3\n\n```\n\n```python\n>>> 1 + 2\n3\n\n```\n",
        "docs/page.md": "```python\nassert False\n```\n\n```python\n>>> 1\n1\n>>> undefined\n\n```\n",
        "torch_pathloss/__init__.py": '"""\n>>> 2 + 2\n5\n"""\n',
        "tests/test_nothing.py": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_an_example_that_is_broken_on_purpose_fails_and_each_example_is_one_test(project):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=project, capture_output=True, text=True
    )
    found = sorted(line.split(" - ")[0] for line in run.stdout.splitlines() if line.startswith("FAILED"))
    assert found == [
        "FAILED README.md::line:2,column:1",
        "FAILED docs/page.md::line:1,column:1",
        "FAILED docs/page.md::line:8,column:1",
        "FAILED torch_pathloss/__init__.py::torch_pathloss",
    ]
    assert "4 failed, 2 passed" in run.stdout
    assert run.returncode == 1


@page
def test_every_fence_is_an_example_that_runs_or_a_shell_command(page):
    fences = re.findall(r"^ *(?:```|~~~)+(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= {"python", "sh"}
    assert set(fences[1::2]) <= {""}
