"""Where trajectories come from."""

from __future__ import annotations

from math import floor
from typing import Literal

from posttrain.composition.base import PolicyRef
from posttrain.composition.company import Company, Guided, Hinted, Rival
from posttrain.composition.credit import DropCutOff, KeepInformative, SoftLengthPenalty
from posttrain.composition.offline import KeepRewards
from posttrain.composition.steps import Steps
from posttrain.composition.verify import Verify
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind, Sampling
from posttrain.core.trajectory import Column


class SamplingSpec(Config):
    """How a policy is sampled. Defaults are the policy's own distribution, untouched.

    An answer also ends after a token that completes one of the ``stop`` strings, which stays in
    its text.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.with_seed(0)  # refuses what no sampler could draw from

    def with_seed(self, seed: int) -> Sampling:
        """The exact distribution of one request."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=seed,
            stop=self.stop,
        )

    @property
    def is_truncated(self) -> bool:
        """True when ratios against the model's own distribution would be wrong."""
        return self.with_seed(0).is_truncated


Format = Literal["text", "completion", "messages", "preference", "unpaired", "steps"]
"""What the rows of a data file are."""


class Dataset(Config, tag="dataset", tag_field="type"):
    """Trajectories from a JSONL or Parquet file (off-policy).

    ``format`` is detected from the columns: text (plain documents, every token is trained),
    prompt/completion, messages, prompt/chosen/rejected, or, for methods that learn from answers
    judged one by one, prompt/completion/label with a true or false label (``unpaired``), and for
    process models prompt/completions/labels, an answer cut into steps (``steps``).
    ``author`` and ``licence`` go into the ledger.
    """

    path: str
    format: Format | Literal["auto"] = "auto"
    author: Kind = Kind.EXTERNAL
    name: str | None = None  # default: the file name
    licence: str | None = None
    too_long: Literal["error", "skip"] = "error"
    assistant_mask: Literal["template", "prefix"] = "template"
    preference: bool = False  # set by pairwise methods; checked against the file
    unpaired: bool = False  # set by methods on labelled answers; a file of pairs serves them too
    reward: str | None = None  # the column with each answer's reward, for logged answers
    weight: str | None = None  # the column that says how much each row counts, 0 or more
    margin: str | None = None  # the column with each pair's margin, for reward models
    steps: Steps | None = None  # set by methods on labelled steps: how the file's steps are joined

    def __post_init__(self) -> None:
        if self.preference and self.unpaired:
            raise ConfigError(
                f"data set {self.path} with preference and unpaired",
                expected="one of them: a stage compares answers, or judges each by itself",
            )
        if (self.margin and not self.preference) or (
            self.steps and (self.preference or self.unpaired or self.reward or self.weight)
        ):
            raise ConfigError(
                f"data set {self.path} with margin={self.margin}, steps={self.steps}",
                expected="margins on pairs; labels of steps and nothing else beside them",
            )
        if (self.preference or self.unpaired) and (self.reward or self.weight):
            raise ConfigError(
                f"data set {self.path} with reward={self.reward}, weight={self.weight}, and of "
                "preferences",
                expected="rewards and weights on single answers: a preference has no number",
            )

    @property
    def provides(self) -> frozenset[Column]:
        """Preferences for a file of pairs, labels for one of labelled answers; named numbers."""
        if self.steps:
            return frozenset({Column.STEP_LABEL})
        if self.unpaired:
            return frozenset({Column.LABEL})
        if self.preference:
            margins = frozenset({Column.MARGIN}) if self.margin else frozenset[Column]()
            return frozenset({Column.PREFERENCE}) | margins
        named = {Column.REWARD: self.reward, Column.WEIGHT: self.weight}
        return frozenset(column for column, name in named.items() if name is not None)

    def provides_for(self, kind: Kind) -> frozenset[Column]:
        """Columns beside what this author wrote: all of them."""
        return self.provides

    @property
    def writes(self) -> frozenset[Kind]:
        """Who authors the assistant turns."""
        return frozenset({self.author})


