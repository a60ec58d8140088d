"""Tables of formulas are complete: a name without a formula is an error when the table is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import pytest
import torch

from xarch_kd.errors import UsageError, XarchError
from xarch_kd.losses import features
from xarch_kd.ops import divergences, feature_distances, row_distances
from xarch_kd.ops.dispatch import interpreted
from xarch_kd.ops.tables import look_up, table


class Row(NamedTuple):
    name: str


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["mse"], "log_cosh without a formula"),
        (["mse", "log_cosh", "l2"], "l2 without a name"),
        (["mse", "log_cosh", "mse"], "mse with two formulas"),
    ],
)
def test_an_incomplete_table_is_refused(names: list[str], words: str) -> None:
    with pytest.raises(XarchError, match=f"table of distances is incomplete(.|\n)*{words}"):
        table("distances", Literal["mse", "log_cosh"], map(Row, names))


def test_a_complete_table_has_the_order_of_its_names() -> None:
    rows = table("distances", Literal["mse", "log_cosh"], map(Row, ["log_cosh", "mse"]))
    assert list(rows) == ["mse", "log_cosh"]
    assert look_up("distance", "mse", rows) == Row("mse")
    with pytest.raises(UsageError, match="Did you mean 'log_cosh'"):
        look_up("distance", "logcosh", rows)


TABLES: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "divergences": (divergences.DivergenceKind, divergences.FORMULAS),
    "feature distances": (feature_distances.FeatureDistanceName, feature_distances.FORMULAS),
    "mixing distances": (row_distances.MixingDistanceName, row_distances.FORMULAS),
    "feature losses": (features.FeatureLossKind, features.LOSSES),
}


@pytest.mark.parametrize("what", TABLES)
def test_a_name_added_to_an_operation_needs_a_formula(what: str) -> None:
    names, rows = TABLES[what]
    assert tuple(rows) == get_args(names)
    with pytest.raises(XarchError, match=rf"table of {what} is incomplete(.|\n)*hellinger without a formula"):
        table(what, Literal[(*get_args(names), "hellinger")], rows.values())  # pyright: ignore[reportInvalidTypeForm]


def test_tables_and_kernels_name_the_same_formulas() -> None:
    from xarch_kd.kernels import linear_divergence, projected_distance

    assert {row.kernel for row in divergences.FORMULAS.values()} - {None} == set(linear_divergence.KINDS)
    assert {row.kernel for row in feature_distances.FORMULAS.values()} == set(projected_distance.KINDS)


def test_a_kernel_computes_no_formula_that_it_does_not_know() -> None:
    from xarch_kd.kernels import linear_divergence, projected_distance

    device = "cpu" if interpreted() else "cuda"
    rows = torch.ones(2, 64, device=device)
    with pytest.raises(Exception, match="unknown KIND of distance"):
        projected_distance.distance_rows(rows, rows.clone(), None, None, "log_cosh", 1e-6, torch.float32)
    numbers = (0.5, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0)
    with pytest.raises(Exception, match="unknown KIND of divergence"):
        linear_divergence.divergence_rows(
            rows, rows.clone(), rows[:, 0].contiguous(), None, None, None, 64, "hellinger", *numbers, None
        )
