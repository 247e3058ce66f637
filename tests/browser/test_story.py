"""The whole story in the browser, on the real small model: data, mask, training, spike, stop, resume, chat, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Studio, step_number, until

ROOT = Path(__file__).resolve().parents[2]
NUM_ROWS, BATCH, NUM_STEPS, STOP_AT = 160, 4, 36, 8
MINUTES_MS = 240_000
QUESTION = "Who are you?"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lighthouse keeper's first rows."""
    path = tmp_path_factory.mktemp("data") / "lighthouse.json"
    rows = json.loads((ROOT / "examples" / "lighthouse.json").read_text(encoding="utf-8"))
    path.write_text(json.dumps(rows[:NUM_ROWS], ensure_ascii=False), encoding="utf-8")
    return path


def drop(page: Any, path: Path) -> None:
    """Drop a file on the page, as a hand does."""
    dropped = page.evaluate_handle(
        """([name, text]) => { const data = new DataTransfer();
           data.items.add(new File([text], name, {type: "application/json"})); return data; }""",
        [path.name, path.read_text(encoding="utf-8")],
    )
    page.dispatch_event(".drop", "dragover", {"dataTransfer": dropped})
    page.dispatch_event(".drop", "drop", {"dataTransfer": dropped})


def test_the_whole_story(open_tab: Any, studio: Studio, smol: Path, rows: Path) -> None:
    model = studio.home / "SmolLM2-135M-Instruct"
    model.symlink_to(smol)
    tab = open_tab("data")
    page = tab.page
    trained = see_the_mask(tab, rows, model)
    name = begin_training(tab)
    # A reload in the middle loses nothing, nor does the end of the studio itself.
    until(page, "/^[1-9]/.test(document.querySelector('.tiles dd')?.textContent)")
    before = step_number(page)
    page.reload()
    page.locator(".chart canvas").first.wait_for()
    assert step_number(page) >= before
    page.goto("about:blank")
    studio.kill()
    studio.start()
    page.goto(f"{studio.url}#/run/{name}")
    page.locator(".badge.running").wait_for()
    moves(page)
    stop_and_resume(page)
    click_a_spike(tab)
    page.locator(".badge.done").wait_for(timeout=MINUTES_MS)
    tab.shot("step", at=".curve-bar")
    page.get_by_role("button", name="Close").click()
    tab.shot("run")
    samples(tab)
    read_the_report(tab)
    # What was trained is what is sent: the same question has the same ids, in the page, too.
    assert chat(tab, name, studio) == trained
    phone = open_tab(f"run/{name}", lang="zh", scheme="dark", width="phone")
    phone.page.locator(".chart canvas").first.wait_for()
    phone.shot("phone")


def see_the_mask(tab: Any, rows: Path, model: Path) -> list[int]:
    """Drop a file, check it, see which tokens are learned, find a row; return the ids of the first row's prompt."""
    page = tab.page
    drop(page, rows)
    page.locator(".chip", has_text="lighthouse.json").wait_for()
    page.get_by_label("Base model").fill(model.name)
    page.get_by_role("button", name="Check", exact=True).click()
    page.locator(".bubble.learned").first.wait_for(timeout=MINUTES_MS)
    assert page.locator("article.row").count() == 10
    assert page.locator("svg.bars rect").count() > 5
    tab.shot("data", at=".rows-bar")
    page.get_by_role("button", name="Tokens", exact=True).click()
    first = page.locator("article.row").first
    learned = "".join(first.locator(".token.learned").all_inner_texts())
    row = json.loads(rows.read_text(encoding="utf-8"))[0]
    assert learned == row["output"] + "<|im_end|>"
    assert first.locator(".token.special").count() >= 4
    page.get_by_label("token ids").check()
    ids = [int(text) for text in first.locator(".token.learned sub").all_inner_texts()]
    assert ids == answer_ids(model, learned)
    prompt = [int(text) for text in first.locator(".token.prompt sub").all_inner_texts()]
    tab.shot("tokens", at=".rows-bar")
    page.get_by_label("Search").fill("cat")
    until(page, "[...document.querySelectorAll('article.row')].every(row => row.innerText.includes('cat'))")
    assert page.locator("article.row").count() > 0
    assert row["instruction"] == QUESTION
    return prompt


def answer_ids(model: Path, text: str) -> list[int]:
    """What the tokenizer itself makes of the answer."""
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(model / "tokenizer.json")).encode(text, add_special_tokens=False).ids)


