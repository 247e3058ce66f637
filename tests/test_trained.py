"""What a run trains, on disk: all weights saved and loaded to the bit, the result as other programs read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from small import small_model

from truetune import checkpoint, trained
from truetune.cli import run
from truetune.engine.master import keep_masters
from truetune.errors import UserError
from truetune.model import Base, BaseWeights, load_base, train_all
from truetune.rundir import RunDir
from truetune.source import find
from truetune.use import find_voices, load
from truetune.weights import count_parameters, weight_files

BASE = {"name": "org/model", "revision": "main", "hub": "huggingface", "fingerprint": "b"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some thousand weights, embedding and head tied."""
    return small_model(tmp_path_factory.mktemp("models") / "small", "qwen3")


def make_state(folder: Path, *, dtype: str, steps: int = 0) -> checkpoint.State:
    """All weights of a model, trained for some steps on random gradients."""
    model = train_all(load_base(Base(str(folder), folder, ""), "float32"))
    masters = keep_masters(model, getattr(torch, dtype))
    optimizer = torch.optim.AdamW(masters.weights, lr=1e-4, fused=True)
    optimizer.register_step_post_hook(masters.refresh)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        for weight in masters.weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        scheduler.step()
    return checkpoint.State(model, optimizer, scheduler, {"base": "b"}, BASE, masters)


