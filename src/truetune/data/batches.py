"""One batch of rows, from what stands in a file to prepared records. No batch depends on another one.

Job          rows as they were read           {"instruction": "Hi", "output": "Yo."}
Rendered     texts of their pairs             <|im_start|>user…      | Yo.<|im_end|>
Done         records of an Arrow file         [151644, 872, …]       | [98965, 151645], and what was counted
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa

from truetune.config import Config
from truetune.data.encode import Encoded
from truetune.data.formats import format_of, ignored_keys, to_conversation
from truetune.data.lengths import MIN_LENGTH, check_lengths, cut_prompts, split_text
from truetune.data.store import RecordBuilder, RowFacts, hash_of, shifted
from truetune.data.tally import Tally
from truetune.data.template import CLOSE_THINKING, Draft, Renderer
from truetune.data.turns import is_target
from truetune.errors import RowError
from truetune.records import Conversation, Pair, RawRow, Row

BATCH_ROWS = 512
"""Rows that are rendered, and then encoded, together."""

Tokens = list[tuple[Encoded, Encoded]]
"""(prompt, rest) of every draft of a batch, in order."""


class OneShape:
    """Refuses recognised rows of another format than the file's first one. `first`: that one, None before it."""

    def __init__(self, first: str | None = None) -> None:
        self.first = first

    def checked(self, raw: RawRow | RowError) -> RawRow | RowError:
        """Return the row, or why it is refused."""
        name = format_of(raw) if isinstance(raw, RawRow) else None
        self.first = self.first or name
        if name in (None, self.first):
            return raw
        return RowError("row_other_shape", where=raw.where, fix="row_other_shape", found=name, first=self.first)


@dataclass(frozen=True)
class Job:
    """Rows that are rendered and encoded together. `raws`: each with the place, among the names given, of its file."""

    first_index: int
    raws: list[tuple[int, RawRow | RowError]]


@dataclass(frozen=True)
class Rendered:
    """A batch half way: the conversations and the texts of their pairs, or why a row is refused."""

    job: Job
    conversations: list[Conversation | RowError]
    drafts: list[list[Draft] | RowError]

    @property
    def texts(self) -> list[Draft]:
        """All drafts, in order."""
        return [draft for some in self.drafts if isinstance(some, list) for draft in some]


@dataclass(frozen=True)
class Done:
    """A batch prepared: the records of its good rows, and what was counted over all of them."""

    records: pa.RecordBatch
    tally: Tally


def numbered(batches: Iterable[Done]) -> Iterator[pa.RecordBatch]:
    """Yield the records of batches in their order, each row's number raised by the rows that texts before it added."""
    num_added = 0
    for done in batches:
        yield shifted(done.records, num_added)
        num_added += done.tally.num_added


