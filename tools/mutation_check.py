"""Put known bugs back one by one, and fail if the tests do not notice one.

    python tools/mutation_check.py [NAME ...]      all, or those whose name holds one of the words

Each bug is a replacement in one file of a copy of the repository, and the tests that must fail for it. The numbers are
those of the field's known silent bugs (see docs/silent-bugs.md).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 300


class Mutant(NamedTuple):
    """A bug: in `file`, `old` becomes `new`; `tests` must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    Mutant(
        "1 loss divided by each forward's own tokens",
        "engine/step.py",
        "forward_loss(engine, forward) / num_learned_tokens",
        "forward_loss(engine, forward) / int(forward.weights_E.sum())",
        "tests/engine/test_step.py",
    ),
    Mutant("gradient doubled", "engine/step.py", "backward(loss)", "backward(2 * loss)", "tests/engine/test_step.py"),
    Mutant(
        "half the gradient lost",
        "engine/step.py",
        "            backward(loss)",
        "            backward(loss) if number % 2 == 0 else None",
        "tests/engine/test_step.py",
    ),
    Mutant(
        "prompt not masked in padded rows",
        "engine/step.py",
        "        first = len(pair.prompt_ids) - 1\n",
        "        first = 0\n",
        "tests/engine/test_step.py",
    ),
    Mutant(
        "prompt not masked in tries",
        "engine/trie.py",
        "        first = len(pair.prompt_ids) - 1\n",
        "        first = 0\n",
        "tests/engine/test_trie.py",
    ),
    Mutant(
        "dropout not reseeded",
        "engine/step.py",
        "torch.manual_seed(dropout_seed(*seeds, forward=number))",
        "pass",
        "tests/test_loop.py",
    ),
    Mutant(
        "3 padding masked by id, and the stop token with it",
        "engine/step.py",
        "torch.ones_like(parents_E))",
        "(targets_E != engine.pad_id).long())",
        "tests/engine/test_step.py",
    ),
    Mutant(
        "14 branches of a trie see each other",
        "engine/trie.py",
        "nodes = np.concatenate([nodes[:num_shared], np.arange(num_nodes, num_nodes + num_new)])",
        "nodes = np.arange(0, num_nodes + num_new)",
        "tests/engine/test_trie.py tests/engine/test_attention.py",
    ),
    Mutant(
        "14 a key past the query is seen",
        "engine/attention.py",
        "is_hidden = key_L > self.last_seen_S1Q1",
        "is_hidden = key_L > self.last_seen_S1Q1 + 1",
        "tests/engine/test_attention.py",
    ),
    Mutant(
        "14 windows ignored",
        "engine/attention.py",
        "return is_hidden if window is None else is_hidden | (key_L <= self.last_seen_S1Q1 - window)",
        "return is_hidden",
        "tests/engine/test_attention.py",
    ),
    Mutant(
        "15 positions count the row, not the path",
        "engine/trie.py",
        "positions = [np.arange(num_shared, len(path)) for path, num_shared in paths]",
        "positions = [np.arange(len(np.concatenate(ids)))]",
        "tests/engine/test_trie.py",
    ),
    Mutant(
        "weights of duplicates forgotten",
        "engine/step.py",
        "torch.from_numpy(x).to(engine.device) for x in (trie.parents_E, trie.targets_E, trie.weights_E)",
        "torch.from_numpy(x).to(engine.device) for x in (trie.parents_E, trie.targets_E, trie.weights_E * 0 + 1)",
        "tests/equivalence/test_families.py",
    ),
    Mutant(
        "shared keys get one branch's gradient",
        "engine/attention.py",
        "into.flatten(1).index_add_(0, chunk.key_nodes,",
        "into.flatten(1).index_copy_(0, chunk.key_nodes,",
        "tests/engine/test_attention.py",
    ),
    Mutant(
        "the shared path of long segments forgotten",
        "engine/flash.py",
        "if len(self.shared_nodes):",
        "if False:",
        "tests/engine/test_flash.py",
    ),
    Mutant(
        "long segments see what comes after",
        "engine/flash.py",
        "yield slice(self.first, self.stop), True",
        "yield slice(self.first, self.stop), False",
        "tests/engine/test_flash.py",
    ),
    Mutant(
        "21 LoRA's input gets no gradient",
        "engine/lora.py",
        "_drop_(grad_inner @ a, is_kept)",
        "_drop_(grad_inner @ (0 * a), is_kept)",
        "tests/engine/test_lora.py",
    ),
    Mutant(
        "21 A gets no gradient",
        "engine/lora.py",
        "grad_as = (grad_inner.T @",
        "grad_as = 0 * (grad_inner.T @",
        "tests/engine/test_lora.py",
    ),
    Mutant(
        "21 other dropout in the recomputed forward",
        "engine/memory.py",
        "engine.transformer.activation_checkpointing_enable()",
        "engine.transformer.activation_checkpointing_enable({'preserve_rng_state': False, 'use_reentrant': False})",
        "tests/test_assembly.py",
    ),
    Mutant(
        "soft cap of the head forgotten",
        "engine/loss.py",
        'getattr(config, "final_logit_softcapping", None))',
        "None)",
        "tests/engine/test_loss.py",
    ),
    Mutant(
        "comparison before step 1 believes everything",
        "engine/compare.py",
        "is_same = loss_difference <= max_loss and gradient_difference <= max_gradient",
        "is_same = True",
        "tests/engine/test_compare.py",
    ),
    Mutant(
        "scaled lengths share a forward",
        "engine/trie.py",
        "if not forwards or num_new > room or is_alone:",
        "if not forwards or num_new > room:",
        "tests/engine/test_trie.py",
    ),
    Mutant(
        "2 the tokenizer adds a second BOS",
        "data/encode.py",
        "encode(texts, add_special_tokens=False)",
        "encode(texts)",
        "tests/data/test_encode.py",
    ),
    Mutant(
        "5 an answer is cut and gets a stop token",
        "data/lengths.py",
        "        fitting += shorter\n",
        "        fitting += [Pair(some.prompt_ids, (*some.answer_ids[:9], some.answer_ids[-1])) for some in shorter]\n",
        "tests/data/test_prepare.py",
    ),
    Mutant(
        "7 rows without a learned token are kept",
        "data/formats.py",
        "if not any(map(is_target, conversation.messages)):",
        "if False:",
        "tests/data/test_formats.py",
    ),
    Mutant(
        "10 think tags: a full text that does not start with its prompt is trained",
        "data/template.py",
        "if not full.startswith(prompt):",
        "if False:",
        "tests/data/test_template.py",
    ),
    Mutant(
        "4 stop token not learned",
        "data/template.py",
        "return rest_ids[: end + 1]",
        "return rest_ids[:end]",
        "tests/data/test_template.py",
    ),
    Mutant(
        "6 long rows kept without a word",
        "data/lengths.py",
        "if len(longest) > max_length:",
        "if False:",
        "tests/data/test_lengths.py",
    ),
    Mutant(
        "8 NaN reaches the weights",
        "loop.py",
        "if not (math.isfinite(loss) and math.isfinite(grad_norm)) and",
        "if False and",
        "tests/test_loop.py",
    ),
    Mutant(
        "8 a skipped step moves the weights",
        "loop.py",
        "            self._skip()\n",
        "            self._update()\n",
        "tests/test_loop.py",
    ),
    Mutant(
        "8 weights that are not finite are saved",
        "checkpoint.py",
        "    _require_finite(state, step)\n",
        "",
        "tests/test_checkpoint.py",
    ),
    Mutant(
        "9 trained without the generation prompt",
        "data/template.py",
        "[turn.messages[:-1] for turn in turns], prompt=True",
        "[turn.messages[:-1] for turn in turns], prompt=False",
        "tests/data/test_template.py",
    ),
    Mutant(
        "11 text lost by the template is trained",
        "data/template.py",
        "if any(text.strip() not in rest for text in given):",
        "if False:",
        "tests/data/test_template.py",
    ),
    Mutant(
        "22 trainable weights in bf16",
        "model.py",
        "autocast_adapter_dtype=True",
        "autocast_adapter_dtype=False",
        "tests/test_model.py",
    ),
    Mutant(
        "24 dropout left on in evaluation",
        "engine/step.py",
        "    model.eval()\n",
        "    pass\n",
        "tests/engine/test_step.py tests/test_samples.py",
    ),
    Mutant(
        "the base answers with the adapter on",
        "generate.py",
        "if is_on and hasattr",
        "if not is_on and hasattr",
        "tests/test_samples.py",
    ),
    Mutant(
        "what was forgotten is compared with itself",
        "forgetting.py",
        "    after = mean_loss(score(engine, pairs))",
        "    after = before",
        "tests/test_forgetting.py",
    ),
    Mutant(
        "template's tokens flatter the answers' loss",
        "evaluate.py",
        "    is_template_A[-1] = True\n",
        "",
        "tests/test_evaluate.py",
    ),
    Mutant(
        "a token's loss is another pair's",
        "engine/score.py",
        "np.array(pair.answer_ids)",
        "np.array(pair.answer_ids[::-1])",
        "tests/engine/test_score.py",
    ),
    Mutant(
        "rows read as markup in the report",
        "report.py",
        'autoescape=name.endswith("html")',
        "autoescape=False",
        "tests/test_report.py",
    ),
    Mutant(
        "26 resume replays the data from the start",
        "engine/order.py",
        "epoch, skip = divmod(start, -(-total // batch_size))",
        "epoch, skip = divmod(0, -(-total // batch_size))",
        "tests/engine/test_order.py",
    ),
    Mutant(
        "28 optimizer starts anew on resume",
        "checkpoint.py",
        '    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})\n',
        "",
        "tests/test_checkpoint.py",
    ),
    Mutant(
        "28 a checkpoint is taken as it is found",
        "checkpoint.py",
        "    broken = damage(path)\n    return MANIFEST",
        "    return None\n    return MANIFEST",
        "tests/test_checkpoint.py",
    ),
    Mutant(
        "28 the learning rate starts anew on resume",
        "checkpoint.py",
        '        group["lr"] = rate\n',
        '        group["lr"] = scheduler.base_lrs[0]\n',
        "tests/test_checkpoint.py",
    ),
    Mutant(
        "29 resume with other data",
        "checkpoint.py",
        "    if changed and not allow_changed:\n",
        "    if False:\n",
        "tests/test_checkpoint.py",
    ),
    Mutant(
        "30 what was seen is forgotten on resume",
        "watch.py",
        "            list(self.see(event))\n",
        "            pass\n",
        "tests/test_watch.py",
    ),
    Mutant(
        "31 warm-up silently ignored",
        "assembly.py",
        "num_warmup_steps=int(config.warmup_ratio * num_steps)",
        "num_warmup_steps=0",
        "tests/test_assembly.py",
    ),
    Mutant(
        "a checkpoint is renamed before its files are on the disk",
        "disk.py",
        "            os.fsync(file.fileno())\n            digest",
        "            digest",
        "tests/faults/test_power_loss.py",
    ),
    Mutant(
        "a save ends before its name is on the disk",
        "disk.py",
        "    sync_folder(target.parent)\n",
        "",
        "tests/faults/test_power_loss.py",
    ),
    Mutant(
        "the best checkpoint is pruned",
        "checkpoint.py",
        " and step_of(path) != best]",
        "]",
        "tests/test_checkpoint.py",
    ),
    Mutant(
        "two write into one run",
        "lock.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "tests/test_lock.py",
    ),
    Mutant(
        "34 adapter on another base",
        "use.py",
        'if known and known["base"]["fingerprint"] != base.fingerprint:',
        "if False:",
        "tests/test_use.py",
    ),
    Mutant(
        "35 a key given twice: the last one wins",
        "data/json_rows.py",
        "if len(value) != len(pairs):",
        "if False:",
        "tests/data/test_json_rows.py",
    ),
    Mutant(
        "35 NaN is read as a number",
        "data/json_rows.py",
        ", parse_constant=_no_constant)",
        ")",
        "tests/data/test_json_rows.py",
    ),
    Mutant(
        "35 rows of another shape are read as if they lacked keys",
        "data/prepare.py",
        "if name not in (None, first):",
        "if False:",
        "tests/data/test_bad_data.py",
    ),
    Mutant(
        "36 text of the user becomes a control token",
        "data/encode.py",
        "tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)",
        'tokenizer(MARKERS.sub("", text), add_special_tokens=False)',
        "tests/data/test_template.py",
    ),
    Mutant(
        "36 marks are not looked for",
        "data/encode.py",
        "if not MARKERS.search(text)]",
        "]",
        "tests/data/test_encode.py",
    ),
    Mutant(
        "38 use renders another prompt than training",
        "identity.py",
        "if found != trained:",
        "if False:",
        "tests/test_identity.py",
    ),
    Mutant(
        "17 rows of a batch share one position",
        "serve/batch.py",
        "[[row.num_done] for row in rows]",
        "[[max(other.num_done for other in rows)] for _ in rows]",
        "tests/serve/test_batch.py",
    ),
    Mutant(
        "17 a row sees what another one left in its place",
        "serve/cache.py",
        "is_seen = distance_B1QT >= 0",
        "is_seen = distance_B1QT >= -width",
        "tests/serve/test_batch.py",
    ),
    Mutant(
        "17 a copied prefix lacks its last token",
        "serve/batch.py",
        "self._cache.copy_row(best, slot, length=row.num_done)",
        "self._cache.copy_row(best, slot, length=row.num_done - 1)",
        "tests/serve/test_batch.py",
    ),
    Mutant(
        "37 finish_reason is always stop",
        "serve/replies.py",
        "else str(piece.finish)",
        "else STOP",
        "tests/serve/test_app.py::test_s13_limits",
    ),
    Mutant(
        "37 usage lies",
        "serve/replies.py",
        "made = sum(choice.num_tokens for choice in choices)",
        "made = len(choices)",
        "tests/serve/test_app.py::test_s13_limits",
    ),
    Mutant(
        "37 presence_penalty is taken and not used",
        "serve/schema.py",
        '"presence_penalty": (0, 0.0),',
        '"presence_penalty": (0, 0.0, 0.5),',
        "tests/serve/test_app.py::test_s12_fields",
    ),
    Mutant(
        "37 only the first part of a message is read",
        "serve/schema.py",
        '"".join(part.text for part in content)',
        "content[0].text",
        "tests/serve/test_app.py::test_s09_messages",
    ),
    Mutant(
        "S11 a stop string is shown",
        "serve/text.py",
        "return text[: min(places)], True",
        "return text, True",
        "tests/serve/test_text.py",
    ),
    Mutant(
        "S5 a client that leaves keeps its row",
        "serve/worker.py",
        "                job.is_cancelled = True",
        "                job.is_cancelled = False",
        "tests/serve/test_worker.py",
    ),
    Mutant(
        "S6 the start of a token is enough",
        "serve/guard.py",
        "hmac.compare_digest(given.strip().encode(), self._token.encode())",
        "self._token.startswith(given.strip())",
        "tests/serve/test_guard.py",
    ),
    Mutant(
        "S8 any Host is taken",
        "serve/guard.py",
        "if self._token is None and host not in LOOPBACK:",
        "if False:",
        "tests/serve/test_guard.py",
    ),
    Mutant(
        "16 tokens without weights merged all the same",
        "merge.py",
        "if num_tokens > num_rows:",
        "if False:",
        "tests/test_merge.py",
    ),
    Mutant(
        "18 merged in bfloat16",
        "merge.py",
        'model = load_base(source.base, "float32")\n    num_rows',
        'model = load_base(source.base, "bfloat16")\n    num_rows',
        "tests/test_merge.py",
    ),
    Mutant("18 what rounding loses not counted", "merge.py", "if lost > MAX_LOST:", "if False:", "tests/test_merge.py"),
    Mutant(
        "19 a tied head merged twice",
        "merge.py",
        "    _untie(model.get_base_model())\n",
        "",
        "tests/test_merge.py",
    ),
    Mutant(
        "20 the adapter lost on the way",
        "merge.py",
        "    if drift.kl > limits[0] or drift.same_best < limits[1]:",
        "    if False:",
        "tests/test_merge.py",
    ),
    Mutant(
        "34 another base",
        "identity.py",
        'if trained["fingerprint"] != fingerprint:',
        "if False:",
        "tests/test_identity.py",
    ),
    Mutant(
        "34 a fingerprint that is blind in the middle",
        "fingerprint.py",
        'digest = hashlib.file_digest(file, "sha256").hexdigest()',
        "digest = hashlib.sha256(file.read(1 << 16)).hexdigest()",
        "tests/test_fingerprint.py",
    ),
    Mutant(
        "38 another template with the same probes",
        "identity.py",
        'if renderer.template_hash != known["template_sha256"]:',
        "if False:",
        "tests/test_identity.py",
    ),
    Mutant(
        "38 the token that ends a turn not named in generation_config.json",
        "merge.py",
        "[*dict.fromkeys([end, *renderer.stop_ids])]",
        "[*renderer.stop_ids]",
        "tests/test_merge.py",
    ),
    Mutant(
        "38 a GGUF file without the template of training",
        "export/gguf.py",
        "    writer.add_chat_template(template)\n",
        '    writer.add_chat_template("{{ messages }}")\n',
        "tests/export/test_gguf.py",
    ),
    Mutant(
        "38 a Modelfile that was not proven",
        "export/ollama.py",
        "if skip + render(template, messages) != renderer.tokenizer.decode(ids, skip_special_tokens=False):",
        "if False:",
        "tests/export/test_ollama.py",
    ),
    Mutant(
        "heads not interleaved for llama.cpp",
        "export/gguf.py",
        "return rows.swapaxes(1, 2).reshape(weight.shape)",
        "return rows.reshape(weight.shape)",
        "tests/export/test_gguf.py",
    ),
    Mutant(
        "a secret sent to the hub",
        "export/hub.py",
        "if SECRET.search(content):",
        "if False:",
        "tests/export/test_upload.py",
    ),
    Mutant(
        "the page writes markup",
        "studio/static/parts/rows.js",
        '<div class="content">${content}</div>',
        '<div class="content" dangerouslySetInnerHTML=${{ __html: content }}></div>',
        "tests/studio/test_static.py",
    ),
    Mutant(
        "a text of the page that is nowhere",
        "studio/static/pages/data.js",
        't("data_title")',
        't("data_titel")',
        "tests/messages/test_catalogue.py",
    ),
    Mutant(
        "studio: any name of this machine's address",
        "studio/door.py",
        "check_place(headers, is_local=self._token is None)",
        "check_place(headers, is_local=False)",
        "tests/studio/test_door.py",
    ),
    Mutant(
        "studio: no cookie asked for",
        "studio/door.py",
        "if not is_known or headers.get(",
        "if headers.get(",
        "tests/studio/test_door.py",
    ),
    Mutant(
        "studio: a folder whose name begins alike",
        "studio/places.py",
        "any(found.is_relative_to(root) for root in self.roots) else None",
        "any(str(found).startswith(str(root)) for root in self.roots) else None",
        "tests/studio/test_places.py",
    ),
    Mutant(
        "studio: words that name files anywhere",
        "studio/jobs.py",
        "self._places.inside(path.strip())",
        "path.strip()",
        "tests/studio/test_jobs.py",
    ),
    Mutant(
        "studio: highest losses thinned away",
        "studio/series.py",
        "for side in (values, -values)]",
        "for side in (values,)]",
        "tests/studio/test_series.py",
    ),
    Mutant(
        "studio: half a line read",
        "studio/series.py",
        'data = data[: data.rfind(b"\\n") + 1]',
        "data = bytes(data)",
        "tests/studio/test_series.py",
    ),
    Mutant(
        "studio: read on in a file that was cut",
        "studio/series.py",
        "if inode != self._inode or size < self._offset:",
        "if size < self._offset:",
        "tests/studio/test_series.py",
    ),
    Mutant(
        "studio: the rows of the step before",
        "studio/runs.py",
        """start = f'{{"step": {step},'""",
        """start = f'{{"step": {max(step - 1, 1)},'""",
        "tests/studio/test_rows.py",
    ),
    Mutant(
        "studio: the first learned token shown as prompt",
        "studio/rows.py",
        '"learned": len(pair.prompt_ids),',
        '"learned": len(pair.prompt_ids) + 1,',
        "tests/studio/test_rows.py",
    ),
    Mutant(
        "studio: events of a cut file told as if they went on",
        "studio/live.py",
        "if inode and inode_now != inode:",
        "if False:",
        "tests/studio/test_live.py",
    ),
    Mutant(
        "a library of the page changed by hand",
        "studio/static/vendor/htm.js",
        "t=new Map;export",
        "t=new Map; export",
        "tests/studio/test_static.py",
    ),
)


