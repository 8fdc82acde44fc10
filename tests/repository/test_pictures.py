"""docs/pictures/draw.py makes every picture that a page shows, from facts; and the facts are those of the options."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import script

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = DOCS / "pictures"
pytest.importorskip("matplotlib", reason="pictures need the extra `plot`: matplotlib")

pytestmark = pytest.mark.usefixtures("as_users_have_jax")


@pytest.fixture(scope="module")
def draw():
    return script(PICTURES / "draw.py")


@pytest.fixture(scope="module")
def shown():
    """Every picture that a page shows, and its alternative text."""
    found = {}
    for page in DOCS.rglob("*.md"):
        for text, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            found[(page.parent / target).resolve()] = text
    return found


def test_pictures_are_there_and_say_what_they_show(shown):
    assert shown
    for file, text in shown.items():
        assert file.is_file(), file
        assert len(text.split()) > 5, file


def test_no_picture_is_left_over(shown):
    assert {p for p in PICTURES.rglob("*") if p.suffix in (".svg", ".png")} <= shown.keys()


def test_pictures_are_small(shown):
    assert max(file.stat().st_size for file in shown) < 150_000


def test_drawn(draw, tmp_path):
    """All that are committed, and with as many squares, bars and lines: a fact that changed would change these."""
    draw.main(tmp_path)
    drawn = {p.name for p in tmp_path.glob("*.svg")}
    assert drawn == {p.name for p in PICTURES.glob("*.svg")}
    for name in drawn:
        new, old = ((folder / name).read_text(encoding="utf-8") for folder in (tmp_path, PICTURES))
        ElementTree.fromstring(new)
        assert new.count("clip-path=") == old.count("clip-path="), f"{name}: run docs/pictures/draw.py again"
        assert "<dc:date>" not in new


def test_influence_ends_where_the_options_say(draw):
    t, s = np.mgrid[: draw.T, : draw.T]
    for k in (None, 4, (3, 6)):
        k1, k2 = (draw.T, draw.T) if k is None else (k, k) if isinstance(k, int) else k
        first = (t // k1 + 1) * k1 - k2  # the earliest step that output t reaches back to
        assert ((draw.influence(truncation=k) > 0) == ((s <= t) & (s >= first))).all()
