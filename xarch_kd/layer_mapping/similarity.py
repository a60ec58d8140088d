"""Layer maps from the similarity of all student and teacher layers, e.g. from `ops.LayerSimilarity`."""

from __future__ import annotations

import math

import numpy
import torch
from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.layer_mapping.counts import check_placeable
from xarch_kd.layer_mapping.layer_map import LayerMap, check_depths


def cka(similarity: Tensor) -> LayerMap:
    """Map each student layer to the most similar teacher layer, ties to the first.

    `similarity` is [student layers, teacher layers]. The map need not be monotone, and several student layers may
    share a teacher layer: check `text_plot` and `collapsed`.

    Raises UsageError for a matrix that is empty or not finite.
    """
    found = checked_matrix("cka", similarity)
    return LayerMap.from_targets("cka", found.argmax(1).tolist(), found.shape[1])


def monotone(
    similarity: Tensor, *, strict: bool = True, band: float | None = None, last_to_last: bool = True
) -> LayerMap:
    """Return the monotone map of greatest total similarity, by dynamic programming.

    V_i(j) = similarity[i, j] + max_{k < j} V_{i-1}(k) if `strict`, which uses no teacher layer twice; k <= j
    otherwise. `band` w restricts layer i to teacher layers with |(j + 1) - (i + 1) T/S| <= w (Sakoe and Chiba 1978).
    `last_to_last` pairs the two last layers, which a loss on logits needs. `similarity` is [student layers, teacher
    layers].

    Raises UsageError for a matrix that is empty or not finite, for `strict` with S > T, and for a band without a map.
    """
    gains = checked_matrix("monotone", similarity)
    students, teachers = gains.shape
    if strict:
        check_placeable("monotone", students, teachers, fix="strict: false, which may use a teacher layer again")
    best = _best_totals(_banded(gains, band), strict)
    layer = teachers - 1 if last_to_last else int(best[-1].argmax())
    if best[-1, layer] == -math.inf:
        raise UsageError(
            "layers: monotone has no map within the band",
            asked=f"band: {band}",
            found=f"{students} student layers, {teachers} teacher layers",
            fix="a wider band: one of 1 or more always leaves a map",
        )
    targets = [layer]
    for totals in best[-2::-1]:
        layer = int(totals[: layer if strict else layer + 1].argmax())
        targets.append(layer)
    return LayerMap.from_targets("monotone", targets[::-1], teachers)


def checked_matrix(strategy: str, matrix: Tensor) -> numpy.ndarray:
    """Return `matrix` [student layers, teacher layers] in float64.

    Raises UsageError unless it has two axes, none empty, and finite entries.
    """
    if matrix.dim() != 2:
        raise UsageError(
            f"layers: {strategy} reads a matrix of layers",
            found=list(matrix.shape),
            allowed="[student layers, teacher layers]",
        )
    check_depths(strategy, *matrix.shape)
    found = matrix.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(found).all()):
        layer, other = torch.isfinite(found).logical_not().nonzero()[0].tolist()
        raise UsageError(
            f"layers: {strategy} reads a similarity that is not finite",
            found=f"{found[layer, other].item()} of student layer {layer} and teacher layer {other}",
            fix="check the features of these layers",
        )
    return found.numpy()


def _banded(gains: numpy.ndarray, band: float | None) -> numpy.ndarray:
    """Return `gains` with -inf outside the band."""
    if band is None:
        return gains
    if not band >= 0:
        raise UsageError("layers: the band of monotone is a number of teacher layers", found=band, allowed=">= 0")
    students, teachers = gains.shape
    own, other = numpy.arange(1, students + 1)[:, None], numpy.arange(1, teachers + 1)[None]
    return numpy.where(numpy.abs(other * students - own * teachers) <= band * students, gains, -math.inf)


def _best_totals(gains: numpy.ndarray, strict: bool) -> numpy.ndarray:
    """Return V_i(j), the greatest total of layers 0 to i if i is mapped to j; -inf if there is no such map."""
    best = numpy.empty_like(gains)
    best[0] = gains[0]
    for layer in range(1, len(gains)):
        before = numpy.maximum.accumulate(best[layer - 1])
        if strict:
            before = numpy.concatenate(([-math.inf], before[:-1]))
        best[layer] = gains[layer] + before
    return best
