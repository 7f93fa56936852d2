"""The results of the benchmarks, and the page that shows them."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import plots  # noqa: E402
from bench._timing import verdict  # noqa: E402


@pytest.mark.parametrize("name", ["overhead", "compiled", "memory", "launches"])
def test_the_page_shows_what_was_measured(name):
    page = (ROOT / "docs" / "performance.md").read_text()
    written = getattr(plots, name)(plots.load(name))
    assert f"<!-- {name} -->\n{written}\n<!-- end of {name} -->" in page


@pytest.mark.parametrize("name", ["overhead", "memory"])
def test_the_pictures_of_the_page_are_there(name):
    assert (ROOT / "docs" / "images" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert f"images/{name}.png" in (ROOT / "docs" / "performance.md").read_text()


def test_a_missed_limit_stands_out():
    assert plots.held(0.5, 0.55) == "0.50 (limit 0.55)"
    assert plots.held(0.56, 0.55) == "**0.56** (limit 0.55: missed)"
    assert plots.held(0.56, None) == "0.56"
    assert verdict(0.56, 0.55) == "0.56, limit 0.55 MISSED"
    assert verdict(0.55, 0.55) == "0.55, limit 0.55 holds"


def test_a_table_without_a_place_on_the_page_raises():
    with pytest.raises(
        ValueError, match=r"^docs/performance\.md has no place for 'x': <!-- x --> \.\.\. <!-- end of x -->$"
    ):
        plots.replace_table("# Page", "x", "| table |")
    assert plots.replace_table("<!-- x -->\nold\n<!-- end of x -->\nrest", "x", "new") == (
        "<!-- x -->\nnew\n<!-- end of x -->\nrest"
    )