def begin_training(tab: Any) -> str:
    """Fill in the form, start, and return the run's name once its page is there."""
    page = tab.page
    page.get_by_role("link", name="Go on to training").click()
    page.get_by_label("batch_size", exact=True).fill(str(BATCH))
    page.get_by_label("learning_rate", exact=True).fill("0.003")
    page.get_by_text("All settings").click()
    page.get_by_label("max_steps", exact=True).fill(str(NUM_STEPS))
    page.get_by_label("save_steps", exact=True).fill("4")
    page.get_by_label("eval_steps", exact=True).fill("12")
    page.get_by_text("All settings").click()
    assert f"--max-steps {NUM_STEPS}" in page.locator(".command code").first.inner_text()
    tab.shot("train")
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url("**/#/run/**", timeout=MINUTES_MS)
    return str(page.url.rpartition("/")[2])


def moves(page: Any) -> None:
    """The curve moves while one looks."""
    before = step_number(page)
    until(page, f"Number(document.querySelector('.tiles dd').textContent.split('/')[0]) >= {before + 2}")


def stop_and_resume(page: Any) -> None:
    """Stop the run in the middle; go on with it."""
    until(page, f"Number(document.querySelector('.tiles dd').textContent.split('/')[0]) >= {STOP_AT}")
    page.get_by_role("button", name="Stop").click()
    page.locator(".badge.stopped").wait_for(timeout=MINUTES_MS)
    stopped_at = step_number(page)
    assert STOP_AT <= stopped_at < NUM_STEPS
    page.get_by_role("button", name="Resume").click()
    page.locator(".badge.running").wait_for(timeout=MINUTES_MS)
    until(page, f"Number(document.querySelector('.tiles dd').textContent.split('/')[0]) > {stopped_at}")


def click_a_spike(tab: Any) -> None:
    """Click a point of the curve: the rows of that step, as steps.jsonl has them."""
    page = tab.page
    over = page.locator(".chart .u-over").first
    size = over.bounding_box()
    over.click(position={"x": size["width"] * 0.4, "y": size["height"] / 2})
    page.locator(".step-rows article.row").first.wait_for()
    assert page.locator(".step-rows article.row").count() == BATCH
    title = page.locator("#step-title").inner_text()
    page.get_by_label("Rows of step").fill("3")
    page.get_by_role("button", name="Show").click()
    page.get_by_role("heading", name="Rows of step 3", exact=True).wait_for()
    assert title.startswith("Rows of step")


def samples(tab: Any) -> None:
    """Base and tuned answers, taken while it trained."""
    page = tab.page
    page.get_by_role("button", name="Samples").click()
    page.locator(".sides .tuned").first.wait_for()
    assert page.locator("article.row").count() == 4
    tab.shot("samples")


def read_the_report(tab: Any) -> None:
    """The report card, in a frame that may run nothing."""
    page = tab.page
    page.get_by_role("button", name="Report").click()
    frame = page.frame_locator("iframe.report")
    frame.locator(".verdict").wait_for()
    assert frame.locator(".answer").count() > 0
    tab.shot("report")
    page.get_by_role("button", name="Merge and export").click()
    page.get_by_role("button", name="Verify").click()
    page.locator(".job .badge.done").wait_for(timeout=MINUTES_MS)
    tab.shot("use")


def chat(tab: Any, name: str, studio: Studio) -> list[int]:
    """Ask both, see the ids, keep the answer as a row; return the ids of the prompt."""
    page = tab.page
    page.get_by_role("link", name="Compare and chat").first.click()
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("button", name="New talk").wait_for(timeout=MINUTES_MS)
    answers = page.locator(".turn .sides .content").all_inner_texts()
    assert len(answers) == 2
    assert all(answers)
    assert answers[0] != answers[1]
    page.get_by_role("button", name="Token ids of the prompt").click()
    page.locator(".turn .tokens sub").first.wait_for()
    ids = [int(text) for text in page.locator(".turn .tokens sub").all_inner_texts()]
    tab.shot("chat", at=".turns")
    page.get_by_role("button", name="The tuned answer is good").click()
    page.get_by_role("button", name="Save as training row").click()
    page.get_by_role("status").wait_for()
    saved = page.get_by_role("status").inner_text().removeprefix("Saved in ").strip()
    lines = (studio.home / saved).read_text(encoding="utf-8").splitlines()
    messages = json.loads(lines[-1])["messages"]
    assert [message["role"] for message in messages][-2:] == ["user", "assistant"]
    assert messages[-1]["content"] == answers[1]
    return ids
