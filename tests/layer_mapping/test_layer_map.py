from __future__ import annotations

import pytest
import torch

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping import LayerMap, explicit, similarity_text_plot
from xarch_kd.layer_mapping.counts import all_to_one, block_average, random, reverse, uniform


def test_weights_are_float64_and_ones_own_copy() -> None:
    for dtype in (torch.float32, torch.float64):
        given = torch.tensor([[0.25, 0.75], [0.0, 0.0]], dtype=dtype, requires_grad=True)
        layer_map = LayerMap("given", given)
        assert layer_map.weights.dtype == torch.float64 and not layer_map.weights.requires_grad
        with torch.no_grad():
            given[0, 0] = 9
        assert layer_map.pairs() == ((0, 0, 0.25), (0, 1, 0.75))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[0.5, 0.4]], "rows that sum to 0.9"),
        ([[1.5, -0.5]], "non-negative"),
        ([[float("nan"), 1.0]], "rows that sum to nan"),
        ([[float("inf"), 0.0]], "rows that sum to inf"),
        ([1.0], "at least one layer"),
        ([[], []], "at least one layer"),
    ],
)
def test_what_is_no_map_is_refused(weights: list[list[float]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LayerMap("given", torch.tensor(weights, dtype=torch.float64))


def test_a_text_plot_of_a_small_map() -> None:
    layer_map = explicit([(0, 0), (1, 1), (1, 2), (2, 2, 1.0), (2, 3, 3.0), (2, 5, 6.0)], 4, 7)
    assert layer_map.text_plot().splitlines() == [
        "explicit: student layers down, teacher layers across",
        "   0    5",
        " 0 █······",
        " 1 ·▒▒····",
        " 2 ··░▒·▓·",
        " 3 ·······",
    ]


def test_shades_do_not_show_rounding() -> None:
    weights = torch.tensor(
        [[0.25 + 1e-12, 0.25, 0.5 - 1e-12, 0.0], [1e-10, 0.75 + 1e-12, 0.0, 0.25 - 1e-10]], dtype=torch.float64
    )
    rows = LayerMap("given", weights).text_plot().splitlines()[2:]
    assert rows == [" 0 ░░▒·", " 1 ·▓·░"]


def test_three_thirds_in_one_column_are_a_whole() -> None:
    layer_map = block_average(100, 300)
    assert (
        layer_map.text_plot().splitlines()[0]
        == "block_average: student layers down, teacher layers across, 4 to a column"
    )
    # Layers 0 to 2 are in the first column; 3 to 5 begin there.
    rows = layer_map.text_plot().splitlines()[2:]
    assert rows[0].startswith(" 0 █··") and rows[1].startswith(" 1 ▒▓··") and rows[99].endswith("█")


@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (12, 76), (12, 77), (12, 78), (120, 1000), (3, 12345)])
def test_a_text_plot_fits_80_columns_and_shows_every_student_layer(student: int, teacher: int) -> None:
    lines = uniform(student, teacher).text_plot().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == student + 2
    assert all(line.count("█") == 1 for line in lines[2:])
    assert lines[-1].endswith("█")


def test_a_ruler_says_where_columns_start() -> None:
    ruler = uniform(2, 200).text_plot().splitlines()[1]
    # 77 columns are free, so 3 layers share one: 67 columns, and the fifth starts at layer 15.
    assert ruler.split() == [str(15 * step) for step in range(14)]
    assert ruler.index("15") == 3 + 5 and ruler.index("150") == 3 + 50


@pytest.mark.parametrize(
    "layer_map",
    [
        uniform(6, 12),
        uniform(12, 2),
        reverse(6, 12),
        random(6, 12),
        block_average(6, 12),
        uniform(1, 12),
        explicit([(0, 3)], 6, 12),
        all_to_one(4, 1),
    ],
    ids=lambda layer_map: layer_map.strategy,
)
def test_maps_that_spread_have_not_collapsed(layer_map: LayerMap) -> None:
    assert layer_map.collapsed() is None


def test_a_collapse_is_told() -> None:
    assert all_to_one(6, 12).collapsed() == (
        "the layer map collapsed: 6 student layers learn from 1.0 teacher layers (up to 6 are possible), "
        "100% from layer 11"
    )


def test_where_a_collapse_begins() -> None:
    # Of 5 layers, fewer than 1 + 4/4 = 2 in use: exp(entropy) of (0.5, 0.5) is 2, of (0.6, 0.4) 1.96.
    rows = [[1.0, 0.0, 0.0, 0.0, 0.0]] * 2 + [[0.0, 1.0, 0.0, 0.0, 0.0]] * 2
    even = torch.tensor([*rows, [0.5, 0.5, 0.0, 0.0, 0.0]], dtype=torch.float64)
    # A trace on a third layer keeps the rounding of exactly 2 out of the comparison.
    even[4] = torch.tensor([0.5 - 1e-6, 0.5 - 1e-6, 2e-6, 0.0, 0.0])
    assert LayerMap("learned", even / even.sum(1, keepdim=True)).collapsed() is None
    uneven = torch.tensor([*rows, [1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    found = LayerMap("learned", uneven).collapsed()
    assert found is not None and "2.0 teacher layers" in found and "60% from layer 0" in found


def test_unmatched_layers_do_not_count_as_collapsed() -> None:
    assert explicit([(0, 3), (5, 3)], 6, 12).collapsed() is not None
    assert explicit([(0, 3), (5, 9)], 6, 12).collapsed() is None


def test_a_similarity_is_drawn_with_the_best_of_each_row() -> None:
    matrix = torch.tensor([[0.1, 0.5, 0.9], [0.9, 0.3, 0.1]])
    assert similarity_text_plot("seen", matrix).splitlines() == [
        "seen, 0.10 · to 0.90 █: student layers down, teacher layers across",
        "   0",
        " 0 ·▒█   0.90 at 2",
        " 1 █░·   0.90 at 0",
    ]


@pytest.mark.parametrize("teacher", [1, 60, 64, 80, 300])
def test_a_similarity_fits_80_columns(teacher: int) -> None:
    matrix = torch.rand(12, teacher, generator=torch.Generator().manual_seed(0))
    lines = similarity_text_plot("seen", matrix).splitlines()
    assert len(lines) == 14
    assert max(len(line) for line in lines[1:]) <= 80
    # A layer that shares its column shows as the greatest there.
    assert all("█" in line for line, row in zip(lines[2:], matrix, strict=True) if row.max() == matrix.max())


def test_a_similarity_without_a_spread_is_drawn() -> None:
    assert " 0 ··   0.50 at 0" in similarity_text_plot("flat", torch.full((1, 2), 0.5))
