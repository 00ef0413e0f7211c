"""Statistics of a linear head, with a hand-written gradient.

One matrix product gives a chunk's logits z; all statistics are computed while z is in the cache:

    log-prob of y      dlog p_y / dz = (1[y] − p) / τ
    entropy H          dH / dz       = −p (log p + H)
    a divergence D     dD / dz       = p (g − Σ p g) / τ,  g = ∂D / ∂p      (``divergence.sloped``)

For the backward pass p is saved for the first two, and dD / dz for each divergence; or nothing is
saved, and the products are computed again.

Shape legend: ``N`` trained tokens, ``n`` those of a chunk, ``X`` hidden size, ``V`` vocabulary,
``D`` divisors of the logits (temperatures of sampling), ``J`` divergences, ``R`` scratch buffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.core.statistics import Divergence
from posttrain.numerics.divergence import LogitSides, sloped
from posttrain.numerics.logits import LinearHead, Teachers, chunk_rows, chunks
from posttrain.numerics.matmul import by_onednn, product, weight_gradient

KEEP_ELEMENTS = 2**25
"""Up to this many elements (128 MiB in float32) are saved for the backward pass. Beyond, as with
every large vocabulary, they are computed again: four products with the head, not three."""

ROOMS = 4
"""Scratch buffers [n, V] of a divergence: teacher's logits, policy's probabilities, two more."""


@dataclass(frozen=True, slots=True, eq=False)
class Views:
    """What is computed from one product with the head."""

    divisors: tuple[Tensor | None, ...]  # [N] each: what the logits are divided by
    entropy: int | None  # index of the division under which the entropy is taken
    divergences: tuple[Divergence, ...]  # from the teachers, which must be set if there are any
    teachers: Teachers | None
    scale: float
    graded: bool  # whether a backward pass may follow

    @property
    def num(self) -> int:
        """Matrices [N, V] that a backward pass needs."""
        return len(self.divisors) + len(self.divergences)


class LinearStats(torch.autograd.Function):
    """([D, N] log-probs of the targets under every division, [N] entropy or nothing, [J, N]
    divergences, NaN where there is no teacher)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NX: Tensor,
        weight_VX: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        views: Views,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num, vocab, num_views = len(hidden_NX), len(weight_VX), len(views.divisors)
        keep = views.graded and views.num * num * vocab <= KEEP_ELEMENTS
        work = _Work(views, LinearHead(weight_VX, bias_V, views.scale), hidden_NX)
        logp_DN = hidden_NX.new_empty(num_views, num, dtype=torch.float32)
        entropy_N = logp_DN.new_empty(0 if views.entropy is None else num)
        value_JN = logp_DN.new_empty(len(views.divergences), num)
        kept_MNV = logp_DN.new_empty(views.num, num if keep else min(work.rows, num), vocab)
        for part in chunks(num, work.rows):
            here = part if keep else slice(part.stop - part.start)
            z_nV = work.read(part, kept_MNV[:, here], value_JN[:, part])
            largest_n = z_nV.amax(-1)
            written_n = z_nV.gather(-1, target_N[part, None])[:, 0]
            for view, divisor_N in enumerate(views.divisors):
                p_nV = kept_MNV[view, here][: len(z_nV)]
                # log Σ exp z, from the largest entry: z = log p + log Σ exp z at every one.
                log_sum_n = -p_nV.amax(-1).log()
                away_n = written_n - largest_n
                logp_DN[view, part] = (
                    away_n if divisor_N is None else away_n / divisor_N[part]
                ) - log_sum_n
                if view == views.entropy:
                    if divisor_N is None:
                        log_sum_n += largest_n
                        entropy_N[part] = log_sum_n - torch.linalg.vecdot(p_nV, z_nV)
                    else:  # from the largest: divided by a small temperature, logits are large
                        away_nV = z_nV - largest_n[:, None]
                        mean_n = torch.linalg.vecdot(p_nV, away_nV) / divisor_N[part]
                        entropy_N[part] = log_sum_n - mean_n
        ctx.views, ctx.kept = views, kept_MNV if keep else None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_NX, weight_VX, bias_V, target_N, entropy_N)
        return logp_DN, entropy_N, value_JN

    @staticmethod
    def backward(
        ctx: Any,
        logp_grad_DN: Tensor | None,
        entropy_grad_N: Tensor | None,
        value_grad_JN: Tensor | None,
    ) -> Any:
        hidden_NX, weight_VX, bias_V, target_N, entropy_N = ctx.saved_tensors
        views: Views = ctx.views
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        hidden_grad_NX = torch.empty_like(hidden_NX) if wants_hidden else None
        # Float32: a sum over many chunks would else be rounded at each of them.
        weight_grad_VX: Tensor | None = None
        bias_grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias else None
        # Saved tensors are overwritten: a second backward pass computes them again.
        kept_MNV, ctx.kept = ctx.kept, None
        work = None
        if kept_MNV is None:
            work = _Work(views, LinearHead(weight_VX, bias_V, views.scale), hidden_NX)
            kept_MNV = work.empty(views.num)
        grads = _Grads(logp_grad_DN, entropy_grad_N, value_grad_JN)
        for part in chunks(len(hidden_NX), chunk_rows(len(weight_VX), hidden_NX.device)):
            hidden_nX = hidden_NX[part]
            if work is None:
                held_MnV = kept_MNV[:, part]
            else:
                held_MnV = kept_MNV[:, : len(hidden_nX)]
                work.read(
                    part, held_MnV, held_MnV.new_empty(len(views.divergences), len(hidden_nX))
                )
            d_nV = _logits_grad(held_MnV, views, part, target_N, entropy_N, grads)
            d_nV = d_nV.to(hidden_NX.dtype)
            if hidden_grad_NX is not None:
                hidden_grad_NX[part] = product(d_nV, weight_VX.t())
            if wants_weight:
                weight_grad_VX = _more(weight_grad_VX, d_nV, hidden_nX)
            if bias_grad_V is not None:
                bias_grad_V.add_(d_nV.sum(0))
        if wants_weight and weight_grad_VX is None:
            weight_grad_VX = torch.zeros_like(weight_VX)
        found = (hidden_grad_NX, weight_grad_VX, bias_grad_V)
        return *(None if g is None else g.to(hidden_NX.dtype) for g in found), None, None


