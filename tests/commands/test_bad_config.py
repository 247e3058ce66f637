"""trust.md's table C, a test for each line: bad values, bad models, bad folders. Exit code, and what is said of it.

C8 and C12 belong to use and merging; the rest is here. Nothing is written in any of these cases.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from truetune.cli import run
from truetune.messages import text
from truetune.rundir import RunDir

Edit = Callable[[Path], None]


def _write(name: str, content: str | bytes) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return edit


def _json(name: str, **values: Any) -> Edit:
    """Change values of a JSON file; None removes one."""

    def edit(folder: Path) -> None:
        path = folder / name
        changed = {k: v for k, v in {**json.loads(path.read_text()), **values}.items() if v is not None}
        path.write_text(json.dumps(changed))

    return edit


def _without(*names: str) -> Edit:
    def edit(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return edit


def _all(*edits: Edit) -> Edit:
    def edit(folder: Path) -> None:
        for some in edits:
            some(folder)

    return edit


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + 3 * "{% endfor %}"
NO_STOP = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
NO_ANSWER = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"

# (line of the table, text of the configuration file, flags, part of what is said; `{…}` of its texts left out)
CONFIGS: list[tuple[str, str, tuple[str, ...], str]] = [
    ("C1", "learning_rate: fast", (), "learning_rate cannot be 'fast'"),
    ("C1", "batch_size: yes", (), "batch_size cannot be True"),
    ("C1", "lora_r: 8.5", (), "lora_r cannot be 8.5"),
    ("C1", "", ("--learning-rate", "fast"), "learning_rate cannot be 'fast'"),
    ("C2", "learnig_rate: 1e-4", (), 'Did you mean "learning_rate"?'),
    ("C2", "", ("--learnig-rate", "1e-4"), 'Did you mean "--learning-rate"?'),
    ("C3", "num_train_epochs: -1", (), "num_train_epochs cannot be -1: greater than 0"),
    ("C3", "num_train_epochs: 0", (), "num_train_epochs cannot be 0: greater than 0"),
    ("C3", "num_train_epochs: .inf", (), "num_train_epochs cannot be inf"),
    ("C3", "batch_size: 0", (), "batch_size cannot be 0: greater than 0"),
    ("C3", "learning_rate: 0", (), "learning_rate cannot be 0: greater than 0"),
    ("C3", "learning_rate: .nan", (), "learning_rate cannot be nan"),
    ("C3", "max_length: -5", (), "max_length cannot be -5: greater than 0"),
    ("C3", "save_steps: 0", (), "save_steps cannot be 0"),
    ("C4", "lora_r: 0", (), "lora_r cannot be 0: greater than 0"),
    ("C4", "lora_alpha: 0", (), "lora_alpha cannot be 0: greater than 0"),
    ("C4", "lora_dropout: 1", (), "lora_dropout cannot be 1: less than 1"),
    ("C5", "target_modules: [q_prj]", (), "q_proj"),
    ("C5", "target_modules: [q_proj, nothing]", (), "nothing"),
    ("C13", "eval_split: 1", (), "eval_split cannot be 1: less than 1"),
    ("C13", "eval_split: -0.1", (), "eval_split cannot be -0.1: greater than or equal to 0"),
    ("C13", "eval_split: 40", (), "eval_split cannot be 40: less than 1"),
    ("C16", "lora_r: 8\nlora_r: 4", (), 'the key "lora_r" is given twice'),
    ("C16", "lora_r:\t8\n\tx: 1", (), "not YAML"),
    ("C16", "lora_r: !!python/object/apply:os.system [echo]", (), "not YAML"),
    ("C17", "swanlab_api_key: abc", (), "environment variable"),
]


@pytest.fixture
def train(rows: list[dict[str, str]], tiny_base: Path, tmp_path: Path) -> Callable[..., int]:
    """Run `truetune train` on good rows with a model of one's own; nothing may be written."""
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    def call(*more: str, model: Path | str = tiny_base) -> int:
        out = tmp_path / "out"
        words = ["train", str(tmp_path / "rows.json"), "--model", str(model), "--output-dir", str(out), *more]
        code = run([*words, "--max-steps", "1"])
        assert not out.exists() or code == 0
        return code

    return call


