"""The page on the scheduling core shows what the core does."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib draws the pictures: install '.[dev]'")

DOCS = Path(__file__).parents[2] / "docs"
MOST_BYTES = 150_000


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with new pictures, and the page with new tables."""
    folder = tmp_path_factory.mktemp("figures")
    page = Path(shutil.copy(DOCS / "scheduling.md", folder))
    script = [sys.executable, DOCS / "figures" / "make.py", "--folder", folder, "--page", page]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_page_shows_every_picture_with_a_description(drawn):
    shown = re.findall(r"!\[([^\]]*)\]\(figures/([^)]*)\)", (DOCS / "scheduling.md").read_text())
    assert all(len(description) > 40 for description, _ in shown)
    names = sorted(name for _, name in shown)
    assert names == sorted(path.name for path in drawn.glob("*.svg"))
    assert names == sorted(path.name for path in (DOCS / "figures").glob("*.svg"))


def test_pictures_are_small_and_carry_no_date(drawn):
    for path in drawn.glob("*.svg"):
        assert path.stat().st_size < MOST_BYTES, path.name
        assert "dc:date" not in path.read_text(), path.name


def test_the_tables_are_what_the_core_works_out(drawn):
    page = (DOCS / "scheduling.md").read_text()
    assert (drawn / "scheduling.md").read_text() == page, "run: python docs/figures/make.py"
