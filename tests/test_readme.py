"""Every command of both READMEs is run; what names a large model runs two steps on a stand-in."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from truetune.cli import run

ROOT = Path(__file__).resolve().parents[1]
LARGE_MODEL = "Qwen/Qwen3-4B-Instruct-2507"
# Run by .ci/run and by hand, since they install: make demo, pip install.
# Servers do not end; they are run in tests/serve and tests/studio.
NOT_RUN_HERE = {"make demo", "pip install -c constraints.txt .", "truetune serve RUN", "truetune studio"}


def commands_of(name: str) -> list[str]:
    """The lines of bash blocks and the commands in tables, in order."""
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [*blocks, *re.findall(r"^\| `(truetune [^`]*)` \|", text, re.MULTILINE)]


def python_of(name: str) -> str:
    """The Python block."""
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)[0]


@pytest.fixture
def workplace(tmp_path: Path, tiny_qwen: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the README names, as the current one."""
    rows = [{"instruction": f"What is {n}?", "input": "", "output": f"{n}."} for n in range(40)]
    (tmp_path / "examples.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "MODEL").symlink_to(tiny_qwen)
    (tmp_path / "huanhuan.json").symlink_to(shared / "data" / "huanhuan.json")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(command: str) -> list[str]:
    """The command's words after `truetune`, with the stand-in for a large model."""
    words = [word if word != LARGE_MODEL else "MODEL" for word in shlex.split(command)[1:]]
    if "--resume" in words:
        return words
    if words[0] in ("chat", "compare"):
        # A model of random weights would talk to the limit.
        words += ["--max-new-tokens", "8"]
    if words[0] == "train":
        words += ["--max-steps", "2"]
    if "examples/huanhuan.yaml" in words:
        # Its tracker is tested in test_trackers.py; its model is the large one.
        words += ["--model", "MODEL", "--report-to", ""]
    return words


@pytest.mark.slow
@pytest.mark.usefixtures("short_answers")
def test_every_command_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the text, in one folder, as a reader would; the Chinese one has the same commands (below)."""
    typed = iter(["Who are you?"])

    def answer(_prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    commands = commands_of("README.md")
    done = [command for command in commands if command not in NOT_RUN_HERE]
    assert len(commands) - len(done) == len(NOT_RUN_HERE)
    for command in done:
        assert run(words_of(command)) == 0, command
    assert len(done) >= 10
    assert next(typed, None) is None


def test_both_readmes_name_the_same_commands() -> None:
    """Only the words of a question differ."""
    english, chinese = (
        [re.sub(r'"[^"]*"', '"…"', command) for command in commands_of(name)] for name in ("README.md", "README.zh.md")
    )
    assert english == chinese
    assert [command for command in commands_of("README.md") if LARGE_MODEL in command] == [
        f"truetune train examples.json --model {LARGE_MODEL}"
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_python_block_runs(name: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The API's example, two steps in place of a hundred."""
    code = (
        python_of(name).replace("max_steps=100", "max_steps=2").replace(".chat(", ".chat(max_new_tokens=4, messages=")
    )
    exec(compile(code, name, "exec"), {})
    assert "Result: runs/" in capsys.readouterr().out


def test_links_of_the_readmes_exist() -> None:
    """Each relative link leads to a file."""
    links = [
        link.split("#")[0]
        for name in ("README.md", "README.zh.md", "CONTRIBUTING.md")
        for link in re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text(encoding="utf-8"))
        if not link.startswith("http")
    ]
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_number_of_packages_is_true() -> None:
    """The README's count is what the core install needs, and it stays small."""
    import importlib.metadata

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    def needed(name: str, found: set[str]) -> set[str]:
        if canonicalize_name(name) not in found:
            found.add(canonicalize_name(name))
            for line in importlib.metadata.requires(name) or []:
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    needed(requirement.name, found)
        return found

    count = len(needed("truetune", set())) - 1
    assert count <= 45
    assert f"is {count} packages" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"共 {count} 个软件包" in (ROOT / "README.zh.md").read_text(encoding="utf-8")
