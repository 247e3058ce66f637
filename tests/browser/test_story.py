"""The whole story in the browser: data, mask, training, spike, stop, resume, chat, report, export.

In English on the real small model, in Chinese on a tiny one: the same functions, labels by their keys in the catalogue.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.browser.conftest import Studio, Tab, step_number, until
from truetune.data.store import StoredRows
from truetune.messages import CATALOGUES, text

ROOT = Path(__file__).resolve().parents[2]
BATCH = 4
MINUTES_MS = 240_000


@dataclass
class Story:
    """A tab, and what is told in it. `thinking`: what the template writes before an answer; `word`: looked for."""

    tab: Tab
    studio: Studio
    lang: str
    data: Path
    rows: list[dict[str, str]]
    model: Path
    num_steps: int
    save_steps: int
    word: str
    thinking: str = ""
    name: str = field(default="", init=False)

    @property
    def page(self) -> Any:
        """The page."""
        return self.tab.page

    def says(self, key: str, **values: Any) -> str:
        """Return what the page calls something."""
        return text(f"studio.{key}", self.lang, **values)

    def press(self, key: str) -> None:
        """Press a button."""
        self.page.get_by_role("button", name=self.says(key), exact=True).first.click()

    def shot(self, name: str, *, at: str = "header") -> None:
        """Keep a picture, under a name of its language."""
        self.tab.shot(name if self.lang == "en" else f"{name}-{self.lang}", at=at)


def lighthouse() -> list[dict[str, str]]:
    """The lighthouse keeper's first rows, and one of them again."""
    rows: list[dict[str, str]] = json.loads((ROOT / "examples" / "lighthouse.json").read_text(encoding="utf-8"))
    return [*rows[:160], rows[5]]


def harbours() -> list[dict[str, str]]:
    """Rows in Chinese, and one of them again."""
    rows = [{"instruction": f"第 {n} 号港口有几座灯塔？", "output": f"有 {n % 7 + 1} 座，都亮着。"} for n in range(80)]
    return [*rows, rows[5]]


def test_the_whole_story(open_tab: Any, studio: Studio, smol: Path, tmp_path: Path) -> None:
    story = Story(open_tab("data"), studio, "en", tmp_path / "lighthouse.json", lighthouse(), smol, 36, 4, "cat")
    tell(story)
    phone = open_tab(f"run/{story.name}", lang="zh", scheme="dark", width="phone")
    phone.page.locator(".chart canvas").first.wait_for()
    phone.shot("phone")


def test_the_whole_story_in_chinese(open_tab: Any, studio: Studio, tiny_qwen: Path, tmp_path: Path) -> None:
    tab, data = open_tab("data", lang="zh"), tmp_path / "港口.json"
    thinking = "<think>\n\n</think>\n\n"
    tell(Story(tab, studio, "zh", data, harbours(), tiny_qwen, 500, 50, "17 号", thinking))


def tell(story: Story) -> None:
    """All of it, from a file to a file."""
    story.data.write_text(json.dumps(story.rows, ensure_ascii=False), encoding="utf-8")
    trained = see_the_mask(story)
    see_what_is_repeated(story)
    begin_training(story)
    survive(story)
    moves(story)
    stop_and_resume(story)
    click_a_spike(story)
    story.page.locator(".badge.done").first.wait_for(timeout=MINUTES_MS)
    story.shot("step", at=".curve-bar")
    story.press("close")
    story.shot("run")
    samples(story)
    read_the_report(story)
    export(story)
    # What was trained is what is sent: the same question has the same ids, in the page, too.
    assert chat(story) == trained


def survive(story: Story) -> None:
    """A reload in the middle loses nothing, nor does the end of the studio itself."""
    page, studio = story.page, story.studio
    until(page, "/^[1-9]/.test(document.querySelector('.tiles dd')?.textContent)")
    before = step_number(page)
    page.reload()
    page.locator(".chart canvas").first.wait_for()
    assert step_number(page) >= before
    page.goto("about:blank")
    studio.kill()
    studio.start()
    page.goto(f"{studio.url}#/run/{story.name}")
    page.locator(".badge.running").wait_for()


def drop(page: Any, path: Path) -> None:
    """Drop a file on the page, as a hand does."""
    dropped = page.evaluate_handle(
        """([name, text]) => { const data = new DataTransfer();
           data.items.add(new File([text], name, {type: "application/json"})); return data; }""",
        [path.name, path.read_text(encoding="utf-8")],
    )
    page.dispatch_event(".drop", "dragover", {"dataTransfer": dropped})
    page.dispatch_event(".drop", "drop", {"dataTransfer": dropped})


