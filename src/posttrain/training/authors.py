"""Metrics of a step per kind of author: negative log-likelihood, entropy, importance ratios.

statistics [N] ──author_sums──▶ sums per micro-batch, which add up ──author_metrics──▶ means

One objective may read text of the learner and of others, and an average over both is misleading:
an unlikely demonstration is expected, but an unlikely rollout means that sampler and trainer
disagree. Shape legend: ``N`` trained tokens, ``K`` kinds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from posttrain.core.provenance import Kind
from posttrain.core.statistics import Stat, Wanted
from posttrain.core.trajectory import Column
from posttrain.numerics.batch import KINDS, PackedBatch

PREFIX = "authors/"
"""Prefix of the metrics per kind of author, as in ``authors/learner/nll``."""

_SUMS = (
    "tokens",
    "nll",
    "unlikely",
    "entropies",
    "entropy",
    "ratios",
    "ratio",
    "ratio_squared",
)
MAX_LOG_RATIO = 30.0  # log-ratios are clamped to it, so that squares of ratios stay finite


def author_sums(
    batch: PackedBatch, stats: Mapping[Wanted, torch.Tensor], *, vocab_size: int
) -> dict[str, float]:
    """Sums over the trained tokens of each kind; sums of micro-batches add up.

    A token is unlikely when it is less likely than one of ``vocab_size`` drawn by chance. The ratio
    is π / π_behaviour at the sampling temperature, where the behaviour log-prob is known.
    """
    logprob_N = stats.get(Stat.LOGPROB, stats.get(Stat.SAMPLED_LOGPROB))
    if logprob_N is None or not len(batch.target_N):
        return {}
    ones_N = torch.ones_like(logprob_N)
    zeros_N = torch.zeros_like(logprob_N)
    entropy_N = stats.get(Stat.ENTROPY)
    known_N, ratio_N = zeros_N, zeros_N
    behaviour_N = batch.columns.get(Column.BEHAVIOUR_LOGPROB)
    if behaviour_N is not None and Stat.SAMPLED_LOGPROB in stats:
        log_ratio_N = (stats[Stat.SAMPLED_LOGPROB] - behaviour_N).clamp(max=MAX_LOG_RATIO)
        known_N = log_ratio_N.isfinite().to(ones_N.dtype)
        ratio_N = torch.where(known_N > 0, log_ratio_N, -torch.inf).exp()
    values_N8 = torch.stack(
        [
            ones_N,
            -logprob_N,
            (logprob_N < -math.log(vocab_size)).to(ones_N.dtype),
            zeros_N if entropy_N is None else ones_N,
            zeros_N if entropy_N is None else entropy_N,
            known_N,
            ratio_N,
            ratio_N**2,
        ],
        dim=1,
    ).detach()
    by_kind_K8 = torch.zeros(len(KINDS), len(_SUMS), device=values_N8.device)
    by_kind_K8.index_add_(0, batch.kind_N, values_N8)
    rows = by_kind_K8.tolist()  # one transfer from the device
    return {
        f"{PREFIX}{kind}/{name}": value
        for kind, row in zip(KINDS, rows, strict=True)
        if row[0]
        for name, value in zip(_SUMS, row, strict=True)
    }


def author_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics per kind of author, from the sums of a step.

    ``share`` of the trained tokens; ``nll``, minus the mean log-prob in nats; ``unlikely``, the
    share of tokens less likely than by chance; ``entropy``, where it was computed; and where
    behaviour log-probs are known the mean ratio w and the effective share (Σw)² / (n Σw²), 1 when
    all weights are equal. Other entries are not changed.

    Example:
        >>> author_metrics({"loss": 2.0, "authors/human/tokens": 4.0, "authors/human/nll": 2.0})
        {'loss': 2.0, 'authors/human/share': 1.0, 'authors/human/nll': 0.5, \
'authors/human/unlikely': 0.0}
    """
    shown = {k: v for k, v in sums.items() if not k.startswith(PREFIX)}
    kinds = [k for k in Kind if f"{PREFIX}{k}/tokens" in sums]
    total = sum(sums[f"{PREFIX}{kind}/tokens"] for kind in kinds)
    for kind in kinds:
        at = f"{PREFIX}{kind}/"
        part = {name: sums.get(at + name, 0.0) for name in _SUMS}
        shown[f"{at}share"] = part["tokens"] / total
        shown[f"{at}nll"] = part["nll"] / part["tokens"]
        shown[f"{at}unlikely"] = part["unlikely"] / part["tokens"]
        if part["entropies"]:
            shown[f"{at}entropy"] = part["entropy"] / part["entropies"]
        if part["ratios"]:
            shown[f"{at}ratio"] = part["ratio"] / part["ratios"]
            squares = part["ratios"] * part["ratio_squared"]
            shown[f"{at}effective_share"] = part["ratio"] ** 2 / squares if squares else 0.0
    return shown