def survives(mutant: Mutant, repository: Path) -> bool:
    """Return True if the tests pass although the bug is in."""
    path = repository / "src" / "truetune" / mutant.file
    original = path.read_text(encoding="utf-8")
    if original.count(mutant.old) != 1:
        sys.exit(f"{mutant.name}: {mutant.file} holds the place {original.count(mutant.old)} times; mend the table")
    path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    environment = os.environ | {
        "PYTHONPATH": str(repository / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRUETUNE_SHARED": os.environ.get("TRUETUNE_SHARED", str(ROOT.parent / "shared")),
    }
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow and not real", *mutant.tests.split()]
    try:
        done = subprocess.run(words, cwd=repository, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    finally:
        path.write_text(original, encoding="utf-8")
    if done.returncode not in (0, 1):
        sys.exit(
            f"{mutant.name}: the tests did not run (exit {done.returncode})\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.returncode == 0


def main(words: list[str]) -> int:
    """Try the mutants that hold one of `words` (all without any); return the number that survived."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, repository, ignore=ignored)
        for mutant in chosen:
            began = time.perf_counter()
            alive = survives(mutant, repository)
            survived += alive
            verdict = "SURVIVED" if alive else "noticed"
            sys.stdout.write(f"{verdict:9} {time.perf_counter() - began:5.1f} s  {mutant.name}\n")
            sys.stdout.flush()
    sys.stdout.write(f"mutants: {len(chosen)} tried, {survived} survived\n")
    return survived


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
