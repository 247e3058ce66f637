"""Bad input of every kind: exit code 2; where, what and how to fix it, in both languages; nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from truetune.cli import run
from truetune.model import load_tokenizer
from truetune.rundir import RunDir


@dataclass(frozen=True)
class Place:
    """What a case may use: a good data file, a good model, and a folder for bad files."""

    data: Path
    model: Path
    files: Path

    def write(self, name: str, content: str | bytes) -> str:
        """Write a file and return its path."""
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def words(self, data: str | Path | None = None, model: str | Path | None = None, *more: str) -> list[str]:
        """Return the words of `train`; what is not given is good."""
        return [str(data or self.data), "--model", str(model or self.model), *more]


@dataclass(frozen=True)
class Case:
    """`prepare` returns (words after `train`, where the error is); `en` and `zh`: a part of what it says."""

    prepare: Callable[[Place], tuple[list[str], str]]
    en: str
    zh: str


def data_missing(place: Place) -> tuple[list[str], str]:
    path = str(place.files / "rows.json")
    return place.words(path), path


def data_misspelt(place: Place) -> tuple[list[str], str]:
    path = place.data.with_name("dta.json")
    return place.words(path), str(path)


def data_empty(place: Place) -> tuple[list[str], str]:
    path = place.write("empty.json", "")
    return place.words(path), path


def data_without_rows(place: Place) -> tuple[list[str], str]:
    path = place.write("none.json", " [ ]\n")
    return place.words(path), path


def data_folder_empty(place: Place) -> tuple[list[str], str]:
    place.write("folder/notes.log", "no data here")
    path = str(place.files / "folder")
    return place.words(path), path


def data_not_json(place: Place) -> tuple[list[str], str]:
    path = place.write(
        "broken.json", '[\n  {"instruction": "a", "output": "b"},\n  {"instruction": a, "output": "b"}\n]\n'
    )
    return place.words(path), f"{path}:3:19"


def data_trailing_comma(place: Place) -> tuple[list[str], str]:
    path = place.write("comma.json", '[\n{"instruction": "a", "output": "b",}\n]\n')
    # Python 3.13 points at the comma, earlier ones at the brace behind it.
    return place.words(path), f"{path}:2:3"


def data_cut(place: Place) -> tuple[list[str], str]:
    path = place.write("cut.json", '[\n{"instruction": "a", "output": "b"},\n{"instruction": "c",')
    return place.words(path), f"{path}:3:"


def data_bad_line(place: Place) -> tuple[list[str], str]:
    path = place.write("rows.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a" "output": "b"}\n')
    return place.words(path), f"{path}:2:21"


def data_utf16(place: Place) -> tuple[list[str], str]:
    path = place.write("utf16.json", '[{"instruction": "a", "output": "b"}]'.encode("utf-16"))
    return place.words(path), path


def data_gbk(place: Place) -> tuple[list[str], str]:
    path = place.write("gbk.json", '[\n{"instruction": "你好", "output": "b"}]'.encode("gbk"))
    return place.words(path), f"{path}:2"


def row_without_output(place: Place) -> tuple[list[str], str]:
    path = place.write("row.json", '[\n{"instruction": "a", "output": "b"},\n{"instruction": "c", "input": ""}\n]\n')
    return place.words(path), f"{path}:3"


def no_row_left(place: Place) -> tuple[list[str], str]:
    path = place.write("row.json", '[{"instruction": "c", "input": ""}]\n')
    return place.words(path, None, "--invalid", "skip"), "data"


def no_data(place: Place) -> tuple[list[str], str]:
    return ["--model", str(place.model)], "data"


def no_model(place: Place) -> tuple[list[str], str]:
    return [str(place.data)], "--model"


def eval_data_missing(place: Place) -> tuple[list[str], str]:
    path = str(place.files / "eval.json")
    return place.words(None, None, "--eval-data", path), path


def config_unknown_key(place: Place) -> tuple[list[str], str]:
    path = place.write("c.yaml", "lora_r: 8\nlearning_rte: 1e-4\n")
    return place.words(None, None, "--config", path), f"{path}:2"


def config_bad_value(place: Place) -> tuple[list[str], str]:
    path = place.write("c.yaml", "lora_r: 8\nbatch_size: true\n")
    return place.words(None, None, "--config", path), f"{path}:2"


def config_not_yaml(place: Place) -> tuple[list[str], str]:
    path = place.write("c.yaml", "lora_r: 8\n- b\n")
    return place.words(None, None, "--config", path), f"{path}:2:1"


def config_missing(place: Place) -> tuple[list[str], str]:
    path = str(place.files / "c.yaml")
    return place.words(None, None, "--config", path), path


def flag_unknown(place: Place) -> tuple[list[str], str]:
    return place.words(None, None, "--learning-rat", "1"), "--learning-rat"


def flag_bad_value(place: Place) -> tuple[list[str], str]:
    return place.words(None, None, "--max-length", "0"), "--max-length"


def model_missing(place: Place) -> tuple[list[str], str]:
    path = str(place.files / "model")
    return place.words(None, path), path


def gguf_missing(place: Place) -> tuple[list[str], str]:
    return place.words(None, "models/tiny.gguf"), "models/tiny.gguf"


def model_without_config(place: Place) -> tuple[list[str], str]:
    place.write("model/model.safetensors", "")
    path = str(place.files / "model")
    return place.words(None, path), path


def model_pickled(place: Place) -> tuple[list[str], str]:
    place.write("model/config.json", "{}")
    place.write("model/pytorch_model.bin", b"\x80\x04N.")
    path = str(place.files / "model")
    return place.words(None, path), path


def model_without_weights(place: Place) -> tuple[list[str], str]:
    place.write("model/config.json", "{}")
    path = str(place.files / "model")
    return place.words(None, path), path


def model_without_tokenizer(place: Place) -> tuple[list[str], str]:
    place.write("model/config.json", (place.model / "config.json").read_bytes())
    place.write("model/model.safetensors", (place.model / "model.safetensors").read_bytes())
    path = str(place.files / "model")
    return place.words(None, path), path


def hub_offline(place: Place) -> tuple[list[str], str]:
    return place.words(None, "nobody/no-such-model"), "nobody/no-such-model"


def output_of_another_run(place: Place) -> tuple[list[str], str]:
    run_dir = RunDir(place.files / "run")
    run_dir.create()
    run_dir.write_info(state="stopped", date="2026-01-01")
    return place.words(None, None, "--output-dir", str(run_dir.path)), str(run_dir.path)


def output_is_file(place: Place) -> tuple[list[str], str]:
    path = place.write("out", "mine")
    return place.words(None, None, "--output-dir", path), path


def output_not_empty(place: Place) -> tuple[list[str], str]:
    place.write("out/mine.txt", "mine")
    path = str(place.files / "out")
    return place.words(None, None, "--output-dir", path), path


def resume_without_run(place: Place) -> tuple[list[str], str]:
    place.write("out/mine.txt", "mine")
    path = str(place.files / "out")
    return place.words(None, None, "--resume", "--output-dir", path), path


CASES = (
    Case(data_missing, "no such file", "没有这个文件"),
    Case(data_misspelt, "no such file", "没有这个文件"),
    Case(data_empty, "the file is empty", "文件是空的"),
    Case(data_without_rows, "the file is empty", "文件是空的"),
    Case(data_folder_empty, "no data file", "没有数据文件"),
    Case(data_not_json, "not JSON: ", "不是 JSON："),
    Case(data_trailing_comma, "not JSON: ", "不是 JSON："),
    Case(data_cut, "the file ends inside record 2", "文件在第 2 条记录中间结束"),
    Case(data_bad_line, "1 rows cannot be used", "1 条样本不能用"),
    Case(data_utf16, "UTF-16", "UTF-16"),
    Case(data_gbk, "not UTF-8 at byte 19", "第 19 字节不是 UTF-8"),
    Case(row_without_output, "1 rows cannot be used", "有 1 条样本不能用"),
    Case(no_row_left, "no row is left", "没有可训练的样本"),
    Case(no_data, "no data given", "没有给出数据"),
    Case(no_model, "no base model given", "没有给出基座模型"),
    Case(eval_data_missing, "no such file", "没有这个文件"),
    Case(config_unknown_key, 'there is no key "learning_rte"', "没有“learning_rte”这个配置项"),
    Case(config_bad_value, "batch_size cannot be True", "batch_size 不能是 True"),
    Case(config_not_yaml, "not YAML", "不是 YAML"),
    Case(config_missing, "no such configuration file", "没有这个配置文件"),
    Case(flag_unknown, 'there is no key "--learning-rat"', "没有“--learning-rat”这个配置项"),
    Case(flag_bad_value, "max_length cannot be '0'", "max_length 不能是 '0'"),
    Case(model_missing, "no such model", "没有这个模型"),
    Case(gguf_missing, "no such model", "没有这个模型"),
    Case(model_without_config, "no config.json", "没有 config.json"),
    Case(model_pickled, "only pickled weights (pytorch_model.bin)", "pytorch_model.bin"),
    Case(model_without_weights, "no .safetensors file", "没有 .safetensors 文件"),
    Case(model_without_tokenizer, "no tokenizer", "没有分词器"),
    Case(hub_offline, "not in the cache", "缓存里没有"),
    Case(output_of_another_run, "holds a run already", "已经有一次训练"),
    Case(output_is_file, "is a file", "是文件"),
    Case(output_not_empty, "not empty", "不是空的"),
    Case(resume_without_run, "no run to continue", "没有可以继续的训练"),
)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, files with their content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def place(
    tmp_path: Path,
    tiny_qwen: Path,
    qwen_tokenizer: Any,
    rows: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    """A working folder of its own, the tokenizer loaded once, and no network."""

    def load(folder: Path) -> Any:
        return qwen_tokenizer if folder == tiny_qwen else load_tokenizer(folder)

    monkeypatch.setattr("truetune.preflight.load_tokenizer", load)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    files, work = tmp_path / "files", tmp_path / "work"
    files.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    return Place(data, tiny_qwen, files)


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.prepare.__name__)
def test_bad_input(case: Case, lang: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, where = case.prepare(place)
    before = tree(tmp_path)
    if "--output-dir" not in words:
        words = [*words, "--output-dir", "out"]

    assert run(["train", *words, "--lang", lang]) == 2

    assert tree(tmp_path) == before
    err = capsys.readouterr().err
    what, fix = err.splitlines()
    assert what.startswith(where)
    assert (case.en if lang == "en" else case.zh) in what.removeprefix(where)
    assert fix.startswith("  → ")
    assert len(fix) > 8
    assert any("\u4e00" <= char <= "\u9fff" for char in fix) is (lang == "zh")


def test_the_table_is_whole() -> None:
    assert len(CASES) == 33
    assert len({case.prepare for case in CASES}) == 33


def test_the_default_output_folder_is_not_made_either(place: Place, tmp_path: Path) -> None:
    before = tree(tmp_path)
    assert run(["train", *place.words(place.files / "rows.json")]) == 2
    assert tree(tmp_path) == before


def test_a_refused_row_is_named_with_file_and_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    words, where = row_without_output(place)
    assert run(["train", *words, "--lang", "en"]) == 2
    out = capsys.readouterr().out
    assert f'{where}: the key "output" is missing (found: input, instruction)\n  → Add "output" to this row.\n' in out


def test_suggestions(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for prepare, near in (
        (config_unknown_key, "learning_rate"),
        (flag_unknown, "--learning-rate"),
        (data_misspelt, "data.json"),
    ):
        assert run(["train", *prepare(place)[0], "--lang", "en"]) == 2
        assert near in capsys.readouterr().err.splitlines()[1]


def test_line_and_column_point_at_the_fault(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    words, where = data_not_json(place)
    assert run(["train", *words]) == 2
    assert "«" in capsys.readouterr().err
    path, line, column = where.rsplit(":", 2)
    source = Path(path).read_text(encoding="utf-8").splitlines()
    assert source[int(line) - 1][int(column) - 1 :].startswith('a, "output"')


def test_a_hub_that_cannot_be_reached(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("truetune.hub.can_connect", lambda _endpoint: False)
    assert run(["train", *hub_offline(place)[0], "--lang", "en"]) == 2
    assert (
        "https://huggingface.co cannot be reached\n  → Connect, or give the path of a folder" in capsys.readouterr().err
    )


def test_several_faults_are_reported_at_once(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    path = place.write("c.yaml", "lora_r: 0\nlearning_rte: 1\n")
    assert run(["train", *place.words(None, None, "--config", path, "--max-length", "x")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 6
