"""The command that hands over to vLLM, and the template that carries a run's prompt."""

from __future__ import annotations

import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from truetune.cli import run
from truetune.errors import UserError
from truetune.serve import vllm
from truetune.use import find_voices


def test_without_vllm_the_install_command(tiny_runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert shutil.which("vllm") is None
    assert run(["serve", str(tiny_runs[0]), "--engine", "vllm"]) == 2
    assert "pip install vllm" in capsys.readouterr().err


def test_the_template_renders_the_same_ids(tiny_runs: list[Path]) -> None:
    """As vLLM calls it, with neither system prompt nor arguments: those of training; a request's own win."""
    _, voices = find_voices([str(tiny_runs[0])])
    ours = voices[0].renderer
    theirs = replace(ours, system=None, template_kwargs={}, chat_template=vllm.whole_template(ours))
    asked = [
        [{"role": "user", "content": "Number 3"}],
        [{"role": "system", "content": "Other."}, {"role": "user", "content": "It's {{ 1 }}\n\\"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    ]
    for messages in asked:
        assert theirs.prompt_ids(messages) == ours.prompt_ids(messages)
    on = {"enable_thinking": True}
    assert replace(theirs, template_kwargs=on).prompt_ids(asked[0]) == replace(ours, template_kwargs=on).prompt_ids(
        asked[0]
    )
    quoted = replace(ours, system='It\'s "so"\n{{ 7 }} {% x %} \\n')
    bare = replace(quoted, system=None, template_kwargs={}, chat_template=vllm.whole_template(quoted))
    assert bare.prompt_ids(asked[0]) == quoted.prompt_ids(asked[0])


def test_the_command(tiny_runs: list[Path], tmp_path: Path) -> None:
    base, voices = find_voices([str(tiny_runs[0])])
    template = tmp_path / "t.jinja"
    words = vllm.words("vllm", voices, base=base.folder, template=template, host="127.0.0.1", port=8000)
    assert words[:3] == ["vllm", "serve", str(base.folder)]
    assert words[words.index("--lora-modules") + 1] == f"one={tiny_runs[0] / 'adapter'}"
    assert words[words.index("--served-model-name") + 1] == "tiny-qwen3"
    assert words[words.index("--max-lora-rank") + 1] == "16"
    assert words[words.index("--chat-template") + 1] == str(template)
    with pytest.raises(UserError) as caught:
        vllm.one_template(find_voices([str(path) for path in tiny_runs])[1])
    assert caught.value.key == "vllm_templates"


@pytest.mark.slow
def test_it_takes_over(tiny_runs: list[Path], tmp_path: Path) -> None:
    """A program of that name gets the command and, where a token is asked for, the token in its environment."""
    import subprocess
    import sys

    program = tmp_path / "vllm"
    program.write_text('#!/bin/sh\necho "$@"\necho "token=${VLLM_API_KEY}"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "vllm.py").touch()
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}"}
    words = ["serve", str(tiny_runs[0]), "--engine", "vllm", "--token-file", str(tmp_path / "token"), "--port", "9"]
    environment |= {"VLLM_API_KEY": "another", "TRUETUNE_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "truetune", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    told, token = done.stdout.strip().splitlines()
    assert told.startswith("serve /")
    assert token == f"token={(tmp_path / 'token').read_text().strip()}"
    assert token.removeprefix("token=") not in told
