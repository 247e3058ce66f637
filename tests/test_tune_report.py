"""What a search says of itself: the same numbers in table, page and sentences, in both languages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from truetune import tune_report
from truetune.config import Config, dump, resolve
from truetune.search import COMPLETE, FAILED, PRUNED, Trial
from truetune.tunedir import TuneDir


def made(number: int, loss: float, *, state: str = COMPLETE, rank: int = 8, spread: float = 0.01) -> Trial:
    """A trial on four rows of ten tokens."""
    values = {"learning_rate": 1e-4 * (number + 1), "lora_r": rank, "lora_alpha": 2 * rank}
    rows = tuple(10 * loss + spread * sign for sign in (1, -1, 2, -2)) if state == COMPLETE else ()
    evaluations = ((0, 3.0), (4, loss)) if state != FAILED else ((0, 3.0),)
    problem = "the loss is nan" if state == FAILED else ""
    return Trial(
        number, state, values, evaluations, loss if rows else None, 1.5, rows, (10,) * len(rows), problem=problem
    )


@pytest.fixture
def folder(tmp_path: Path) -> TuneDir:
    """A search of two ranks in which one trial was given up and one failed."""
    found = TuneDir(tmp_path)
    info = {"model": "m<b>", "data": ["d.json"], "is_trial_length": True, "chosen": {"max_steps": 4}}
    found.begin(dump(Config(model="m", data=["d.json"], max_steps=4, output_dir=str(tmp_path))), info)
    for trial in (
        made(0, 2.0, spread=0.5),
        made(1, 1.5, rank=16),
        made(2, 2.9, state=PRUNED),
        made(3, 0, state=FAILED),
        made(4, 1.501, spread=0.4),
    ):
        found.append(trial)
    return found


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_file_says_the_same(lang: str, folder: TuneDir) -> None:
    tune_report.write(folder, lang=lang)
    page = (folder.path / "tune.html").read_text(encoding="utf-8")
    markdown = (folder.path / "tune.md").read_text(encoding="utf-8")
    rows = tune_report.table(folder.read_trials(), lang)
    assert [row[0] for row in rows] == ["2", "5", "1", "3", "4"]
    assert rows[0][4] == "-"
    assert rows[2][4].startswith("+0.5000 ± ")
    for row in rows:
        assert all(cell in page and cell in markdown for cell in row)
    said = tune_report.sentences(folder, folder.read_trials(), lang=lang)
    assert len(said) == 5
    assert all(sentence in markdown for sentence in said)
    assert page.count("<polyline") == 5
    assert page.count('class="dot') == 5
    assert ("http" in page, "<script" in page, "m<b>" in page, "m&lt;b&gt;" in page) == (False, False, False, True)


def test_best_yaml_is_the_configuration_with_the_best_values(folder: TuneDir) -> None:
    tune_report.write(folder, lang="en")
    best = resolve({}, folder.best).config
    assert (best.learning_rate, best.lora_r, best.lora_alpha) == (2e-4, 16, 32)
    # The trials' steps and the search's folder are not the run's.
    assert (best.max_steps, best.output_dir, best.data) == (None, None, ["d.json"])


def test_steps_that_stood_in_a_file_are_those_of_the_run(folder: TuneDir) -> None:
    folder.begin(folder.config.read_text(), folder.read_info() | {"is_trial_length": False})
    assert tune_report.best_config(folder, folder.read_trials()[1]).max_steps == 4


def test_a_gain_is_told_from_noise(folder: TuneDir) -> None:
    one, two, *_ = folder.read_trials()
    noisy = replace(two, row_losses=tuple(loss + by for loss, by in zip(one.row_losses, (8, -9, 7, -8), strict=True)))

    def said(*trials: Trial) -> str:
        return " ".join(tune_report.sentences(folder, trials, lang="en"))

    assert "0.5000 more" in said(one, two)
    assert "which is more than noise" in said(one, two)
    assert "That is noise" in said(one, noisy)
    assert "nothing that was tried is better" in said(replace(one, loss=1.0), two)
    assert "did not come to its end" in said(made(0, 0, state=FAILED), two)
    assert "1 more trials cannot be told" in said(*folder.read_trials())
    assert said(made(0, 0, state=FAILED)) == "0 trials were given up early, 1 failed."


def test_points_lie_where_their_numbers_say(folder: TuneDir) -> None:
    """Lower is better and lower on the page; the rates are spread by their logarithms; a failed one is at the top."""
    trials = folder.read_trials()
    plot = tune_report._plot(trials, trials[1], "en")
    xs, ys = ([point[name] for point in plot["points"]] for name in "xy")
    assert xs == sorted(xs)
    assert (xs[0], xs[-1]) == (4.0, 96.0)
    assert xs[1] - xs[0] == pytest.approx(xs[3] - xs[1], abs=0.01)
    assert ys[1] == max(ys) == 96.0
    assert ys[3] == 4.0
    assert plot["best"] == plot["points"][1]
    assert len(plot["colours"]) == len(set(plot["colours"].values())) == 2
    assert plot["points"][0]["colour"] != plot["points"][1]["colour"]


def test_nothing_yet_is_no_page_that_breaks(folder: TuneDir) -> None:
    folder.trials.unlink()
    tune_report.write(folder, lang="en")
    assert "<svg" not in (folder.path / "tune.html").read_text()
    assert not folder.best.exists()