def see_the_mask(story: Story) -> list[int]:
    """Drop a file, check it, see which tokens are learned, find a row; return the ids of the first row's prompt."""
    page = story.page
    drop(page, story.data)
    page.locator(".chip", has_text=story.data.name).wait_for()
    page.get_by_label(story.says("model")).fill(str(story.model))
    story.press("check")
    page.locator(".bubble.learned").first.wait_for(timeout=MINUTES_MS)
    assert page.locator("article.row").count() == 10
    assert page.locator("svg.bars rect").count() > 5
    story.shot("data", at=".rows-bar")
    story.press("view_tokens")
    first = page.locator("article.row").first
    learned = "".join(first.locator(".token.learned").all_inner_texts()).replace("↵", "")
    row = story.rows[0]
    assert learned == (story.thinking + row["output"] + "<|im_end|>")
    assert first.locator(".token.special").count() >= 4
    page.get_by_label(story.says("show_ids")).check()
    ids = [int(text) for text in first.locator(".token.learned sub").all_inner_texts()]
    assert ids == answer_ids(story.model, learned)
    prompt = [int(text) for text in first.locator(".token.prompt sub").all_inner_texts()]
    story.shot("tokens", at=".rows-bar")
    page.get_by_label(story.says("search")).fill(story.word)
    is_found = f"row.innerText.includes({json.dumps(story.word)})"
    page.get_by_role("button", name=story.says("view_chat"), exact=True).click()
    until(page, f"[...document.querySelectorAll('article.row')].every(row => {is_found})")
    assert page.locator("article.row").count() > 0
    return prompt


def answer_ids(model: Path, text: str) -> list[int]:
    """What the tokenizer itself makes of the answer."""
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(model / "tokenizer.json")).encode(text, add_special_tokens=False).ids)


def see_what_is_repeated(story: Story) -> None:
    """The row that stands twice, and where it stands again."""
    page = story.page
    page.get_by_role("button", name=story.says("side_repeated", count=1), exact=True).click()
    page.locator("article.row .again").wait_for()
    assert page.locator("article.row").count() == 1
    assert story.rows[5]["output"] in page.locator("article.row").inner_text()
    assert story.says("repeated_in", count=1) in page.locator(".again").inner_text()
    places = page.locator("article.row .where").all_inner_texts()
    assert [re.split(r"\D+", place)[-1] for place in places] == [str(number) for number in (6, len(story.rows))]
    story.shot("repeated", at=".rows-bar")


