"""The values that travel along the path of an example, and the shape legend.

    RawRow → Conversation → Pair(s) → Row → batch

Shapes, used as suffixes on tensors that cross a function:

    B  pairs in one forward (1 for a trie)      T  tokens of a row: of the longest pair, or nodes of the trie
    N  nodes of a trie                          E  edges: learned tokens, each with the node that predicts it
    S  segments of one chunk                    Q  queries of a segment        L  keys of a segment
    H  attention heads      G  key-value heads      D  size of a head or of a hidden state      V  vocabulary

A pair, and the labels that a padded row of it gets (`.` = IGNORE_INDEX):

    token       p0 p1 p2 a0 a1 stop pad        p prompt, a answer
    is_target   .  .  .  a0 a1 stop .          learned: the answer, up to and including the stop token
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

IGNORE_INDEX = -100
"""Label of a position where nothing is learned, as everywhere in the Hugging Face world."""

Message = dict[str, Any]
"""One turn: `role`, `content`; the assistant's may hold `reasoning_content` and `is_target` (False = only read)."""


def first_difference(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the index at which two sequences part; the shorter one's length if it starts the longer one.

    >>> first_difference("abcd", "abx"), first_difference((1, 2), (1, 2, 3))
    (2, 2)
    """
    parted = (at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(parted, min(len(a), len(b)))


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in a file; `where` is "file:line"."""

    where: str
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row in one shape: messages in order; turns without `is_target: False` of the assistant are learned.

    `tools`: what the template is told of tools. `rejected`: the same turns with the answer that was liked less, for
    preference pairs. `text`: plain text to learn whole; then there are no messages.
    """

    where: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    rejected: tuple[Message, ...] = ()
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """The unit of training: what inference sends for one turn, and what the model must then write.

    `prompt_ids`: the exact token ids of the prompt. `answer_ids`: the tokens to learn, the stop token last.
    `num_template_tokens`: how many of `answer_ids` the template wrote (stop token, empty think block); 0 for a piece of
    a plain text that goes on.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    num_template_tokens: int = 1

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class Trie:
    """Pairs with common prefixes merged, nodes in depth-first order: node k is an ancestor of q if k <= q < ends[k].

        pair 1  <sys> S A x </s>        node   0     1  2  3        4 nodes for pair 1, 2 for pair 2: the stop
        pair 2  <sys> S B y </s>               <sys> S  A  x        token is only predicted, never read
                                                     └─ B  y
                                               0     1  4  5        paths: (0 1 2 3, 0 shared), (0 1 4 5, 2 shared)

    `token_ids_N`, `positions_N` (depths) and `ends_N` are int64. `paths`: for each pair that adds nodes, its nodes from
    the root on and how many of them earlier pairs hold already. Edges: `parents_E` predicts `targets_E`, which
    `weights_E` pairs learn there.
    """

    token_ids_N: np.ndarray
    positions_N: np.ndarray
    ends_N: np.ndarray
    paths: tuple[tuple[np.ndarray, int], ...]
    parents_E: np.ndarray
    targets_E: np.ndarray
    weights_E: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids_N)


@dataclass(frozen=True, slots=True)
class Row:
    """A usable row: its pairs stay together in one optimizer step. `index` is its number in the data set.

    `rejected`: of a preference pair, the answer that was liked less, behind the same prompt.
    """

    index: int
    where: str
    pairs: tuple[Pair, ...]
    prompt: tuple[Message, ...] = ()
    answer: str = ""
    rejected: tuple[Pair, ...] = ()


@runtime_checkable
class RowStream(Protocol):
    """Rows that come step by step, without being numbered beforehand."""

    def steps(self, start: int, *, batch_size: int) -> Iterator[tuple[float, list[Row]]]:
        """Yield (epochs done, rows) of each step after `start`."""


def pairs_of(rows: Iterable[Row]) -> list[Pair]:
    """Return the pairs of rows, in order."""
    return [pair for row in rows for pair in row.pairs]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that is not used, said in full: where, why, how to fix it."""

    where: str
    reason: str
    fix: str


@dataclass(frozen=True)
class Report:
    """What the preflight found. The fields are those of `truetune check --json`.

    `rows_overlapping`: held-out rows whose prompt is trained, too. `other_answers`: rows with a prompt that another
    row answers otherwise. `rows_cut`: rows of which an overlong prompt lost its oldest turns. `formats`: rows of each.
    """

    rows_read: int
    rows_used: int
    rows_refused: int
    refused: Sequence[Refusal]
    exact_duplicates: int
    pairs: int
    learned_tokens: int
    learned_template_tokens: int
    total_tokens: int
    trie_tokens: int
    longest: int
    steps: int
    diagnosis: Sequence[str] = ()
    rows_held_out: int = 0
    rows_overlapping: int = 0
    rows_cut: int = 0
    other_answers: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    quantiles: dict[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
