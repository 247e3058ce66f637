"""Groups of rows that are the same, against a dictionary of the rows; nothing of a million of them at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from truetune.config import Config
from truetune.data import duplicates
from truetune.data.duplicates import Duplicates, Group
from truetune.data.prepare import prepare
from truetune.data.store import RecordBuilder, RowWriter, StoredRows
from truetune.data.template import build_renderer
from truetune.records import Pair, Row

USER = {"role": "user", "content": "q"}


def write(path: Path, kinds: list[int], *, batch: int = 7) -> StoredRows:
    """Write rows of which those of one kind are the same, with other text or turns in between, in small batches."""
    with RowWriter(path) as writer:
        for first in range(0, len(kinds), batch):
            builder = RecordBuilder()
            for number, kind in enumerate(kinds[first : first + batch], first):
                pairs = tuple(Pair((1, kind), (3, turn)) for turn in range(1 + kind % 3))
                builder.add(Row(10 * number, f"f:{number}", pairs, (USER,), "a"))
            writer.write(builder.build())
    return StoredRows(path)


def expected(kinds: list[int], numbers: list[int]) -> list[Group]:
    """Group rows the plain way."""
    found: dict[int, list[int]] = {}
    for number in numbers:
        found.setdefault(kinds[number], []).append(number)
    return [
        Group(10 * first, f"f:{first}", len(others), tuple(f"f:{one}" for one in others[: duplicates.MAX_OTHERS]))
        for first, *others in found.values()
        if others
    ]


@pytest.mark.parametrize("block", [1, 5, 1 << 16])
def test_the_groups_are_those_of_a_dictionary(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "BLOCK_ROWS", block)
    monkeypatch.setattr(duplicates, "MAX_OTHERS", 3)
    generator, checked, capped = random.Random(1), 0, 0
    for at, (num_rows, num_kinds) in enumerate([(0, 1), (1, 1), (2, 1), (40, 1), (60, 9), (60, 40), (60, 10_000)]):
        kinds = [generator.randrange(num_kinds) for _ in range(num_rows)]
        rows = write(tmp_path / f"{at}.arrow", kinds)
        # The two sides are in any order and not all of the file.
        side_of = [generator.randrange(5) for _ in kinds]
        train, held_out = (
            np.array([n for n, side in enumerate(side_of) if side in own], int) for own in ((0, 1), (2,))
        )
        found = Duplicates(rows.chosen(train), rows.chosen(held_out))
        used = [n for n, side in enumerate(side_of) if side < 3]
        wanted = expected(kinds, used)
        assert list(found) == wanted
        assert (len(found), found.num_repeats) == (len(wanted), len(used) - len({kinds[n] for n in used}))
        checked += len(wanted)
        capped += sum(group.count > len(group.others) for group in wanted)
    assert checked > 10
    assert capped >= 2


def test_a_row_knows_its_place_beside_all_others(qwen_tokenizer: Any, write_json: Callable[..., Path]) -> None:
    """Held-out rows count, too; other answers, other systems and refused rows do not."""
    rows = [{"instruction": f"q{n}", "output": f"a{n}"} for n in range(40)]
    rows[3] = rows[39] = rows[17]
    rows[20] = rows[21] | {"output": "another"}
    rows[30] = rows[31] | {"system": "S"}
    rows[9] = rows[10] = {"instruction": "refused", "output": ""}
    path = write_json(rows)
    prepared = prepare(Config(data=[str(path)], invalid="skip"), build_renderer(qwen_tokenizer, [151645, 151643]))
    assert len(prepared.held_out) == 8
    (group,) = prepared.duplicates()
    assert (group.row, group.count) == (3, 2)
    assert prepared.report.exact_duplicates == prepared.duplicates().num_repeats == 2
    places = {row.index: row.where for row in [*prepared.train, *prepared.held_out]}
    assert (group.where, group.others) == (places[3], (places[17], places[39]))
