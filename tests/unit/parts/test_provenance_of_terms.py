"""No ratio without the probability that a token was really drawn with: every term that has one."""

import pytest

from posttrain.core.errors import LegalityError
from posttrain.core.provenance import Kind
from posttrain.core.sampling import SamplingSpec
from posttrain.core.trajectory import Column
from posttrain.parts.composition import Composition
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.credit.selection import MarkEntropy
from posttrain.parts.credit.shaping import KLPenalty
from posttrain.parts.legality import check_composition
from posttrain.parts.logprobs import ReferenceLogprobs, TrainerLogprobs
from posttrain.parts.offline.weighted import AdvantageWeighted
from posttrain.parts.policy.regularisers import AdaptiveEntropyBonus
from posttrain.parts.registry import known, tag_of
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.parts.supervised.likelihood import WeightedCrossEntropy

GIVEN = {AdaptiveEntropyBonus: {"target": 0.5}, WeightedCrossEntropy: {"by": "weight"}}


def every_term():
    return [kind(**GIVEN.get(kind, {})) for kind in known("term").values()]


RATIOS = [t for t in every_term() if Column.BEHAVIOUR_LOGPROB in t.needs]
SIGNALS = (Verify(), GroupAdvantage(), ReferenceLogprobs(), MarkEntropy())
TRUNCATED = [{"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}, {"temperature": 0.0}]


def test_terms_with_a_ratio_are_known():
    tags = {tag_of(t) for t in RATIOS}
    assert {"clipped_policy_gradient", "reference_kl", "log_ratio_penalty"} <= tags
    assert len(RATIOS) == 9


@pytest.mark.parametrize("term", RATIOS, ids=tag_of)
def test_on_rollouts_of_the_learner_it_is_legal(term):
    check_composition(
        Composition(source=Rollouts(tasks=("sums",)), signals=SIGNALS, terms=(term,)), stage="s"
    )


@pytest.mark.parametrize("author", [Kind.EXTERNAL, Kind.HUMAN, Kind.TEACHER])
@pytest.mark.parametrize("term", RATIOS, ids=tag_of)
def test_on_text_of_others_it_is_refused(term, author):
    data = Dataset(path="logged.jsonl", reward="reward", author=author)
    constant = GroupAdvantage(baseline="constant", value=0.0, scale="none")
    signals = (constant, ReferenceLogprobs(), MarkEntropy())
    with pytest.raises(LegalityError, match=r"behaviour_logprob|the source writes"):
        check_composition(Composition(source=data, signals=signals, terms=(term,)), stage="s")


@pytest.mark.parametrize("how", TRUNCATED, ids=str)
@pytest.mark.parametrize("term", RATIOS, ids=tag_of)
def test_on_truncated_samples_it_is_refused(term, how):
    source = Rollouts(tasks=("sums",), sampling=SamplingSpec(**how))
    with pytest.raises(LegalityError, match="importance ratio on truncated sampling"):
        check_composition(Composition(source=source, signals=SIGNALS, terms=(term,)), stage="s")


@pytest.mark.parametrize("how", TRUNCATED, ids=str)
@pytest.mark.parametrize("signal", [KLPenalty(), TrainerLogprobs()], ids=tag_of)
def test_a_signal_that_compares_log_probs_is_refused_there_too(signal, how):
    """Also where no term has a ratio: a penalty would count the truncation as a change of π."""
    signals = (Verify(), ReferenceLogprobs(), signal, GroupAdvantage())
    plain = Rollouts(tasks=("sums",))
    check_composition(
        Composition(source=plain, signals=signals, terms=(AdvantageWeighted(),)), stage="s"
    )
    source = Rollouts(tasks=("sums",), sampling=SamplingSpec(**how))
    with pytest.raises(LegalityError, match=f"{tag_of(signal)} on samples at"):
        check_composition(
            Composition(source=source, signals=signals, terms=(AdvantageWeighted(),)), stage="s"
        )
