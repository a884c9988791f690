"""A figure in its forms: themed in the page, plain in files, the same bytes each time."""

import pandas as pd
import pytest

from lmms_keyspace.reports import figures, theme

HOSTILE = "<script>$x^2$ #4c5661; & \u202e"


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {"run": [HOSTILE, "b"], "label": ["x", "x"], "value": [1.0, 2.0], "ci_low": [0.5, 1.5], "ci_high": [1.5, 2.5]}
    )


def draw(frame) -> figures.Drawing:
    return figures.by_run(frame, printed=["1.0", "2.0"], xlabel=HOSTILE, title=HOSTILE)


def test_the_page_gets_variables_and_escaped_text(frame):
    svg = draw(frame).inline()
    assert svg.startswith("<svg viewBox=")
    assert 'role="img"' in svg
    assert "<script" not in svg
    assert "$x^2$ #4c5661;" in svg  # text that looks like a color stays text
    assert {"var(--ink)", "var(--series-0)", "var(--series-1)"} <= set(pd.Series(svg).str.findall(r"var\([^)]*\)")[0])
    style = " ".join(pd.Series(svg).str.findall(r'style="([^"]*)"')[0])
    assert not any(color in style for color in theme.LIGHT.values())


def test_files_are_equal_each_time_and_hold_their_colors(frame, tmp_path):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        names = [path.name for path in draw(frame).save(tmp_path / folder / "figure")]
    assert names == ["figure.svg", "figure.png", "figure.pdf"]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert theme.LIGHT["series-1"] in (tmp_path / "first" / "figure.svg").read_text()


def test_colors_of_the_theme_can_be_told_apart_in_a_figure():
    assert len(set(theme.LIGHT.values())) == len(theme.LIGHT)
    assert theme.LIGHT.keys() == theme.DARK.keys()
    assert len(theme.MARKERS) == len(theme.SYMBOLS) == theme.N_SERIES


def test_a_heat_map_has_a_square_for_every_head_and_none_is_denser_than_the_highest():
    table = pd.DataFrame({"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "value": [-0.1, 0.1, 0.2, 0.4]})
    svg = figures.heat_map(table, highest=0.4, printed="0.4000", xlabel="KV head", title="heads").inline()
    opacity = pd.Series(svg).str.findall(r"fill: var\(--series-1\); (?:fill-opacity|opacity): ([\d.]+)")[0]
    assert "0.4000" in svg
    assert {"0.25", "0.5"} <= set(opacity)