class Rollouts(Config, tag="rollouts", tag_field="type"):
    """Groups of completions sampled from a policy on the training prompts of task sets.

    With ``policy: learner`` this is on-policy; any other policy is frozen, hence off-policy.
    ``company`` says how the last members of every group come about, if not like the others:
    ``guided``, ``rival`` or ``hinted``.
    """

    tasks: tuple[str, ...]
    policy: PolicyRef = "learner"
    group_size: int = 8
    max_new_tokens: int = 64
    sampling: SamplingSpec = SamplingSpec()
    company: Company | None = None

    def __post_init__(self) -> None:
        if self.group_size < 1 or self.max_new_tokens < 1 or not self.tasks:
            raise ConfigError(
                f"rollouts over tasks={list(self.tasks)} with group_size={self.group_size}, "
                f"max_new_tokens={self.max_new_tokens}",
                expected="at least one task set, one member and one token",
            )
        self._check_company()

    def _check_company(self) -> None:
        company = self.company
        if company is None:
            return
        most = self.group_size - (1 if isinstance(company, Rival) else 0)
        if company.members is not None and not 1 <= company.members <= most:
            raise ConfigError(
                f"{company.__struct_config__.tag} with members={company.members} of "
                f"group_size={self.group_size}",
                expected=f"from 1 to {most}",
            )
        same = isinstance(company, Guided) and company.learn and company.author is self._sampled
        if same or (isinstance(company, Rival) and company.policy == self.policy):
            raise ConfigError(
                f"rollouts of {self.policy} in the company of {company}",
                expected="another author: terms tell members apart by who wrote them",
            )

    @property
    def _sampled(self) -> Kind:
        return Kind.LEARNER if self.policy == "learner" else Kind.TEACHER

    @property
    def provides(self) -> frozenset[Column]:
        """Log-probs of the sampled distribution, where somebody sampled all that is trained."""
        return frozenset.intersection(*(self.provides_for(kind) for kind in self.writes))

    def provides_for(self, kind: Kind) -> frozenset[Column]:
        """Columns beside what this author wrote."""
        given = isinstance(self.company, Guided) and kind is not self._sampled
        unknown = given or isinstance(self.company, Hinted)
        return frozenset() if unknown else frozenset({Column.BEHAVIOUR_LOGPROB})

    @property
    def writes(self) -> frozenset[Kind]:
        """The live learner or a frozen policy, and who else has tokens that are trained."""
        others = set[Kind]()
        if isinstance(self.company, Guided) and self.company.learn:
            others = {self.company.author}
        if isinstance(self.company, Rival):
            others = {Kind.TEACHER}
        return frozenset({self._sampled}) | others


Part = Dataset | Rollouts
"""A source that draws by itself."""