def _more(total_VX: Tensor | None, d_nV: Tensor, hidden_nX: Tensor) -> Tensor:
    """The weights' gradient in float32, with a chunk's share added to it."""
    if total_VX is not None and d_nV.dtype == torch.float32 and not by_onednn():
        return total_VX.addmm_(d_nV.t(), hidden_nX)
    share_VX = weight_gradient(d_nV, hidden_nX).float()
    return share_VX if total_VX is None else total_VX.add_(share_VX)


class _Work:
    """One pass over the chunks, with scratch buffers that they share."""

    def __init__(self, views: Views, head: LinearHead, hidden_NX: Tensor) -> None:
        self._views, self._head, self._hidden_NX = views, head, hidden_NX
        self.rows = chunk_rows(len(head.weight_VX), hidden_NX.device)
        self._room_nV = None if by_onednn() else self.empty(1)[0]
        self._rooms_RnV = self.empty(ROOMS) if views.divergences else None

    def empty(self, num: int) -> Tensor:
        """[num, n, V] uninitialised, as long as the longest chunk."""
        rows, vocab = min(self.rows, len(self._hidden_NX)), len(self._head.weight_VX)
        return self._hidden_NX.new_empty(num, rows, vocab, dtype=torch.float32)

    def read(self, part: slice, out_MnV: Tensor, value_Jn: Tensor) -> Tensor:
        """Logits [n, V] of a chunk; writes to ``out_MnV`` what a backward pass needs.

        ``value_Jn`` receives the divergences.
        """
        views = self._views
        z_nV = self._head.into(self._room_nV, self._hidden_NX[part])
        num = len(z_nV)
        for p_nV, divisor_N in zip(out_MnV, views.divisors, strict=False):
            divided_nV = z_nV if divisor_N is None else z_nV / divisor_N[part, None]
            torch.softmax(divided_nV, -1, out=p_nV[:num])
        if views.teachers is None or self._rooms_RnV is None:
            return z_nV
        t_nV = views.teachers.logits(part, self._rooms_RnV[0])
        plain = next((p for p, d in zip(out_MnV, views.divisors, strict=False) if d is None), None)
        for row, wanted in enumerate(views.divergences):
            slope_nV = out_MnV[len(views.divisors) + row, :num]
            value_Jn[row] = self._compare(wanted, z_nV, t_nV, plain, slope_nV)
            if not views.teachers.everywhere:  # no value and no gradient
                unknown_n = ~views.teachers.known_N[part]
                value_Jn[row, unknown_n] = float("nan")
                slope_nV[unknown_n] = 0
        return z_nV

    def _compare(
        self, wanted: Divergence, z_nV: Tensor, t_nV: Tensor, p_nV: Tensor | None, out_nV: Tensor
    ) -> Tensor:
        """[n] a divergence, and its gradient in ``out_nV``; ``p_nV`` at temperature 1 if known."""
        assert self._rooms_RnV is not None
        if (width := t_nV.shape[1]) < z_nV.shape[1]:  # given that the token is one of the first
            out_nV[:, width:] = 0
            z_nV, out_nV, p_nV = z_nV[:, :width], out_nV[:, :width], None
        own_nV, room_nV, spare_nV = self._rooms_RnV[1:, : len(z_nV), :width]
        if wanted.temperature != 1:
            z_nV, t_nV, p_nV = z_nV / wanted.temperature, t_nV / wanted.temperature, None
        p_nV = torch.softmax(z_nV, -1, out=own_nV) if p_nV is None else p_nV[: len(z_nV)]
        sides = LogitSides.of(z_nV, t_nV, p_nV, room_NV=room_nV)
        return sloped(wanted, sides, out_NV=out_nV, spare_NV=spare_nV)


