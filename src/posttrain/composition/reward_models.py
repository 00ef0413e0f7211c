"""Judges that are learnt: terms that train them, and signals that ask them.

    pairs ──bradley_terry──┐                     ┌─reward_model──▶ REWARD
    labels ─outcome_bce────┼──▶ scalar head ─────┤
    steps ──step_bce───────┘    (a model folder) └─process_reward─▶ STEP_REWARD, then
                                                    REWARD (min, product, last) or TOKEN_REWARD

A score stands *after* what it judges: after the last token of an answer, after the last token of
a step. The code is in ``objectives/reward_models.py``, ``signals/reward_model.py`` and
``signals/process.py``.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from posttrain.composition.base import ANYONE, PolicyRef, Term
from posttrain.composition.steps import Steps
from posttrain.composition.values import Readout
from posttrain.composition.verify import Verify
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Column

Columns = frozenset[Column]


# --- terms -----------------------------------------------------------------------------------


class BradleyTerry(Term, tag="bradley_terry", tag_field="type"):
    """−log σ(s_w − s_l − m) + η (s_w + s_l)², s the score after the last token of an answer.

    The probability that w is preferred to l is σ(s_w − s_l) (Bradley and Terry; arXiv 2203.02155).
    ``margin`` m asks for more distance; ``column`` takes each pair's own from the data set, as
    for ratings of how much better an answer is (arXiv 2307.09288: 1, 2/3, 1/3 and 0).
    ``centring`` η keeps scores around 0, which the first part leaves open (arXiv 2312.09244).
    """

    margin: float | Literal["column"] = 0.0
    centring: float = 0.01
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    unit: ClassVar[str] = "pair"
    aggregate: ClassVar[str] = "pair_mean"
    accepts: ClassVar[frozenset[Kind]] = ANYONE
    readout: ClassVar[Readout] = "score"

    def __post_init__(self) -> None:
        margin = 0.0 if self.margin == "column" else self.margin
        if not (0 <= margin < math.inf and 0 <= self.centring < math.inf):
            raise ConfigError(
                f"bradley_terry with margin={self.margin}, centring={self.centring}",
                expected="both 0 or more, and finite; or margin: column",
            )

    @property
    def needs(self) -> Columns:
        """Preferences, and margins where each pair has its own."""
        return frozenset(
            {Column.PREFERENCE} | ({Column.MARGIN} if self.margin == "column" else set())
        )


class OutcomeClassifier(Term, tag="outcome_bce", tag_field="type"):
    """−y log σ(s) − (1 − y) log σ(−s): is the answer right? (ORM, arXiv 2110.14168)

    ``at: last`` judges the whole answer after its last token; ``at: every`` asks for the same
    verdict after every token, which teaches to see it coming. ``target: label`` takes y from
    labelled answers, ``reward`` from rewards between 0 and 1.
    """

    at: Literal["last", "every"] = "last"
    target: Literal["label", "reward"] = "label"
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    aggregate: Literal["sequence_mean", "token_mean"] = "sequence_mean"
    unit: ClassVar[str] = "token"
    accepts: ClassVar[frozenset[Kind]] = ANYONE
    readout: ClassVar[Readout] = "score"

    def __post_init__(self) -> None:
        if self.at == "last" and self.aggregate == "token_mean":
            raise ConfigError(
                "outcome_bce at the last token, with token_mean",
                expected="sequence_mean: one verdict per answer must not count by its length",
                fix="drop aggregate, or use at: every",
            )

    @property
    def needs(self) -> Columns:
        """The verdicts."""
        return frozenset({Column.LABEL if self.target == "label" else Column.REWARD})


class StepClassifier(Term, tag="step_bce", tag_field="type"):
    """−y_k log σ(s_k) − (1 − y_k) log σ(−s_k) after the last token of every labelled step k.

    A process reward model (arXiv 2211.14275, 2305.20050). y may be anything from 0 to 1: a share
    of continuations that succeeded is a label too (Math-Shepherd, arXiv 2312.08935).
    ``token_mean`` is over steps, ``sequence_mean`` over the steps of each answer first.
    """

    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    aggregate: Literal["token_mean", "sequence_mean"] = "token_mean"
    unit: ClassVar[str] = "step"
    needs: ClassVar[Columns] = frozenset({Column.STEP_LABEL})
    accepts: ClassVar[frozenset[Kind]] = ANYONE
    readout: ClassVar[Readout] = "score"


RewardModelTerm = BradleyTerry | OutcomeClassifier | StepClassifier


# --- signals ---------------------------------------------------------------------------------


class RewardModel(Config, tag="reward_model", tag_field="type"):
    """``REWARD``: the score of a frozen reward model after the last token of the answer.

    ``model`` is a stage that trained one, a folder that such a stage exported, or a stock
    classifier with one or two labels. It reads the learner's own tokens, so it must have the
    learner's tokenizer. ``squash: sigmoid`` makes a probability of the score. ``add`` adds the
    weighted score to the reward that is there already, instead of writing it.
    """

    model: PolicyRef
    weight: float = 1.0
    squash: Literal["none", "sigmoid"] = "none"
    add: bool = False
    provides: ClassVar[Columns] = frozenset({Column.REWARD})

    def __post_init__(self) -> None:
        _check_weight("reward_model", self.weight)

    @property
    def needs(self) -> Columns:
        """The reward that it adds to, if it does."""
        return frozenset({Column.REWARD}) if self.add else frozenset()


class ProcessReward(Config, tag="process_reward", tag_field="type"):
    """``STEP_REWARD``: what a frozen process model gives every step, p_k = σ(s_k) after its end.

    | ``use`` | writes |
    |---|---|
    | ``min`` | ``REWARD`` = the least p_k: an answer is as good as its weakest step |
    | ``product`` | ``REWARD`` = the product of all p_k |
    | ``last`` | ``REWARD`` = p of the last step |
    | ``dense`` | ``TOKEN_REWARD`` p_k where step k ends: the more steps, the more reward |
    | ``progress`` | ``TOKEN_REWARD`` p_k − p_{k−1} where step k ends, p_0 = 0; the sum is p_last |

    All times ``weight``. ``add`` adds to the ``REWARD`` that is there already. Token rewards always
    add up, and need a reward beside them (0 will do). ``progress`` is a difference of scores, not
    the advantage under a prover that PAV defines.

    Unconfirmed: ``min`` and ``product`` are from general knowledge.
    """

    model: PolicyRef
    use: Literal["min", "product", "last", "dense", "progress"] = "min"
    steps: Steps = Steps()
    weight: float = 1.0
    add: bool = False

    def __post_init__(self) -> None:
        _check_weight("process_reward", self.weight)
        if self.add and self.use in ("dense", "progress"):
            raise ConfigError(
                f"process_reward with use={self.use} and add",
                expected="add with min, product or last: token rewards add up by themselves",
                fix="drop add",
            )

    @property
    def needs(self) -> Columns:
        """The reward that it adds to, if it does."""
        return frozenset({Column.REWARD}) if self.add else frozenset()

    @property
    def provides(self) -> Columns:
        """Step rewards, and what is made of them."""
        dense = self.use in ("dense", "progress")
        return frozenset({Column.STEP_REWARD, Column.TOKEN_REWARD if dense else Column.REWARD})


class StepLabels(Config, tag="step_labels", tag_field="type"):
    """``STEP_LABEL`` by roll-outs from prefixes: Math-Shepherd (arXiv 2312.08935).

    From the end of every step but the last, ``policy`` writes ``samples`` continuations, which the
    verifier judges. ``soft`` is the share that succeeded, ``hard`` 1 if any did. The last step's
    label is whether the answer itself succeeded. A score of the task set's ``success`` counts.
    """

    policy: PolicyRef = "input"
    samples: int = 8
    labels: Literal["soft", "hard"] = "soft"
    steps: Steps = Steps()
    max_new_tokens: int = 64
    needs: ClassVar[Columns] = frozenset()
    provides: ClassVar[Columns] = frozenset({Column.STEP_LABEL})

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_new_tokens < 1:
            raise ConfigError(
                f"step_labels with samples={self.samples}, max_new_tokens={self.max_new_tokens}",
                expected="at least 1 of each",
            )


def _check_weight(name: str, weight: float) -> None:
    if not math.isfinite(weight) or weight == 0:
        raise ConfigError(f"{name} with weight={weight}", expected="a finite number other than 0")


RewardModelSignal = RewardModel | ProcessReward | StepLabels
Judge = Verify | RewardModel | ProcessReward
"""Who may say what an answer is worth; several judge in turn."""
