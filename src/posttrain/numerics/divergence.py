"""Divergences between the policy and a teacher, per token, as functions of log-probs.

Both sides are first mapped onto one set of outcomes: the whole vocabulary, or the teacher's top-k
with all other tokens as one more outcome. Merging outcomes never increases an f-divergence, so
with a top-k every divergence here (all but ULD) is a lower bound of the full one.

Shape legend: ``N`` tokens, ``V`` vocabulary, ``K`` top-k entries, ``W`` outcomes (V, or K + 1).
``s`` is the policy (student) and ``t`` the teacher, as log-probs; exp(s) is π, exp(t) is π_T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.core.statistics import Divergence, DivergenceKind

TINY = 1e-10
"""Lower bound of the teacher's probability of all other tokens: its top-k may sum to 1."""


def divergence(wanted: Divergence, logp_NV: Tensor, ids_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """[N] the divergence at every token.

    Args:
        wanted: which one.
        logp_NV: [N, V] log-probs of the policy.
        ids_NK: [N, K] the teacher's tokens; [N, 0] for the whole vocabulary.
        teacher_NK: [N, K] their log-probs, or [N, V].

    Example:
        >>> p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
        >>> nothing = torch.empty(1, 0, dtype=torch.int64)
        >>> round(float(divergence(Divergence(DivergenceKind.TOTAL_VARIATION), p, nothing, q)), 4)
        0.25
        >>> float(divergence(Divergence(DivergenceKind.FORWARD_KL), p, nothing, p))
        0.0
    """
    if wanted.kind is DivergenceKind.SORTED_L1:
        return sorted_l1(logp_NV, teacher_NK)
    if wanted.temperature != 1:
        logp_NV = (logp_NV / wanted.temperature).log_softmax(-1)
        teacher_NK = (teacher_NK / wanted.temperature).log_softmax(-1)
    s_NW, t_NW = outcomes(logp_NV, ids_NK, teacher_NK)
    c = wanted.coefficient
    match wanted.kind:
        case DivergenceKind.FORWARD_KL:
            return kl(t_NW, s_NW)
        case DivergenceKind.REVERSE_KL:
            return kl(s_NW, t_NW)
        case DivergenceKind.JENSEN_SHANNON:
            return jensen_shannon(s_NW, t_NW, beta=c)
        case DivergenceKind.SKEW_KL:
            return kl(t_NW, mixture(t_NW, s_NW, share=c))
        case DivergenceKind.SKEW_REVERSE_KL:
            return kl(s_NW, mixture(s_NW, t_NW, share=c))
        case DivergenceKind.TOTAL_VARIATION:
            return 0.5 * (s_NW.exp() - t_NW.exp()).abs().sum(-1)


@dataclass(frozen=True, slots=True, eq=False)
class LogitSides:
    """Policy and teacher over the whole vocabulary, for :func:`sloped`.

    ``z`` and ``t`` are their logits, divided by the temperature; ``p`` and ``q`` the softmax of
    these; ``own`` and ``other`` log Σ exp of them.
    """

    z_NV: Tensor
    t_NV: Tensor
    p_NV: Tensor
    q_NV: Tensor
    own_N: Tensor
    other_N: Tensor

    @classmethod
    def of(cls, z_NV: Tensor, t_NV: Tensor, p_NV: Tensor, *, room_NV: Tensor) -> LogitSides:
        """The teacher's probabilities are written to ``room_NV``."""
        q_NV = torch.softmax(t_NV, -1, out=room_NV)
        # From the largest entry: z = log p + log Σ exp z at every one.
        own_N = z_NV.amax(-1) - p_NV.amax(-1).log()
        return cls(z_NV, t_NV, p_NV, q_NV, own_N, t_NV.amax(-1) - q_NV.amax(-1).log())


def sloped(wanted: Divergence, sides: LogitSides, *, out_NV: Tensor, spare_NV: Tensor) -> Tensor:
    """[N] the divergence over the whole vocabulary, with its gradient written to ``out_NV``.

    With g = ∂D / ∂p the gradient by z is p (g − Σ p g). A constant over the vocabulary drops out
    of g, so logits replace log-probs in it.

    Args:
        wanted: which one; not ``SORTED_L1``.
        sides: policy and teacher.
        out_NV: receives the gradient by the policy's logits before the division by τ.
        spare_NV: scratch space, overwritten.
    """
    kind, dot, factor = wanted.kind, torch.linalg.vecdot, 1.0
    if kind is DivergenceKind.JENSEN_SHANNON and wanted.coefficient in (0, 1):
        kind = DivergenceKind.REVERSE_KL if wanted.coefficient else DivergenceKind.FORWARD_KL
    p_NV, q_NV = sides.p_NV, sides.q_NV
    value_N: Tensor
    mean_N: Tensor | None = None
    match kind:
        case DivergenceKind.FORWARD_KL:  # g = −q / p, whose mean is −1: p − q
            torch.sub(sides.t_NV, sides.z_NV, out=out_NV)
            value_N = dot(q_NV, out_NV) - sides.other_N + sides.own_N
            torch.sub(p_NV, q_NV, out=out_NV)
        case DivergenceKind.REVERSE_KL:  # g = s − t
            mean_N = dot(p_NV, torch.sub(sides.z_NV, sides.t_NV, out=out_NV))
            value_N = mean_N - sides.own_N + sides.other_N
        case DivergenceKind.TOTAL_VARIATION:  # g = ½ sign(p − q)
            value_N = 0.5 * torch.linalg.vector_norm(torch.sub(p_NV, q_NV, out=out_NV), 1, -1)
            mean_N, factor = dot(p_NV, out_NV.sign_()), 0.5
        case _:
            value_N, mean_N, factor = _mixed(kind, wanted.coefficient, sides, out_NV, spare_NV)
    if mean_N is not None:
        out_NV.sub_(mean_N[:, None]).mul_(p_NV)
    factor /= wanted.temperature
    if factor != 1:
        out_NV.mul_(factor)
    return value_N


def _mixed(
    kind: DivergenceKind, c: float, sides: LogitSides, out_NV: Tensor, spare_NV: Tensor
) -> tuple[Tensor, Tensor, float]:
    """[N] a divergence from a mixture M, Σ p g [N], and the factor of g, which is in ``out_NV``.

    M = c q + (1−c) p, or (1−c) q + c p for the reverse skew KL.
    """
    dot, z_NV, p_NV, q_NV = torch.linalg.vecdot, sides.z_NV, sides.p_NV, sides.q_NV
    share = 1 - c if kind is DivergenceKind.SKEW_REVERSE_KL else c
    # Where both are 0 in float32, a mixture of 0 would give 0 · log 0 and 0 / 0.
    torch.lerp(p_NV, q_NV, share, out=out_NV).clamp_min_(torch.finfo(torch.float32).tiny)
    log_NV = torch.log(out_NV, out=spare_NV)
    if kind is DivergenceKind.SKEW_KL:  # g = −(1−α) q / M
        value_N = dot(q_NV, sides.t_NV) - dot(q_NV, log_NV) - sides.other_N
        return value_N, dot(p_NV, torch.div(q_NV, out_NV, out=out_NV)), c - 1
    if kind is DivergenceKind.SKEW_REVERSE_KL:  # g = s − log M − α p / M
        torch.sub(z_NV, log_NV, out=spare_NV)
        value_N = dot(p_NV, spare_NV) - sides.own_N
        torch.div(p_NV, out_NV, out=out_NV).mul_(-c).add_(spare_NV)
        return value_N, dot(p_NV, out_NV), 1.0
    # Jensen-Shannon: g = (1−β) (s − log M)
    from_teacher_N = dot(q_NV, sides.t_NV) - dot(q_NV, log_NV) - sides.other_N
    mean_N = dot(p_NV, torch.sub(z_NV, log_NV, out=out_NV))
    return c * from_teacher_N + (1 - c) * (mean_N - sides.own_N), mean_N, 1 - c


def outcomes(logp_NV: Tensor, ids_NK: Tensor, teacher_NK: Tensor) -> tuple[Tensor, Tensor]:
    """([N, W], [N, W]) log-probs of policy and teacher over one set of outcomes."""
    if ids_NK.shape[1] == 0:
        width = teacher_NK.shape[1]
        # The teacher has the first ids only: the policy, given that the token is one of them.
        own_NV = logp_NV if width == logp_NV.shape[1] else logp_NV[:, :width].log_softmax(-1)
        return own_NV, teacher_NK
    seen_NK = logp_NV.gather(-1, ids_NK)
    if ids_NK.shape[1] == logp_NV.shape[1]:
        return seen_NK, teacher_NK
    rest_N = logp_NV.scatter(-1, ids_NK, float("-inf")).logsumexp(-1)
    left_N = (1 - teacher_NK.exp().sum(-1)).clamp_min(TINY).log()
    return torch.cat([seen_NK, rest_N[:, None]], -1), torch.cat([teacher_NK, left_N[:, None]], -1)


def kl(a_NW: Tensor, b_NW: Tensor) -> Tensor:
    """[N] Σ a log(a / b), both as log-probs."""
    return (a_NW.exp() * (a_NW - b_NW)).sum(-1)


def mixture(a_NW: Tensor, b_NW: Tensor, *, share: float) -> Tensor:
    """[N, W] log(share · a + (1 − share) · b), for 0 < share < 1."""
    return torch.logaddexp(a_NW + math.log(share), b_NW + math.log1p(-share))


def jensen_shannon(s_NW: Tensor, t_NW: Tensor, *, beta: float) -> Tensor:
    """[N] β KL(π_T ‖ M) + (1−β) KL(π ‖ M), M = β π_T + (1−β) π (GKD, arXiv 2306.13649).

    It vanishes as β → 0 and β → 1: divided by β it tends to the forward KL, divided by 1−β to the
    reverse KL. At exactly 0 and 1 this is the forward and the reverse KL, as in GKD's code, so
    the scale jumps there.
    """
    if beta == 0:
        return kl(t_NW, s_NW)
    if beta == 1:
        return kl(s_NW, t_NW)
    m_NW = mixture(t_NW, s_NW, share=beta)
    return beta * kl(t_NW, m_NW) + (1 - beta) * kl(s_NW, m_NW)


def sorted_l1(logp_NV: Tensor, sorted_NK: Tensor) -> Tensor:
    """[N] Σ_i |π_(i) − π_T(i)|, both sorted from the largest (ULD, arXiv 2402.12030).

    Token identities are dropped, so the vocabularies may differ. The shorter vector is padded
    with zeros.

    Args:
        logp_NV: [N, V] log-probs of the policy.
        sorted_NK: [N, K] log-probs of the teacher's most likely tokens, in any order.
    """
    own_NV = logp_NV.exp().sort(-1, descending=True).values
    other_NK = sorted_NK.exp().sort(-1, descending=True).values
    width = max(own_NV.shape[1], other_NK.shape[1])
    own_NW = F.pad(own_NV, (0, width - own_NV.shape[1]))
    other_NW = F.pad(other_NK, (0, width - other_NK.shape[1]))
    return (own_NW - other_NW).abs().sum(-1)
