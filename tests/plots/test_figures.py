"""Figures: what they draw, and that hostile names and numbers that are missing do not stop them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xarch_kd.errors import UsageError
from xarch_kd.plots import curves, layer_map, mixing, similarity
from xarch_kd.plots.layer_maps import links
from xarch_kd.plots.measured import Curve, lines
from xarch_kd.plots.style import as_svg
from xarch_kd.plots.training import thinned


def plan(*pairs: tuple[str, int, int, float]) -> dict[str, Any]:
    def layers(replaced: set[int]) -> list[dict[str, Any]]:
        return [
            {"index": index, "mixer": "mamba2" if index in replaced else "attention", "replaced": index in replaced}
            for index in range(4)
        ]

    listed = [
        {"align": name, "student_layer": own, "teacher_layer": other, "weight": weight}
        for name, own, other, weight in pairs
    ]
    return {"teacher": {"layers": layers(set())}, "student": {"layers": layers({2})}, "stages": [{"pairs": listed}]}


def test_layer_map_draws_each_pair_as_pale_as_its_share_of_the_student_layer() -> None:
    data = plan(("a", 0, 0, 0.5), ("a", 1, 1, 0.1), ("a", 1, 3, 0.3), ("b$x$", 2, 2, 1.0))
    assert links(data) == {
        "a": [(0, 0, 1.0), (1, 1, pytest.approx(0.25)), (1, 3, pytest.approx(0.75))],
        "b$x$": [(2, 2, 1.0)],
    }
    (axes,) = layer_map(data).axes
    drawn = [(np.asarray(line.get_ydata()).tolist(), float(line.get_alpha() or 0.0)) for line in axes.lines]
    # From the teacher's block at the left to the student's at the right, half a row below its top.
    assert [ends for ends, _ in drawn] == [[0.5, 0.5], [1.5, 1.5], [3.5, 1.5], [2.5, 2.5]]
    assert drawn[1][1] < drawn[2][1] < drawn[0][1]
    assert len(axes.patches) == 8


def test_mixing_draws_shares_of_each_row_teacher_first() -> None:
    student = torch.tensor([[[[2.0, 0.0], [-1.0, 3.0]], [[1.0, 0.0], [0.0, 1.0]]]])
    teacher = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    figure = mixing({5: student}, {5: teacher, 6: teacher}, heads=[1])
    assert [axes.get_title("left") for axes in figure.axes] == ["teacher 5.0", "student 5.1"]
    figure = mixing({5: student})
    shown = np.ma.filled(np.ma.asarray(figure.axes[0].images[0].get_array()), 0.0)
    assert shown.tolist() == [[1.0, 0.0], [0.25, 0.75]]
    with pytest.raises(UsageError, match="no such head"):
        mixing({5: student}, heads=[2])
    with pytest.raises(UsageError, match="No mixing of this layer"):
        mixing({5: student}, layers=[4])
    with pytest.raises(UsageError, match="no such sequence"):
        mixing({5: student}, sequence=1)


def test_similarity_marks_the_nearest_layer_and_refuses_what_is_no_matrix() -> None:
    axes = similarity([[0.1, 0.9, 0.2], [0.8, 0.1, 0.3]]).axes[0]
    assert np.asarray(axes.lines[0].get_xdata()).tolist() == [1, 0]
    for wrong in ([1.0, 2.0], [[math.nan, 1.0]], np.zeros((0, 2))):
        with pytest.raises(UsageError, match="matrix of finite numbers"):
            similarity(wrong)  # type: ignore[arg-type]  # wrong on purpose


def test_long_curves_are_means_of_neighboring_steps() -> None:
    steps, values = thinned({step: float(step) for step in range(1, 7)}, points=3)
    assert (steps, values) == ([1.5, 3.5, 5.5], [1.5, 3.5, 5.5])
    with pytest.raises(UsageError, match="no steps to draw"):
        curves(Path("nowhere"))


def test_svg_takes_the_colors_of_its_page_and_shows_names_as_text() -> None:
    curve = Curve(
        name="<b>$\\frac</b> שלום \x00", x=[1.0, 10.0], y=[1.0, math.nan], low=[0.0, math.nan], high=[2.0, 3.0]
    )
    svg = as_svg(lines([curve, curve], title="a", x_label="x", log_x=True), name="n", alternative='say "<hi>"')
    assert svg.startswith("<svg viewBox=") and 'role="img" aria-label="say &quot;&lt;hi&gt;&quot;"' in svg
    assert "&lt;b&gt;$\\frac&lt;/b&gt; שלום" in svg and "\x00" not in svg and "<b>" not in svg
    assert "var(--student)" in svg and "#1f6feb" not in svg and "DejaVu" not in svg