@dataclass(frozen=True, slots=True, eq=False)
class _Grads:
    """Gradients of the results; None where not needed."""

    logp_DN: Tensor | None
    entropy_N: Tensor | None
    value_JN: Tensor | None


def _logits_grad(
    held_MnV: Tensor,
    views: Views,
    part: slice,
    target_N: Tensor,
    entropy_N: Tensor,
    grads: _Grads,
) -> Tensor:
    """[n, V] gradient of a chunk's logits, written over ``held_MnV``."""
    total_nV: Tensor | None = None
    for view, divisor_N in enumerate(views.divisors):
        p_nV = held_MnV[view]
        entropy_grad_N = grads.entropy_N if view == views.entropy else None
        if grads.logp_DN is None and entropy_grad_N is None:
            continue
        away_nV: Tensor | None = None
        if entropy_grad_N is not None:
            away_nV = torch.xlogy(p_nV, p_nV).add_(p_nV * entropy_N[part, None])
            away_nV.mul_(entropy_grad_N[part, None])
        if grads.logp_DN is None:
            d_nV = p_nV.zero_()
        else:
            grad_n1 = grads.logp_DN[view, part, None]
            d_nV = p_nV.mul_(-grad_n1).scatter_add_(-1, target_N[part, None], grad_n1)
        if away_nV is not None:
            d_nV.sub_(away_nV)
        if divisor_N is not None:
            d_nV.div_(divisor_N[part, None])
        total_nV = d_nV if total_nV is None else total_nV.add_(d_nV)
    slopes_JnV = held_MnV[len(views.divisors) :]
    if grads.value_JN is not None and views.teachers is not None:
        known_n = views.teachers.known_N[part]
        for slope_nV, grad_N in zip(slopes_JnV, grads.value_JN, strict=True):
            # A token without a teacher gets no gradient, even if the incoming one is NaN.
            d_nV = slope_nV.mul_(grad_N[part].where(known_n, 0)[:, None])
            total_nV = d_nV if total_nV is None else total_nV.add_(d_nV)
    assert total_nV is not None  # some result has a gradient
    return total_nV if views.scale == 1 else total_nV.mul_(views.scale)