@dataclass(frozen=True)
class Preparer:
    """Prepares batches as a run's keys and its template say."""

    config: Config
    renderer: Renderer

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without what the renderer has computed and keeps: it holds a lock."""
        return Preparer, (self.config, replace(self.renderer))

    def run(self, job: Job) -> Done:
        """Prepare a batch from beginning to end."""
        rendered = self.render(job)
        return self.finish(rendered, self.renderer.encode(rendered.texts))

    def render(self, job: Job) -> Rendered:
        """Convert and render the rows of a batch."""
        conversations = [self._converted(raw) for _, raw in job.raws]
        good = [some for some in conversations if isinstance(some, Conversation)]
        found = iter(self.renderer.render(good, last_turn_only=self._is_last_only))
        drafts = [next(found) if isinstance(some, Conversation) else some for some in conversations]
        return Rendered(job, conversations, drafts)

    def finish(self, rendered: Rendered, tokens: Tokens) -> Done:
        """Make the pairs of a batch, keep its good rows and count all."""
        tally, builder, found = Tally(), RecordBuilder(), iter(tokens)
        rows = zip(rendered.job.raws, rendered.conversations, rendered.drafts, strict=True)
        for index, ((source, raw), conversation, drafts) in enumerate(rows, rendered.job.first_index):
            tally.num_read += 1
            if isinstance(drafts, RowError) or isinstance(conversation, RowError) or isinstance(raw, RowError):
                tally.refused.append(next(some for some in (raw, conversation, drafts) if isinstance(some, RowError)))
                continue
            encoded = list(islice(found, len(drafts)))
            try:
                pairs = self.renderer.finish(drafts, encoded, where=raw.where)
                pieces = self._pieces(conversation, pairs)
                fitting = pairs if pieces else self._fitting(conversation, pairs)
                self._check_answers(conversation, fitting)
            except RowError as error:
                tally.refused.append(error)
                continue
            tally.formats[str(format_of(raw))] += 1
            tally.ignored.update(ignored_keys(raw))
            tally.num_cut += fitting != pairs
            tally.num_empty_thinking += sum(draft.rest.startswith(CLOSE_THINKING) for draft in drafts)
            has_system = bool(conversation.messages) and conversation.messages[0]["role"] == "system"
            number = index + tally.num_added
            if pieces:
                self._add_pieces(builder, conversation, pieces, source=source, number=number)
                tally.num_split, tally.num_added = tally.num_split + 1, tally.num_added + len(pieces) - 1
            else:
                facts = RowFacts(source, has_system, is_compared=self._is_preference)
                builder.add(_row(number, conversation, fitting), facts)
        return Done(builder.build(), tally)

    @property
    def _is_last_only(self) -> bool:
        # A preference is about the last answer: earlier ones are its prompt.
        return self.config.train_on == "last_turn" or self._is_preference

    @property
    def _is_preference(self) -> bool:
        return self.config.loss != "sft"

    def _converted(self, raw: RawRow | RowError) -> Conversation | RowError:
        if isinstance(raw, RowError):
            return raw
        try:
            conversation = to_conversation(raw, input_join=self.config.input_join)
        except RowError as error:
            return error
        if self._is_preference and not conversation.rejected:
            return RowError("row_no_rejected", where=raw.where, fix="row_no_rejected", loss=self.config.loss)
        return conversation

    def _check_answers(self, conversation: Conversation, pairs: Sequence[Pair]) -> None:
        """Refuse two answers that are not to one prompt, if they are to be compared, or that are one for the model.

        Raises: RowError.
        """
        if self._is_preference and pairs[0].prompt_ids != pairs[1].prompt_ids:
            raise RowError("row_two_prompts", where=conversation.where, fix="row_two_prompts", loss=self.config.loss)
        if self._is_preference and pairs[0].answer_ids == pairs[1].answer_ids:
            raise RowError("row_same_answers", where=conversation.where, fix="row_same_answers")

    def _fitting(self, conversation: Conversation, pairs: list[Pair]) -> list[Pair]:
        """Return the pairs if they are short enough, or cut where that was asked for.

        Raises: RowError if they are too long.
        """
        limit = self.config.max_length
        if conversation.text is None and self.config.overlong == "cut_prompt" and max(map(len, pairs)) > limit:
            pairs = cut_prompts(
                conversation, pairs, renderer=self.renderer, max_length=limit, last_turn_only=self._is_last_only
            )
        check_lengths(conversation.where, pairs, max_length=limit)
        return pairs

    def _pieces(self, conversation: Conversation, pairs: list[Pair]) -> list[Pair]:
        """Return the pieces of a plain text that is too long for one row, else []."""
        limit = self.config.max_length
        if conversation.text is None or len(pairs[0]) <= limit or limit < MIN_LENGTH:
            return []
        return split_text(pairs[0], max_length=limit, begin=self.renderer.begin_ids)

    def _add_pieces(
        self, builder: RecordBuilder, conversation: Conversation, pieces: Sequence[Pair], *, source: int, number: int
    ) -> None:
        """Add a row for each piece, which shows the text that is learned there."""
        text_hash = hash_of(*(ids for piece in pieces for ids in (piece.prompt_ids, piece.answer_ids)))
        for at, piece in enumerate(pieces):
            where = f"{conversation.where} ({at + 1}/{len(pieces)})"
            shown = self.renderer.tokenizer.decode(piece.answer_ids, skip_special_tokens=False)
            builder.add(Row(number + at, where, (piece,), (), shown), RowFacts(source, text_hash=text_hash))


def _row(index: int, conversation: Conversation, pairs: Sequence[Pair]) -> Row:
    num_chosen = len(pairs) - bool(conversation.rejected)
    prompt, answer = _last_turn(conversation)
    return Row(index, conversation.where, tuple(pairs[:num_chosen]), prompt, answer, tuple(pairs[num_chosen:]))


def _last_turn(conversation: Conversation) -> tuple[tuple[dict[str, Any], ...], str]:
    """Return the messages before the last learned turn, and that turn's text, to show and to ask again."""
    if conversation.text is not None:
        return (), conversation.text
    last = max(number for number, message in enumerate(conversation.messages) if is_target(message))
    return conversation.messages[:last], str(conversation.messages[last]["content"])
