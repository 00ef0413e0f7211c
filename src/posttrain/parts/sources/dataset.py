"""A data file as a source: demonstrations, preferences or labelled answers.

file ──rows──▶ format ──render──▶ groups (one demonstration, or one pair) ──order──▶ draws
                                    └─ every row is checked here, before anything is trained

The order of an epoch is a function of (seed, epoch) alone, so a resumed run draws what an
uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal, final

import numpy as np
import numpy.typing as npt

from posttrain.core.config import digest, plain
from posttrain.core.errors import ConfigError
from posttrain.core.files import content_of
from posttrain.core.provenance import Kind
from posttrain.core.rendering import ControlTokens, Loss, Rules
from posttrain.core.trajectory import Column, Group, Trajectory
from posttrain.parts.base import ANYONE, NONE, Columns, PlanFacts, Source, StageContext
from posttrain.parts.registry import part
from posttrain.parts.rewards.steps import Steps
from posttrain.parts.shelf import Reader, Shelf
from posttrain.parts.sources.formats import Format, Wants
from posttrain.parts.sources.reading import digest_of
from posttrain.parts.sources.rendered import DataSpec, render_rows
from posttrain.parts.tools import Tools
from posttrain.protocols import DataFile, PureStream, Renderer


@part
class Dataset(Source):
    """Trajectories from a JSONL or Parquet file (off-policy).

    ``format`` is detected from the columns: text (plain documents, every token is trained),
    prompt/completion, messages, prompt/chosen/rejected; for methods on labelled answers
    prompt/completion/label with a true or false label (``unpaired``); and for process models
    prompt/completions/labels, an answer split into steps (``steps``).
    ``author`` and ``licence`` go into the ledger.

    Every row is compared with what the chat template makes of it, and what a file has beside its
    format's columns is not read in silence:

    * ``bad_rows: skip`` leaves out rows that cannot be used, and names them; else they stop
      the run.
    * ``allow`` accepts that a template takes trained text away: ``trim`` the whitespace before an
      answer, ``cut`` other text such as reasoning, ``unknown`` characters outside the vocabulary.
    * ``control_tokens: parse`` makes control tokens inside messages what they look like; else they
      are text.
    * ``ignore`` names columns that are left out unread.
    """

    path: str
    format: Format | Literal["auto"] = "auto"
    author: Kind = Kind.EXTERNAL
    name: str | None = None  # default: the file name
    licence: str | None = None
    too_long: Literal["error", "skip"] = "error"
    bad_rows: Literal["error", "skip"] = "error"
    allow: tuple[Loss, ...] = ()  # trained text that a template may take away
    control_tokens: ControlTokens = "text"  # what control tokens inside messages are
    ignore: tuple[str, ...] = ()  # columns that are not read
    assistant_mask: Literal["template", "prefix"] = "template"
    preference: bool = False  # set by pairwise methods; checked against the file
    unpaired: bool = False  # set by methods on labelled answers; a file of pairs works too
    reward: str | None = None  # the column with each answer's reward, for logged answers
    weight: str | None = None  # the column with each row's weight, 0 or more
    margin: str | None = None  # the column with each pair's margin, for reward models
    steps: Steps | None = None  # set by methods on labelled steps: how the file's steps are joined

    has_end: ClassVar[bool] = True
    in_words: ClassVar[str] = "data set: {path, …}"

    def __post_init__(self) -> None:
        if self.preference and self.unpaired:
            raise ConfigError(
                f"data set {self.path} with preference and unpaired",
                expected="one of them: a stage compares answers, or judges each by itself",
            )
        alone = self.preference or self.unpaired or self.reward or self.weight
        if (self.margin and (self.unpaired or self.reward or self.weight)) or (
            self.steps and (alone or self.margin)
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

    def check(self, at: StageContext) -> None:
        """Margins are for terms that read them: elsewhere they would be left out unsaid."""
        if self.margin and not any(Column.MARGIN in term.needs for term in at.terms):
            raise at.refuse(
                f"data set {self.path} with margin={self.margin}, and no term reads margins",
                expected="a reward model of pairs: bradley_terry",
                fix="drop margin, or name it in the data of bradley_terry",
            )

    @property
    def number_columns(self) -> Mapping[Column, str | None]:
        """Names of the file's columns with a number for each row, by the column they fill."""
        return {
            Column.REWARD: self.reward,
            Column.WEIGHT: self.weight,
            Column.MARGIN: self.margin,
        }

    def provides_for(self, kind: Kind) -> Columns:
        """Preferences for a file of pairs, labels for one of labelled answers; named numbers."""
        if self.steps:
            return frozenset({Column.STEP_LABEL})
        if self.unpaired:
            return frozenset({Column.LABEL})
        if self.preference:
            margins = frozenset({Column.MARGIN}) if self.margin else NONE
            return frozenset({Column.PREFERENCE}) | margins
        return frozenset(c for c, name in self.number_columns.items() if name is not None)

    @property
    def writes(self) -> frozenset[Kind]:
        """Who authors the assistant turns."""
        return frozenset({self.author})

    @property
    def row_names(self) -> tuple[str, ...]:
        """The name, or the file's stem."""
        return (self.name or Path(self.path).stem,)

    @property
    def row_columns(self) -> tuple[str, ...]:
        """The columns that the stage trains on, and the named numbers."""
        if self.wants == "steps":
            return ("prompt", "completions", "labels")
        if self.wants == "preferences":
            return ("prompt", "chosen", "rejected")
        if self.wants == "labels":
            return ("prompt", "completion", "label")
        numbers = [name for name in (self.reward, self.weight) if name is not None]
        return ("prompt", "completion", *numbers)

    @property
    def files(self) -> tuple[str, ...]:
        """The file."""
        return (self.path,)

    @property
    def origin(self) -> str:
        """The author of the file."""
        return f"{self.name or Path(self.path).name} ({self.author})"

    def identity(self, root: Path) -> dict[str, object]:
        """Its options, with the file's content in place of its path."""
        return {**plain(self), "path": content_of(self.path, root)}

    @property
    def wants(self) -> Wants:
        """The kind of supervision, which decides the formats that the stage can read."""
        if self.steps:
            return "steps"
        return "preferences" if self.preference else "labels" if self.unpaired else "answers"

    def reading(self, root: Path) -> DataSpec:
        """How the file is read."""
        return DataSpec(
            path=root / self.path,
            name=self.row_names[0],
            author=self.author,
            licence=self.licence,
            format=self.format,
            wants=self.wants,
            assistant_mask=self.assistant_mask,
            skip_long=self.too_long == "skip",
            skip_bad=self.bad_rows == "skip",
            rules=Rules(control_tokens=self.control_tokens, allow=frozenset(self.allow)),
            ignore=frozenset(self.ignore),
            steps=self.steps,
            numbers=self.number_columns,
        )

    def open(self, tools: Tools, *, seed: int) -> DatasetRows:
        """The file, rendered for the learner and checked row by row.

        Raises:
            DataError: a row that cannot be used; names the file and the row.
        """
        return self.rows(tools.reader, seed=seed)

    def rows(self, reader: Reader, *, seed: int = 0) -> DatasetRows:
        """The file, rendered and checked, without loading the model."""
        return DatasetRows(
            self,
            root=reader.root,
            renderer=reader.renderer,
            context=reader.context,
            seed=seed,
            shelf=reader.shelf,
        )

    def tokens(self, groups: float, facts: PlanFacts) -> tuple[float, float]:
        """Exact on average over epochs of the file."""
        rows = self.rows(facts.reader)
        passes = groups / rows.num_groups
        return (rows.num_tokens - rows.num_trainable) * passes, rows.num_trainable * passes


