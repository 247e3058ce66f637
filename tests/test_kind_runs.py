"""A run of each kind, from examples/kinds: exact again, plain PEFT's on the plain base, merged, exported."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.small import small_model
from tests.test_merge import EXACT, apart
from truetune import checkpoint
from truetune.cli import run
from truetune.config import resolve
from truetune.disk import read_manifest
from truetune.quantisation import BITS
from truetune.report import read
from truetune.use import load

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples" / "kinds").glob("*.yaml"))
NAMES = [path.stem for path in EXAMPLES]
QUANTISED = [name for name in NAMES if name in BITS]
FULL = [name for name in NAMES if name not in BITS]
ROWS = [{"instruction": f"What is {n} plus {n}?", "output": f"It is {2 * n}."} for n in range(24)]
QUESTION = [{"role": "user", "content": "What is 3 plus 3?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, short_answers: None) -> Path:
    """The base and the rows."""
    folder = tmp_path_factory.mktemp("kinds")
    small_model(folder / "base", intermediate_size=128)
    (folder / "data.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (folder / "held-out.json").write_text(json.dumps(ROWS[::5]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Any:
    """The run of a kind, made once: four steps of its example."""

    @cache
    def make(name: str) -> Path:
        keys = ["--max-steps", "4", "--save-steps", "2", "--dtype", "float32", "--result", "last"]
        words = ["train", str(folder / "data.json"), "--eval-data", str(folder / "held-out.json"), *keys]
        words += ["--config", str(EXAMPLES[NAMES.index(name)]), "--model", str(folder / "base")]
        assert run([*words, "--output-dir", str(folder / name)]) == 0
        return folder / name

    return make


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Of one row."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0]


def steps(out: Path) -> list[dict[str, Any]]:
    """The lines of steps."""
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def test_every_kind_has_an_example() -> None:
    assert NAMES == ["4bit", "8bit", "dora", "loraplus", "olora", "pissa", "rslora"]
    for path in EXAMPLES:
        assert resolve({"model": "m"}, path).config.data == ["examples/lighthouse.json"]


@pytest.mark.parametrize("name", NAMES)
def test_resumed_is_uninterrupted_to_the_bit(name: str, trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps 3 and 4 taken again from the checkpoint of step 2: losses, rates, weights and moments."""
    out = trained(name)
    assert [line["step"] for line in steps(out)] == [1, 2, 3, 4]
    assert run(["verify", str(out), "--resume-exact", "2"]) == 0
    assert run(["verify", str(out)]) == 0
    assert "weight" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_adapter_is_plain_peft_s_on_the_plain_base(
    name: str, trained: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What our own loading says; far from the base. Quantised: on the base as bitsandbytes alone quantises it."""
    monkeypatch.setattr("truetune.use.choose_dtype", lambda: ("float32", "asked"))
    ours = load(trained(name))
    ids = ours.renderer.prompt_ids(QUESTION)
    kind = {"quantization_config": BitsAndBytesConfig(**BITS[name](torch.float32))} if name in BITS else {}
    base = AutoModelForCausalLM.from_pretrained(str(folder / "base"), dtype=torch.float32, **kind)
    theirs = peft.PeftModel.from_pretrained(base, str(trained(name) / "adapter"))
    # In training bitsandbytes dequantises as we always do; there is no dropout.
    wanted = theirs.train()(input_ids=torch.tensor([ids])).logits[0].detach()
    plain = logits(AutoModelForCausalLM.from_pretrained(str(folder / "base"), dtype=torch.float32), ids)
    assert float((logits(ours.model, ids) - wanted).abs().max()) <= EXACT
    assert float((wanted - plain).abs().max()) > 1e-2
    assert ours.quantization == (name if name in BITS else None)


@pytest.mark.parametrize("name", NAMES)
def test_merged_is_the_adapter_on_the_full_base(
    name: str, trained: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By plain libraries; of a quantised run, how far that is from what was trained is said."""
    out = trained(name)
    assert run(["merge", str(out), "--output-dir", str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    largest, is_same = apart(out / "adapter", folder / "base", tmp_path / "merged")
    assert largest <= EXACT
    assert is_same
    assert (f"as {name}" in said) == (name in BITS)


def test_base_side_is_the_true_base(trained: Any, folder: Path) -> None:
    """The card's base is the same for every kind that is not quantised, and not for those that are."""
    cards = {name: read(trained(name)) for name in NAMES}
    losses = {name: card["base"]["loss"] for name, card in cards.items() if card is not None}
    assert losses.keys() == set(NAMES)
    assert max(losses[name] for name in FULL) - min(losses[name] for name in FULL) <= 1e-5
    for name in QUANTISED:
        assert 1e-6 < abs(losses[name] - losses["dora"]) < 0.2
    first = {name: steps(trained(name))[0]["loss"] for name in FULL}
    assert max(first.values()) - min(first.values()) <= 1e-5, "training starts at the base"


@pytest.mark.parametrize("name", ["4bit", "rslora"])
def test_version_of_what_quantises_is_kept(name: str, trained: Any) -> None:
    """A resume under another one says so."""
    path = checkpoint.path_of(trained(name) / "checkpoints", 4)
    assert ("bitsandbytes" in read_manifest(path)["versions"]) == (name == "4bit")
    assert checkpoint.other_versions(path) == {}


def test_rates_of_a_and_b(trained: Any) -> None:
    for name in NAMES:
        for line in steps(trained(name)):
            assert ("learning_rate_b" in line) == (name == "loraplus")
            if name == "loraplus":
                assert line["learning_rate_b"] == pytest.approx(16 * line["learning_rate"])


@pytest.mark.parametrize("name", ["dora", "pissa", "rslora"])
def test_gguf_adapter(name: str, trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DoRA is refused with what to do; others are written."""
    path = tmp_path / "adapter.gguf"
    code = run(["export", str(trained(name)), "--to", "adapter", "--output", str(path)])
    assert (code, path.is_file()) == ((2, False) if name == "dora" else (0, True))
    assert ("--to gguf" in capsys.readouterr().err) == (name == "dora")


@pytest.mark.parametrize("name", ["8bit", "dora", "pissa"])
def test_use(name: str, trained: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """chat, compare and eval say how the base is kept."""
    out, few = trained(name), ["--max-new-tokens", "4"]
    assert run(["chat", str(out), "-m", "Hi", *few]) == 0
    assert run(["compare", str(out), "-m", "Hi", *few]) == 0
    assert run(["eval", str(out), str(folder / "held-out.json")]) == 0
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("as it was in training") == (3 if name in BITS else 0)


def test_runs_on_differently_kept_bases_are_not_served_together(trained: Any) -> None:
    from truetune.errors import UserError
    from truetune.serve import vllm
    from truetune.use import find_voices

    with pytest.raises(UserError) as caught:
        find_voices([str(trained("4bit")), str(trained("dora"))])
    assert (caught.value.key, caught.value.values["name"]) == ("serve_other_base", "base")
    assert "(4bit)" in caught.value.values["first"]
    for name, kind in (("4bit", "quantization: 4bit"), ("dora", "use_dora")):
        with pytest.raises(UserError) as caught:
            vllm.refuse_unknown(*find_voices([str(trained(name))]))
        assert (caught.value.key, caught.value.values["kind"]) == ("vllm_kind", kind)


def test_memory_is_told(trained: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before step 1, measured against bfloat16."""
    words = ["train", str(folder / "data.json"), "--model", str(folder / "base"), "--max-steps", "1"]
    assert run([*words, "--quantization", "8bit", "--output-dir", str(folder / "told")]) == 0
    said = capsys.readouterr().out
    assert said.index("GB as 8bit, measured") < said.index("step 1/1")