@pytest.mark.parametrize(("line", "config", "flags", "said"), CONFIGS, ids=[f"{c[0]} {c[1] or c[2]}" for c in CONFIGS])
def test_configuration(
    line: str,
    config: str,
    flags: tuple[str, ...],
    said: str,
    train: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(config)
    assert train("--config", str(path), *flags) == 2
    err = capsys.readouterr().err
    assert said in err
    assert (str(path) in err) == (not flags and line != "C5")


def test_a_number_that_yaml_reads_as_text_is_a_number(train: Callable[..., int], tmp_path: Path) -> None:
    """C1: `1e-4` without a point is text for YAML."""
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-4\n")
    assert train("--config", str(tmp_path / "c.yaml")) == 0


MODELS: list[tuple[str, Edit, str]] = [
    ("C7", _without("config.json"), "error.model_no_config"),
    ("C7", _all(_without("model.safetensors"), _write("pytorch_model.bin", b"\x80\x04N.")), "error.model_pickle"),
    ("C9", _without("chat_template.jinja"), "error.template_missing"),
    ("C10", _write("chat_template.jinja", "{{ raise_exception('no') }}"), "rows cannot be used"),
    ("C10", _write("chat_template.jinja", NO_ANSWER), "rows cannot be used"),
    ("C10", _write("chat_template.jinja", "{{ messages"), "unexpected end of template"),
]


@pytest.mark.parametrize(("line", "edit", "key"), MODELS, ids=[f"{line} {n}" for n, (line, *_) in enumerate(MODELS)])
def test_model(
    line: str,
    edit: Edit,
    key: str,
    train: Callable[..., int],
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_base, model)
    edit(model)
    assert train(model=model) == 2
    said = text(key, file="pytorch_model.bin") if key.startswith("error.") else key
    assert said in capsys.readouterr().err


def test_an_offline_hub_id_and_a_path_take_no_time(
    train: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """C6: two seconds at most, and no network unless it is asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-model", "./models/none"):
        began = time.monotonic()
        assert train(model=name) == 2
        assert time.monotonic() - began < 2
        assert name in capsys.readouterr().err


def test_a_template_that_loops_ends(
    train: Callable[..., int],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """C10: a limit of time."""
    monkeypatch.setattr("truetune.data.template.TIME_LIMIT_S", 0.05)
    model = tmp_path / "model"
    shutil.copytree(tiny_base, model)
    (model / "chat_template.jinja").write_text(LOOP)
    assert train(model=model) == 2
    assert "40 rows cannot be used" in capsys.readouterr().err


def test_a_template_without_a_stop_gets_one(train: Callable[..., int], tiny_base: Path, tmp_path: Path) -> None:
    """C10: it is appended, and said so (GLM-4's templates are like that)."""
    model = tmp_path / "model"
    shutil.copytree(tiny_base, model)
    (model / "chat_template.jinja").write_text(NO_STOP)
    assert train(model=model) == 0


def test_more_tokens_than_embeddings(
    train: Callable[..., int], tiny_qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """C11: refused with both numbers, if the data hold such a token."""
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_qwen, model)
    weights = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = weights[name][:151_000].contiguous()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    _json("config.json", vocab_size=151_000)(model)
    assert train(model=model) == 2
    assert text("error.tokenizer_too_large", id=151668, rows=151_000) in capsys.readouterr().err


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_padding_that_is_the_stop_token_or_missing(
    pad: str | None, train: Callable[..., int], tiny_base: Path, tmp_path: Path
) -> None:
    """C11: the stop token is learned all the same, since nothing is masked by its id."""
    model = tmp_path / "model"
    shutil.copytree(tiny_base, model)
    _json("tokenizer_config.json", pad_token=pad)(model)
    assert train("--attention", "padded", model=model) == 0
    rows = (tmp_path / "out" / "data" / "train.arrow").stat().st_size
    assert rows > 0


def test_more_held_out_than_there_is(train: Callable[..., int], tmp_path: Path) -> None:
    """C13: at most half of the rows is held out, whatever the share."""
    assert train("--eval-split", "0.99") == 0
    import pyarrow as pa

    with pa.memory_map(str(tmp_path / "out" / "data" / "train.arrow")) as source:
        assert pa.ipc.open_file(source).read_all().num_rows == 20


def test_a_folder_of_another_run(train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """C14: neither overwritten nor mixed."""
    assert train() == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    words = ["train", str(tmp_path / "rows.json"), "--model", "x", "--output-dir", str(tmp_path / "out")]
    assert run(words) == 2
    assert text("error.output_has_run") in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert RunDir(tmp_path / "out").is_run


def test_too_little_memory_is_told_before_loading(
    train: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """C15: with both numbers."""
    import psutil

    memory = psutil.virtual_memory()._replace(available=10_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr("truetune.loading.load_base", lambda *_: pytest.fail("it was loaded"))
    assert train("--dtype", "float32") == 3
    assert "as float32, 0.0 GB are free" in capsys.readouterr().err


def test_too_little_disk_is_told_before_the_first_step(
    tiny_base: Path, tmp_path: Path, rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """C15: with both numbers; the run can be resumed."""
    from truetune import disk

    free = disk._free
    monkeypatch.setattr(disk, "_free", lambda _: 1_000_000)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["train", str(tmp_path / "rows.json"), "--model", str(tiny_base), "--output-dir", str(tmp_path / "out")]
    assert run([*words, "--max-steps", "2"]) == 3
    assert "MB needed, 1.0 MB free" in capsys.readouterr().err
    assert not (tmp_path / "out" / "steps.jsonl").exists()
    monkeypatch.setattr(disk, "_free", free)
    assert run([*words, "--max-steps", "2", "--resume"]) == 0


def test_every_line_of_the_table() -> None:
    lines = {line for line, *_ in [*CONFIGS, *MODELS]} | {"C6", "C11", "C14", "C15"}
    assert lines == {f"C{number}" for number in (*range(1, 8), 9, 10, 11, *range(13, 18))}
    assert len(CONFIGS) + len(MODELS) == 32