def begin_training(story: Story) -> None:
    """Fill in the form, start, and keep the run's name once its page is there."""
    page = story.page
    page.get_by_role("link", name=story.says("go_train")).click()
    page.get_by_label("batch_size", exact=True).fill(str(BATCH))
    page.get_by_label("learning_rate", exact=True).fill("0.003")
    page.locator("form details > summary").click()
    page.get_by_label("max_steps", exact=True).fill(str(story.num_steps))
    page.get_by_label("num_train_epochs", exact=True).fill("50")
    page.get_by_label("save_steps", exact=True).fill(str(story.save_steps))
    page.get_by_label("eval_steps", exact=True).fill(str(story.num_steps // 3))
    page.locator("form details > summary").click()
    assert f"--max-steps {story.num_steps}" in page.locator(".command code").first.inner_text()
    story.shot("train")
    story.press("start")
    page.wait_for_url("**/#/run/**", timeout=MINUTES_MS)
    story.name = unquote(page.url.rpartition("/")[2])


def moves(story: Story) -> None:
    """The curve moves while one looks."""
    before = step_number(story.page)
    until(story.page, f"{STEP} >= {before + 2}")


STEP = "Number(document.querySelector('.tiles dd').textContent.split('/')[0])"


def stop_and_resume(story: Story) -> None:
    """Stop the run in the middle; go on with it."""
    page = story.page
    until(page, f"{STEP} >= 8")
    story.press("stop")
    page.locator(".badge.stopped").first.wait_for(timeout=MINUTES_MS)
    stopped_at = step_number(page)
    assert 8 <= stopped_at < story.num_steps
    story.press("resume")
    page.locator(".badge.running").first.wait_for(timeout=MINUTES_MS)
    until(page, f"{STEP} > {stopped_at}")


def click_a_spike(story: Story) -> None:
    """Click a point of the curve, and a step that stands out: their rows, as the run's folder has them."""
    page = story.page
    over = page.locator(".chart .u-over").first
    size = over.bounding_box()
    over.click(position={"x": size["width"] * 0.4, "y": size["height"] / 2})
    page.locator(".step-rows article.row").first.wait_for()
    assert page.locator(".step-rows article.row").count() == BATCH
    spike = page.locator(".spikes button").first
    step = int(re.sub(r"\D.*", "", spike.inner_text()))
    spike.click()
    page.get_by_role("heading", name=story.says("rows_of_step", step=step), exact=True).wait_for()
    page.get_by_label(story.says("rows_of"), exact=True).fill("3")
    story.press("show")
    page.get_by_role("heading", name=story.says("rows_of_step", step=3), exact=True).wait_for()
    run = story.studio.home / "runs" / story.name
    lines = map(json.loads, (run / "steps.jsonl").read_text(encoding="utf-8").splitlines())
    numbers = next(line["rows"] for line in lines if line["step"] == 3)
    answers = {row.index: row.answer for row in StoredRows(run / "data" / "train.arrow")}
    until(page, f"document.querySelector('.step-rows').innerText.includes({json.dumps(answers[numbers[0]])})")
    shown = page.locator(".step-rows").inner_text()
    assert all(answers[number] in shown for number in numbers)


def samples(story: Story) -> None:
    """Base and tuned answers, taken while it trained."""
    page = story.page
    story.press("part_samples")
    page.locator(".sides .tuned").first.wait_for()
    assert page.locator("article.row").count() == 4
    story.shot("samples")


def read_the_report(story: Story) -> None:
    """The report card, in a frame that may run nothing."""
    page = story.page
    story.press("part_report")
    frame = page.frame_locator("iframe.report")
    frame.locator(".verdict").wait_for()
    assert frame.locator(".answer").count() > 0
    story.shot("report")


def export(story: Story) -> None:
    """Verify the run; export it, see how far the file is from the adapter, and find it."""
    home = story.studio.home
    story.press("part_use")
    story.press("verify_title")
    card(story, "verify_title").locator(".job .badge.done").wait_for(timeout=MINUTES_MS)
    compared = CATALOGUES[story.lang]["export.drift"].split("}")[1].partition("{")[0]
    for key, output in {"gguf_title": f"{story.name}.gguf", "ollama_title": f"{story.name}-ollama"}.items():
        made = card(story, key)
        assert made.get_by_label(story.says("output_to")).input_value() == f"runs/{output}"
        assert not (home / "runs" / output).exists()
        made.get_by_role("button", name=story.says(key), exact=True).click()
        made.locator(".job .badge.running").wait_for()
        assert made.get_by_role("button", name=story.says("working"), exact=True).is_disabled()
        made.locator(".job .badge:not(.running)").wait_for(timeout=MINUTES_MS)
        told = made.locator("pre.log").inner_text()
        assert made.locator(".job .badge.done").count() == 1, told
        assert compared in told
        drift = [float(number) for number in re.findall(r"KL ([\d.]+e[-+]\d+)", told)]
        assert drift
        assert max(drift) < 1e-2
        assert (home / "runs" / output).exists()
    assert (home / "runs" / f"{story.name}.gguf").read_bytes()[:4] == b"GGUF"
    assert (home / "runs" / f"{story.name}-ollama" / "Modelfile").read_text(encoding="utf-8").startswith("FROM ")
    story.shot("use")


def card(story: Story, key: str) -> Any:
    """The card of one way to use a run."""
    return story.page.locator("form.card", has=story.page.get_by_role("heading", name=story.says(key), exact=True))


def chat(story: Story) -> list[int]:
    """Ask both, see the ids, keep the answer as a row; return the ids of the prompt."""
    page = story.page
    page.get_by_role("link", name=story.says("tab_chat")).first.click()
    page.locator("select").select_option(story.name)
    page.get_by_label(story.says("question"), exact=True).fill(story.rows[0]["instruction"])
    story.press("ask")
    page.get_by_role("button", name=story.says("new_talk"), exact=True).wait_for(timeout=MINUTES_MS)
    answers = page.locator(".turn .sides .content").all_inner_texts()
    assert len(answers) == 2
    # A tiny model of random weights learns to say nothing, which is no row to keep.
    is_silent = story.lang == "zh" and not answers[1]
    assert answers[0] if is_silent else all(answers)
    assert answers[0] != answers[1]
    story.press("prompt_ids")
    page.locator(".turn .tokens sub").first.wait_for()
    ids = [int(text) for text in page.locator(".turn .tokens sub").all_inner_texts()]
    story.shot("chat", at=".turns")
    if is_silent:
        return ids
    story.press("good")
    story.press("save_row")
    page.locator("p[role=status]").wait_for()
    before, after = story.says("saved_row", path="\n").split("\n")
    saved = page.locator("p[role=status]").inner_text().removeprefix(before.strip()).removesuffix(after).strip()
    lines = (story.studio.home / saved).read_text(encoding="utf-8").splitlines()
    messages = json.loads(lines[-1])["messages"]
    assert [message["role"] for message in messages][-2:] == ["user", "assistant"]
    assert messages[-1]["content"] == answers[1]
    return ids