class Mix(Config, tag="mix", tag_field="type"):
    """Several sources in fixed proportion: ``shares[i]`` of all groups come from ``parts[i]``.

    A column counts as provided for an author when every part that this author writes provides it,
    so a term on the learner's tokens may need what a data set cannot have. A signal judges the
    groups whose authors' terms ask for its columns, and no others.

    Example:
        >>> demos, own = Dataset(path="demos.jsonl"), Rollouts(tasks=("sums",))
        >>> mixed = Mix(parts=(demos, own), shares=(0.3, 0.7))
        >>> [mixed.counts(8, step=s) for s in range(3)]
        [(2, 6), (3, 5), (2, 6)]
        >>> mixed.provides, sorted(mixed.provides_for(Kind.LEARNER))
        (frozenset(), [<Column.BEHAVIOUR_LOGPROB: 'behaviour_logprob'>])
    """

    parts: tuple[Part, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        fits = len(self.parts) == len(self.shares) >= 2 and min(self.shares) > 0
        if not fits or abs(sum(self.shares) - 1) > 1e-6:
            raise ConfigError(
                f"a mix of {len(self.parts)} parts with shares {list(self.shares)}",
                expected="two parts or more, and for each a share above zero; shares sum to 1",
            )

    @property
    def provides(self) -> frozenset[Column]:
        """Columns that every part provides."""
        return frozenset.intersection(*(p.provides for p in self.parts))

    def provides_for(self, kind: Kind) -> frozenset[Column]:
        """Columns that stand beside every group of this author."""
        parts = [p.provides_for(kind) for p in self.parts if kind in p.writes]
        return frozenset.intersection(*parts) if parts else frozenset()

    @property
    def writes(self) -> frozenset[Kind]:
        """Everybody who writes a part."""
        return frozenset().union(*(p.writes for p in self.parts))

    def counts(self, num_groups: int, *, step: int) -> tuple[int, ...]:
        """How many groups of a draw come from each part. They sum to ``num_groups``.

        Shares that come out in whole groups are met in every draw. Others are met over draws:
        what a part has given since the first draw is within one group of its share (for two or
        three parts; each further part may add half a group).
        """
        before, after = (self._given((step + more) * num_groups) for more in (0, 1))
        return tuple(b - a for a, b in zip(before, after, strict=True))

    def _given(self, num_groups: int) -> tuple[int, ...]:
        """Groups of each part among the first ``num_groups``.

        Parts are split off one at a time, each by rounding its share of what is left. Every count
        then grows with ``num_groups``, which largest remainders over all parts do not promise.
        """
        counts, left, share_left = list[int](), num_groups, 1.0
        for share in self.shares[:-1]:
            # A hair up, so that a half made of float dust rounds like a half.
            counts.append(min(floor(left * min(share / share_left, 1.0) + 0.5 + 1e-9), left))
            left, share_left = left - counts[-1], share_left - share
        return (*counts, left)


Sieve = Verify | SoftLengthPenalty | DropCutOff | KeepInformative | KeepRewards
"""Signals that decide what is worth keeping, and ask no other policy."""


class Redraw(Config, tag="redraw", tag_field="type"):
    """Draws again until enough groups are worth training on (DAPO, arXiv 2503.14476).

    Every draw is judged by ``keep``. A group of which something is left counts; groups are drawn,
    as many as a step has each time, until a step's worth count or ``max_draws`` draws are over.
    All that was drawn stays in the record: what was judged useless, and what came too much, is
    discarded with its reason. The step is smaller when the last draw does not suffice.

    Draw n of a stage takes its prompts from the n-th block of ``max_draws`` draws, whether all of
    them are needed or not, so that what is drawn stays a function of the step.
    """

    source: Rollouts
    keep: tuple[Sieve, ...] = (Verify(), KeepInformative())
    max_draws: int = 10

    def __post_init__(self) -> None:
        if self.max_draws < 2 or not any(Column.DISCARD in s.provides for s in self.keep):
            raise ConfigError(
                f"redraw with max_draws={self.max_draws}, "
                f"keep={[s.__struct_config__.tag for s in self.keep]}",
                expected="at least 2 draws, and a signal that discards, such as keep_informative",
                fix="for a single draw use its source alone",
            )
        company = self.source.company
        if isinstance(company, Guided) and company.start != company.end:
            raise ConfigError(
                "redraw of guided rollouts whose share moves",
                expected="start and end equal: the share moves by the draw, and draws repeat here",
            )

    @property
    def provides(self) -> frozenset[Column]:
        """What the source provides, and what its judges write."""
        return self.source.provides.union(*(s.provides for s in self.keep))

    def provides_for(self, kind: Kind) -> frozenset[Column]:
        """Columns beside what this author wrote."""
        return self.source.provides_for(kind).union(*(s.provides for s in self.keep))

    @property
    def writes(self) -> frozenset[Kind]:
        """Who writes the source."""
        return self.source.writes


SourceSpec = Dataset | Rollouts | Mix | Redraw


def parts_of(source: SourceSpec) -> tuple[Part, ...]:
    """The sources that draw by themselves: those of a mix or inside a redraw, or itself."""
    if isinstance(source, Mix):
        return source.parts
    return (source.source,) if isinstance(source, Redraw) else (source,)
