"""An attention bridge: a student's C and B taught by a teacher's queries and keys (CAB, arXiv:2510.19266)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from xarch_kd.errors import UsageError
from xarch_kd.losses.features import LOSSES, FeatureLossKind, Projection, feature_loss
from xarch_kd.mixing import DeltaMixing, LinearMixing, Mixing, SelectiveMixing, SoftmaxMixing, SSDMixing
from xarch_kd.ops import checks
from xarch_kd.ops.dispatch import Impl
from xarch_kd.ops.tables import look_up


class QueriesAndKeys(NamedTuple):
    """Queries and keys of a token-mixing matrix, both [batch, time, heads or groups, dim].

    >>> import torch
    >>> from xarch_kd.losses import QueriesAndKeys
    >>> QueriesAndKeys(query=torch.randn(1, 6, 4, 8), key=torch.randn(1, 6, 2, 8)).key.shape
    torch.Size([1, 6, 2, 8])
    """

    query: Tensor
    key: Tensor


def queries_and_keys(mixing: Mixing) -> QueriesAndKeys:
    """Return queries and keys of a mixing with their graph: C and B of a state-space model.

    They are as the mixer uses them: after a rotation (RoPE), a convolution, a normalisation.

    Raises:
        UsageError: a mixing whose entries are no products of two vectors, as a convolution's.

    >>> import torch
    >>> from xarch_kd.losses import queries_and_keys
    >>> from xarch_kd.mixing import SoftmaxMixing
    >>> mixing = SoftmaxMixing(query=torch.randn(1, 6, 4, 8), key=torch.randn(1, 6, 4, 8), scale=8**-0.5)
    >>> queries_and_keys(mixing).query.shape
    torch.Size([1, 6, 4, 8])
    """
    if isinstance(mixing, SoftmaxMixing | LinearMixing | DeltaMixing):
        return QueriesAndKeys(mixing.query, mixing.key)
    if isinstance(mixing, SSDMixing):
        return QueriesAndKeys(mixing.C, mixing.B)
    if isinstance(mixing, SelectiveMixing):
        # One group without an axis of its own in Mamba-1.
        query, key = (factor if factor.dim() == 4 else factor.unsqueeze(2) for factor in (mixing.C, mixing.B))
        return QueriesAndKeys(query, key)
    raise UsageError(
        "This mixer has neither queries and keys nor C and B.",
        found=mixing.kind,
        allowed="softmax | linear | delta | ssd | selective",
    )


def bridge_dims(student: QueriesAndKeys, teacher: QueriesAndKeys) -> dict[str, tuple[int, int]]:
    """Return (student dim, teacher dim), of all heads together, of the maps `query` and `key` of a bridge.

    >>> import torch
    >>> from xarch_kd.losses import QueriesAndKeys, bridge_dims
    >>> both = QueriesAndKeys(query=torch.randn(1, 6, 4, 8), key=torch.randn(1, 6, 4, 8))
    >>> bridge_dims(both, both)
    {'query': (32, 32), 'key': (32, 32)}
    """
    return {
        name: (own.shape[2:].numel(), target.shape[2:].numel())
        for name, own, target in zip(QueriesAndKeys._fields, student, teacher, strict=True)
    }


def attention_bridge(
    student: QueriesAndKeys,
    teacher: QueriesAndKeys,
    *,
    normalizer: Tensor | float,
    query_map: Projection | None = None,
    key_map: Projection | None = None,
    mask: Tensor | None = None,
    kind: FeatureLossKind = "normalised_mse",
    epsilon: float = 1e-6,
    delta: float = 1.0,
    impl: Impl | str = "auto",
) -> Tensor:
    """Return this micro-batch's share of the mean of two feature losses: of queries and of keys, heads side by side.

    `query_map` and `key_map` take the student's dimension (`bridge_dims`) to the teacher's. They are held outside and
    must train with the student; None where the dimensions are equal. `kind` is one of the feature losses that are means
    over tokens, `normalizer` the number of tokens of the whole step.

    Invariant to what the maps can undo, for linear ones any invertible linear map of all heads together, and to nothing
    else that its `kind` sees; blinded by what blinds its `kind`, and by maps that are too free: they can learn the
    teacher by themselves where the student's C and B merely distinguish tokens. Queries and keys after a rotation
    (RoPE) require a student without positions to reproduce positions; take the teacher's before it where you can.

    Raises:
        UsageError: shapes that do not fit, or `relative_mse`, whose divisor would be one for queries and one for keys.
        NonFiniteLoss: a feature of a valid token is NaN or infinite.

    >>> import torch
    >>> from xarch_kd.losses import QueriesAndKeys, attention_bridge
    >>> both = QueriesAndKeys(query=torch.randn(1, 6, 4, 8), key=torch.randn(1, 6, 4, 8))
    >>> attention_bridge(both, both, normalizer=6.0)
    tensor(0.)
    """
    checks.refuse_swapped_sides(student, teacher)
    if look_up("feature loss", kind, LOSSES).over_teacher_energy:
        raise UsageError(
            "A bridge has two distances and one normalizer, the number of tokens.",
            asked=kind,
            allowed="a mean over tokens, e.g. normalised_mse",
        )
    query, key = (
        feature_loss(
            kind,
            own.flatten(2),
            target.detach().flatten(2),
            normalizer=normalizer,
            mask=mask,
            projector=projector,
            epsilon=epsilon,
            delta=delta,
            impl=impl,
        )
        for own, target, projector in zip(student, teacher, (query_map, key_map), strict=True)
    )
    return (query + key) / 2