def save(folder: Path, state: checkpoint.State) -> Path:
    return checkpoint.save(folder, 3, state=state, write_extra=lambda _: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_all_weights_come_back_to_the_bit(
    dtype: str, shard_size: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masters, moments and the copy that computes, in one file or in shards; a flipped bit is named."""
    monkeypatch.setattr(trained, "SHARD_SIZE", shard_size)
    state = make_state(small, dtype=dtype, steps=3)
    path = save(tmp_path, state)
    assert (len(weight_files(path)) > 1) == (shard_size == "40KB")
    assert checkpoint.OPTIMIZER not in {file.name for file in weight_files(path)}
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    assert state.num_bytes == 3 * 4 * count_parameters(path)
    fresh = make_state(small, dtype=dtype)
    assert checkpoint.other_tensor(path, fresh) is not None
    assert checkpoint.load(path, fresh) == 3
    assert checkpoint.other_tensor(path, fresh) is None
    for one, other in zip(state.model.parameters(), fresh.model.parameters(), strict=True):
        assert one.dtype == getattr(torch, dtype)
        assert torch.equal(one, other)
    with torch.no_grad():
        fresh.masters.weights[5].view(-1)[3] += 1e-3
    names = [name for name, _ in fresh.model.named_parameters()]
    assert checkpoint.other_tensor(path, fresh) == f"model.safetensors: {names[5]}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_the_result_is_what_computed(dtype: str, is_tied: bool, tmp_path: Path) -> None:
    """Read by plain transformers, its weights are bit for bit those that the model computed with; tied ones once."""
    from transformers import AutoModelForCausalLM

    folder = small_model(tmp_path / "base", "llama", is_tied=is_tied)
    state = make_state(folder, dtype=dtype, steps=2)
    path, result = save(tmp_path, state), tmp_path / "result"
    result.mkdir()
    state.trained.write_result(path, result, left_out=checkpoint.OF_THE_RUN)
    assert not {file.name for file in result.iterdir()} & checkpoint.OF_THE_RUN
    assert json.loads((result / "config.json").read_text())["dtype"] == dtype
    assert json.loads((path / "config.json").read_text())["dtype"] == "float32"
    model = AutoModelForCausalLM.from_pretrained(str(result), dtype="auto")
    ours = dict(state.model.named_parameters())
    assert len(ours) == len(dict(model.named_parameters())) > 20
    for name, parameter in model.named_parameters():
        assert parameter.dtype == getattr(torch, dtype)
        assert torch.equal(parameter, ours[name]), name
    with safe_open(str(result / "model.safetensors"), "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (not is_tied)  # noqa: SIM118
    assert (result / "model.safetensors").stat().st_size < (0.51 if dtype == "bfloat16" else 1.01) * (
        path / "model.safetensors"
    ).stat().st_size + 4096


def test_a_tuned_model_is_its_base_inside_the_block(small: Path) -> None:
    """And afterwards itself again, also where something went wrong inside."""
    tuned = make_state(small, dtype="float32", steps=3).model.eval()
    base = load_base(Base(str(small), small, ""), "float32").eval()
    before = [parameter.detach().clone() for parameter in tuned.parameters()]
    switch, ids = BaseWeights(tuned, lambda: load_base(Base(str(small), small, ""), "float32")), torch.tensor([[5, 6]])
    with torch.no_grad():
        wanted, other = base(ids).logits, tuned(ids).logits
        with switch():
            assert torch.allclose(tuned(ids).logits, wanted, rtol=1e-5, atol=1e-6)
        with pytest.raises(KeyError), switch():
            raise KeyError
    assert not torch.allclose(wanted, other, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(one, two) for one, two in zip(tuned.parameters(), before, strict=True))


# --- a whole run ---


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps with held-out rows and a system prompt; not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"instruction": f"What is {n} plus {n}?", "output": f"It is {2 * n}."} for n in range(24)]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    keys = ["--max-steps", "4", "--learning-rate", "1e-3", "--eval-split", "0.25", "--system", "Count.", "--seed", "3"]
    words = ["train", str(folder / "data.json"), "--model", str(small), "--finetuning", "full", *keys]
    assert run([*words, "--dtype", "bfloat16", "--output-dir", str(folder / "run")]) == 0
    return folder / "run"


def _words(run_folder: Path) -> Any:
    return json.loads((run_folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_run_is_a_model_for_every_program(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Hugging Face folder with tokenizer, template, ends of answers and probes; nothing of it needs the base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = RunDir(whole).result
    assert result == whole / "model"
    tokenizer = AutoTokenizer.from_pretrained(str(result))
    model = AutoModelForCausalLM.from_pretrained(str(result), dtype=torch.float32)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((result / "generation_config.json").read_text())["eos_token_id"][0] == stop
    source = find(str(whole))
    assert (source.is_full, source.folder, source.num_probes) == (True, None, len(source.probes))
    assert len(source.probes) >= 6
    ours = load(whole)
    prompt = ours.renderer.prompt_ids([{"role": "user", "content": "What is 3 plus 3?"}])
    assert "Count." in tokenizer.decode(prompt)
    assert prompt == tokenizer.apply_chat_template(
        [{"role": "system", "content": "Count."}, {"role": "user", "content": "What is 3 plus 3?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    ours.model.float()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, ours.model(ids).logits)
    card = (result / "README.md").read_text()
    assert 'library_name: "transformers"' in card
    assert run(["verify", str(whole)]) == 0
    assert "good     model" in capsys.readouterr().out
    assert run(["verify", str(whole), "--resume-exact", "2"]) == 0


@pytest.mark.slow
def test_every_command_takes_it(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """chat, compare, eval, export, runs; merge says that there is nothing to merge, and where the model is."""
    ask = ["-m", "What is 3 plus 3?", "--max-new-tokens", "4"]
    for path in (whole, whole / "model"):
        assert run(["chat", str(path), *ask]) == 0
        assert run(["compare", str(path), *ask]) == 0
        shown = capsys.readouterr().out
        assert "Base" in shown
        assert "Tuned" in shown
    assert run(["chat", str(whole), "--base", *ask]) == 0
    assert run(["eval", str(whole), str(whole.parent / "data.json")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("loss, answers")]
    base, tuned = (float(value.replace(",", "")) for value in lines[0][-2:])
    assert tuned < base - 0.1
    assert run(["export", str(whole), "--to", "hub", "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert "model.safetensors" in listed
    assert "optimizer" not in listed
    assert run(["runs", str(whole.parent)]) == 0
    assert "done" in capsys.readouterr().out
    for words in (
        ["merge", str(whole), "--output-dir", str(tmp_path / "m")],
        ["export", str(whole), "--to", "adapter"],
    ):
        assert run(words) == 2
        assert str(whole / "model") in capsys.readouterr().err
    assert run(["export", str(whole), "--to", "gguf", "--output", str(tmp_path / "x.gguf")]) == 0


@pytest.mark.slow
def test_base_and_tuned_are_two(whole: Path, small: Path) -> None:
    """The base that it came from, by its reference, and the run's own name among the models of a server."""
    tuned, base, plain = load(whole), load(whole, is_base=True), load(small)
    questions = [f"What is {n} plus {n}?" for n in range(4)]
    answers = tuned.answers(questions, max_new_tokens=6)
    assert base.answers(questions, max_new_tokens=6) == tuned.answers(questions, is_base=True, max_new_tokens=6)
    assert tuned.answers(questions, max_new_tokens=6) == answers
    assert base.name == plain.renderer.tokenizer.name_or_path.rpartition("/")[2] == small.name
    found, voices = find_voices([str(whole)])
    assert [voice.name for voice in voices] == ["run"]
    assert found.folder == whole / "model"
    report = _words(whole)
    assert report["finetuning"] == "full"
    assert report["base"]["loss"] > report["tuned"]["loss"]


@pytest.mark.slow
def test_another_base_in_its_place_is_refused_but_the_model_stands_alone(whole: Path, tmp_path: Path) -> None:
    import shutil

    moved = tmp_path / "run"
    shutil.copytree(whole, moved)
    path = moved / "model" / "truetune.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    known["base"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(known), encoding="utf-8")
    model = load(moved)
    assert model.chat("What is 3 plus 3?", max_new_tokens=2) == load(whole).chat("What is 3 plus 3?", max_new_tokens=2)
    with pytest.raises(UserError) as caught:
        model.answers(["Hi"], is_base=True)
    assert caught.value.key == "other_base"