@final
class DatasetRows(PureStream):
    """Groups from a JSONL or Parquet file. A demonstration is a group of one, a pair of two.

    Args:
        spec: the file and how to read it.
        root: the recipe's folder.
        renderer: of the model that will be trained.
        context: the model's context, in tokens.
        seed: of the order.
        shelf: where rendered files are kept; a new one renders.

    Raises:
        ConfigError: this kind of author cannot have written a file.
        DataError: the file is malformed, empty, of another format than the stage reads, or has
            no trainable tokens; names the file and the row.
        ModelError: a file of conversations, and the model has no chat template.
    """

    def __init__(
        self,
        spec: Dataset,
        *,
        root: Path,
        renderer: Renderer,
        context: int,
        seed: int,
        shelf: Shelf | None = None,
    ) -> None:
        writers = ANYONE - {Kind.LEARNER}
        if spec.author not in writers:
            raise ConfigError(
                f"data set {spec.path} with author {spec.author}",
                expected=f"one of {', '.join(sorted(writers))}: a file is written beforehand, by "
                "somebody other than the live learner",
            )
        self._seed, self._renderer = seed, renderer
        how = spec.reading(root)
        made_of = {**plain(spec), "path": digest_of(how.path), "name": how.name}
        self._rendered = (shelf or Shelf()).get(
            (digest(made_of), renderer.digest, context),
            lambda: render_rows(how, renderer=renderer, context=context),
        )
        self._groups = self._rendered.groups

    @property
    def files(self) -> Sequence[DataFile]:
        """The file."""
        return (self._rendered.file,)

    @property
    def format(self) -> Format:
        """The format that was detected or named."""
        return self._rendered.format

    @property
    def num_groups(self) -> int:
        """Rows of the file without the skipped ones."""
        return len(self._groups)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, prompts included; both sides of a pair count."""
        return sum(len(t) for t in self._trajectories())

    @property
    def num_trainable(self) -> int:
        """Tokens that a term may train on, over one epoch."""
        return sum(int(t.trainable.sum()) for t in self._trajectories())

    def preview(self, index: int = 0) -> str:
        """A row as the learner sees it, trained tokens in ⟦ ⟧; a pair in two lines."""
        return "\n".join(self._renderer.show(m.trajectory) for m in self._groups[index].members)

    def draw(self, num_groups: int, *, step: int) -> Sequence[Group]:
        """Groups ``step * num_groups`` and following of endless shuffled epochs.

        Every epoch is another permutation of the rows; a draw may span two of them.
        """
        first = step * num_groups
        return [self._at(position) for position in range(first, first + num_groups)]

    def _at(self, position: int) -> Group:
        epoch, place = divmod(position, len(self._groups))
        return self._groups[int(_order(len(self._groups), seed=self._seed, epoch=epoch)[place])]

    def _trajectories(self) -> Iterator[Trajectory]:
        return (m.trajectory for group in self._groups for m in group.members)


@lru_cache(maxsize=4)
def _order(num_rows: int, *, seed: int, epoch: int) -> npt.NDArray[np.intp]:
    """A permutation of the rows. It sorts raw counter-based random bits, which are stable across
    NumPy versions; ``Generator.permutation`` is not."""
    key = np.array([seed % 2**64, epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(num_rows), kind="stable")
    order.flags.writeable = False
    return order
