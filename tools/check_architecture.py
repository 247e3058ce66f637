"""The rules of the code base, run: imports, one home per fact, sizes, documentation. Part of `make check`.

    python tools/check_architecture.py

Prints one line a violation (file:line, rule, what) and exits 1 if there is any. The rules' reasons: CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "truetune"
HEAVY = {"torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub"}
MAX_FILE_LINES, MAX_BODY_LINES, MAX_PARAMETERS, MAX_POSITIONAL = 400, 60, 6, 2

# What each module may import from the package: the layers, bottom up. "x.*" means every module below x.
MAY_IMPORT: dict[str, set[str]] = {
    "messages": set(),
    **{f"messages.{path.stem}": set() for path in (PACKAGE / "messages").glob("??*.py") if path.stem != "__init__"},
    "errors": {"messages"},
    "records": set(),
    "contradictions": {"errors"},
    "config": {"contradictions", "errors"},
    "console": {"records", "messages"},
    "disk": {"errors"},
    "lock": {"disk", "errors"},
    "rundir": {"disk", "errors", "lock", "records"},
    "signals": set(),
    "place": {"errors"},
    "ranks": {"errors", "place"},
    "launch": {"config", "errors", "place"},
    "data": set(),
    "data.mark": set(),
    "data.json_rows": {"errors", "records", "data.mark"},
    "data.dataset_info": {"errors"},
    "data.sources": {"errors", "records", "hub", "data.dataset_info", "data.json_rows", "data.mark"},
    "data.stream": {"errors", "records", "data.batches", "data.mark", "data.sources"},
    "data.feed": {"errors", "records", "data.batches", "data.crew", "data.store", "data.stream"},
    "data.head": {"config", "messages", "data.*"},
    "data.turns": {"errors", "records", "data.json_rows"},
    "data.formats": {"records", "data.turns"},
    "data.encode": set(),
    "data.jinja": {"errors", "records"},
    "data.template": {"errors", "records", "signals", "data.encode", "data.jinja", "data.turns"},
    "data.lengths": {"errors", "records", "data.template", "data.turns"},
    "data.store": {"records"},
    "data.tally": {"errors"},
    "data.duplicates": {"data.store"},
    "data.report": {
        *("config", "errors", "messages", "records"),
        *(
            "data.duplicates",
            "data.lengths",
            "data.store",
            "data.tally",
            "data.template",
            "engine.trie",
            "engine.order",
        ),
    },
    "data.batches": {
        *("config", "errors", "records"),
        *("data.encode", "data.formats", "data.lengths", "data.store", "data.tally", "data.template", "data.turns"),
    },
    "data.crew": {"data.batches"},
    "data.prepare": {"config", "errors", "records", "data.*", "engine.order"},
    "engine": set(),
    "engine.trie": {"records"},
    "engine.order": set(),
    "engine.attention": {"records", "engine.branches", "engine.flash"},
    "engine.branches": {"records"},
    "engine.delta": {"engine.branches"},
    "engine.hybrid": {"engine.branches", "engine.delta"},
    "engine.flash": set(),
    "engine.families": set(),
    "engine.fused": {"engine.hybrid", "engine.lora"},
    "engine.quiet": set(),
    "engine.quantised": {"engine.quiet"},
    "engine.lora": {"engine.quantised", "engine.quiet"},
    "engine.loss": set(),
    "engine.step": {"records", "engine.answers", "engine.attention", "engine.loss", "engine.trie"},
    "engine.deal": {"records", "engine.step", "engine.trie"},
    "engine.objective": {"records", "engine.deal", "engine.step"},
    "engine.shard": {"errors", "engine.memory"},
    "engine.score": {"records", "engine.step", "engine.trie"},
    "engine.answers": {"records"},
    "engine.preference": {
        *("records", "engine.answers", "engine.deal", "engine.objective", "engine.score", "engine.step", "engine.trie"),
    },
    "engine.compare": {"records", "engine.attention", "engine.fused", "engine.objective", "engine.step", "engine.trie"},
    "engine.master": set(),
    "engine.memory": {"errors", "ranks", "records", "engine.objective", "engine.step"},
    "hub": {"errors"},
    "weights": {"errors"},
    "fingerprint": {"config", "disk", "weights"},
    "quantisation": {"errors", "engine.quiet", "weights"},
    "model": {"errors", "config", "fingerprint", "hub", "quantisation", "weights", "engine.*"},
    "lora_files": {"engine.lora"},
    "trained": {"disk", "engine.master", "lora_files", "model", "weights"},
    "checkpoint": {"disk", "engine.master", "errors", "lora_files", "ranks", "trained", "weights"},
    "watch": set(),
    "cores": set(),
    "loop": {"cores", "errors", "ranks", "records", "signals", "engine.*"},
    "generate": {"cores", "errors", "records", "data.template", "model"},
    "evaluate": {"ranks", "records", "engine.*"},
    "samples": {"records", "engine.step", "data.template", "generate"},
    "forgetting": {"records", "engine.*", "data.template", "generate"},
    "card": {"records", "engine.*", "data.template", "generate", "evaluate", "forgetting", "samples"},
    "diagnosis": {"card"},
    "templates": set(),
    "report": {"console", "disk", "messages", "rundir", "templates"},
    "identity": {"disk", "errors", "records", "data.template"},
    "trackers": {"errors", "config", "signals"},
    "preflight": {
        *("errors", "config", "console", "messages", "records", "model", "quantisation", "weights", "data.*"),
    },
    "page": {"config", "disk", "messages", "preflight", "templates"},
    "optimizer": {"config", "console", "engine.master"},
    "loading": {
        *("config", "console", "errors", "model", "preflight", "ranks", "weights"),
        *("engine.memory", "engine.quantised", "engine.shard"),
    },
    "assembly": {
        "loading",
        "optimizer",
        *("errors", "config", "console", "records", "engine.*", "model", "checkpoint", "loop", "evaluate", "preflight"),
        *("place", "ranks", "samples", "weights"),
    },
    "follow": {
        *(
            "assembly",
            "card",
            "checkpoint",
            "config",
            "console",
            "errors",
            "preflight",
            "ranks",
            "records",
            "rundir",
            "signals",
        ),
        "watch",
    },
    "measure": {"assembly", "engine.*", "evaluate", "loop", "records"},
    "output": {"errors", "config", "disk", "rundir", "data.*", "checkpoint", "identity", "loop", "preflight"},
    "teller": {"console", "output", "rundir", "trackers"},
    "verify": {"assembly", "checkpoint", "config", "console", "disk", "errors", "preflight", "records", "rundir"},
    "training": {
        *(
            "errors",
            "config",
            "console",
            "disk",
            "follow",
            "lock",
            "ranks",
            "rundir",
            "signals",
            "teller",
            "watch",
            "checkpoint",
            "trackers",
            "assembly",
            "card",
            "diagnosis",
            "output",
            "preflight",
            "records",
            "report",
        )
    },
    "search": {"config"},
    "tunedir": {"disk", "errors", "lock", "search"},
    "tune_report": {"config", "console", "disk", "messages", "search", "templates", "tunedir"},
    "tuning": {
        *(
            "assembly",
            "loading",
            "checkpoint",
            "config",
            "console",
            "disk",
            "engine.*",
            "errors",
            "evaluate",
            "lock",
            "loop",
        ),
        *("measure", "preflight", "records", "rundir", "search", "signals", "tune_report", "tunedir"),
    },
    "source": {
        *("errors", "records", "rundir", "data.store", "data.template", "model", "checkpoint", "identity"),
    },
    "use": {"errors", "records", "rundir", "data.template", "model", "source", "generate"},
    "serve": set(),
    "serve.cache": set(),
    "serve.sampler": set(),
    "serve.text": set(),
    "serve.batch": {"records", "serve.cache", "serve.sampler"},
    "serve.worker": {"cores", "engine.memory", "serve.batch", "serve.sampler", "serve.text"},
    "serve.schema": {"records"},
    "serve.replies": {"serve.sampler", "serve.text", "serve.worker"},
    "serve.guard": {"errors", "messages", "serve.schema"},
    "serve.listen": {"errors", "serve.guard"},
    "serve.app": {"errors", "data.jinja", "data.template", "use", "serve.*"},
    "serve.running": {"errors", "messages", "use", "serve.*"},
    "serve.vllm": {"errors", "data.template", "model", "use"},
    "drift": {"records"},
    "merge": {
        *("checkpoint", "config", "disk", "drift", "errors", "generate", "identity", "model", "records", "source"),
        *("data.template", "weights"),
    },
    "export": set(),
    "export.vocabulary": {"errors"},
    "export.gguf": {"errors", "export.vocabulary"},
    "export.llama": {"errors"},
    "export.ollama": {"errors", "records", "data.template"},
    "export.hub": {"errors"},
    "export.proven": {"disk", "drift", "errors", "export.*", "identity", "merge", "model", "source"},
    "export.adapter": {"disk", "errors", "export.*", "merge", "model", "source"},
    "studio": set(),
    "studio.keeper": set(),
    "studio.series": set(),
    "studio.runs": {"config", "disk", "errors", "lock", "report", "rundir", "studio.series"},
    "studio.rows": {"config", "data.store", "disk", "errors", "records", "rundir"},
    "studio.live": {"disk", "rundir", "studio.runs"},
    "studio.places": {"disk", "errors"},
    "studio.fields": {"config", "errors", "messages"},
    "studio.jobs": {"cli", "disk", "errors", "rundir", "studio.places"},
    "studio.talk": {"disk", "errors", "rundir", "studio.fields", "studio.places", "studio.rows"},
    "studio.door": {"disk", "messages", "serve.guard", "serve.schema"},
    "studio.app": {"disk", "errors", "messages", "report", "serve.guard", "studio.*"},
    "studio.running": {"config", "errors", "serve.guard", "serve.listen", "studio.*"},
    "cli": {"errors", "config", "messages", "console", "commands.*"},
    "__main__": {"cli"},
    "": {"config", "console", "place", "records", "report", "rundir", "preflight", "training", "use"},
    "commands": set(),
}
COMMANDS_MAY_NOT_IMPORT = {"commands.*", "__main__"}

# The command line, other people's services (whatever they raise, hours of training are worth more), and the server's
# model: what one answer raises must not end the others.
MAY_CATCH_ALL = {"cli.py", "disk.py", "lock.py", "trackers.py", "serve/worker.py"}

# A fact and the only files that may hold it.
HOMES = {
    r"\bapply_chat_template\(": {"data/template.py"},
    r"(?<![\w.])-100\b": {"records.py"},
    r"\bfrom_pretrained\(": {"model.py"},
    r"(?<![\w.])print\(": set(),
    r"\bos\.environ\b": {"config.py", "cli.py", "place.py"},
    r"\btrust_remote_code\b": set(),
    # Only in the pipes between one process and its helpers, never in a file.
    r"\bpickle\b": {"data/crew.py"},
    r"\btorch\.(save|load)\(": set(),
}


def modules() -> dict[str, Path]:
    """Return {dotted name below truetune: file}; a package's __init__ is the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, known: set[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, module) for each import from the package, lazy ones and those for typing included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "truetune":
            base = node.module.removeprefix("truetune").lstrip(".")
            for alias in node.names:
                deeper = f"{base}.{alias.name}".lstrip(".")
                yield node.lineno, deeper if deeper in known else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "truetune":
                    yield node.lineno, alias.name.removeprefix("truetune").lstrip(".")


def allowed(module: str, target: str) -> bool:
    """Return True if `module` may import `target`."""
    if module.startswith("commands."):
        return not target.startswith("commands.") and target != "__main__"
    table = MAY_IMPORT.get(module, set())
    return target in table or any(rule.endswith(".*") and target.startswith(rule[:-1]) for rule in table)


def check_imports(trees: dict[str, ast.AST]) -> Iterator[str]:
    """Yield imports against the layers, modules without a rule, and cycles."""
    graph: dict[str, set[str]] = {}
    for module, tree in trees.items():
        if module not in MAY_IMPORT and not module.startswith("commands."):
            yield f"{module}: imports: no rule for this module in tools/check_architecture.py"
        graph[module] = set()
        for line, target in imports(tree, set(trees)):
            graph[module].add(target)
            if not allowed(module, target):
                yield f"{module}:{line}: imports: may not import {target or 'truetune'}"
    # Commands import cli for its helpers, cli imports commands by name at run time: that is not an import statement.
    for module in graph:
        path = find_cycle(graph, module)
        if path:
            yield f"{module}: imports: cycle {' -> '.join(path)}"


def check_light(trees: dict[str, ast.AST]) -> Iterator[str]:
    """Yield modules that the studio reaches, at import or later, and that load torch: a crash there would end it."""
    reached, waiting = set(), [module for module in trees if module.split(".")[0] == "studio"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += [target for _, target in imports(trees[module], set(trees)) if target in trees]
    for module in sorted(reached):
        for node in ast.walk(trees[module]):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if HEAVY & {name.split(".")[0] for name in names}:
                yield f"{module}:{getattr(node, 'lineno', 0)}: light: the studio reaches this, and it imports torch"


def find_cycle(graph: dict[str, set[str]], start: str) -> list[str]:
    """Return a path from `start` back to itself, or []."""
    stack, seen = [(start, [start])], set()
    while stack:
        module, path = stack.pop()
        for target in graph.get(module, ()):
            if target == start:
                return [*path, start]
            if target not in seen:
                seen.add(target)
                stack.append((target, [*path, target]))
    return []


def check_homes(paths: dict[str, Path]) -> Iterator[str]:
    """Yield facts outside their homes; comments and docstrings do not count."""
    for path in paths.values():
        code = strip_prose(path.read_text(encoding="utf-8"))
        name = path.relative_to(PACKAGE).as_posix()
        for pattern, homes in HOMES.items():
            if name in homes:
                continue
            for match in re.finditer(pattern, code):
                yield f"{name}:{code.count(chr(10), 0, match.start()) + 1}: home: {match.group()}"


def strip_prose(source: str) -> str:
    """Return the source with docstrings and comments blanked, line numbers kept."""
    tree = ast.parse(source)
    lines = source.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
    return "\n".join(re.sub(r"(^|\s)#.*$", "", line) for line in lines)


def check_shape(name: str, path: Path, tree: ast.AST) -> Iterator[str]:
    """Yield files, functions and signatures that are too large, and what is not documented or typed."""
    count = len(path.read_text(encoding="utf-8").splitlines())
    if count > MAX_FILE_LINES:
        yield f"{name}: size: {count} lines, at most {MAX_FILE_LINES}"
    if ast.get_docstring(tree) is None:  # type: ignore[arg-type]
        yield f"{name}: docs: the module has no docstring"
    inner = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.ClassDef) and node.name.startswith("_"))
        for part in list(ast.walk(node))[1:]
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield from check_function(name, node, is_inner=id(node) in inner)
        elif (
            id(node) not in inner
            and isinstance(node, ast.ClassDef)
            and not node.name.startswith("_")
            and ast.get_docstring(node) is None
        ):
            yield f"{name}:{node.lineno}: docs: class {node.name} has no docstring"
        if isinstance(node, ast.Assert):
            yield f"{name}:{node.lineno}: errors: assert vanishes under -O; raise instead"
        if isinstance(node, ast.ExceptHandler):
            yield from check_handler(name, node)


def check_function(name: str, node: ast.FunctionDef, *, is_inner: bool) -> Iterator[str]:
    """Yield what is wrong with one function's length, parameters or docstring; an inner function needs none."""
    where = f"{name}:{node.lineno}"
    docstring = ast.get_docstring(node) is not None
    first = node.body[1] if docstring and len(node.body) > 1 else node.body[0]
    length = (node.end_lineno or node.lineno) - (first.lineno if docstring else node.lineno) + 1
    if length > MAX_BODY_LINES:
        yield f"{where}: size: {node.name} has {length} lines, at most {MAX_BODY_LINES}"
    positional = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args) if arg.arg not in ("self", "cls")]
    total = len(positional) + len(node.args.kwonlyargs)
    if total > MAX_PARAMETERS:
        yield f"{where}: size: {node.name} has {total} parameters, at most {MAX_PARAMETERS}"
    # Inside a function or a private class nothing is public.
    is_public = not node.name.startswith("_") and not is_inner
    if is_public and len(positional) > MAX_POSITIONAL:
        yield f"{where}: size: {node.name} takes {len(positional)} arguments by position, at most {MAX_POSITIONAL}"
    if is_public and not docstring:
        yield f"{where}: docs: {node.name} has no docstring"
    defaults = [*node.args.defaults, *(default for default in node.args.kw_defaults if default is not None)]
    if any(isinstance(default, ast.List | ast.Dict | ast.Set) for default in defaults):
        yield f"{where}: defaults: {node.name} has a mutable default"


def check_handler(name: str, node: ast.ExceptHandler) -> Iterator[str]:
    """Yield broad handlers, and handlers that hide what they caught."""
    names = [getattr(part, "id", "") for part in ast.walk(node.type)] if node.type else ["Exception"]
    if {"Exception", "BaseException"} & set(names) and name not in MAY_CATCH_ALL:
        yield f"{name}:{node.lineno}: errors: broad handler"
    if len(node.body) == 1 and isinstance(node.body[0], ast.Pass):
        yield f"{name}:{node.lineno}: errors: except: pass"


def check_errors(name: str, tree: ast.AST) -> Iterator[str]:
    """Yield faults raised without a place or a fix."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        if node.func.id in ("UserError", "RowError", "MachineError", "NumericsError"):
            given = {keyword.arg for keyword in node.keywords}
            if not {"where", "fix"} <= given:
                yield f"{name}:{node.lineno}: errors: {node.func.id} without where and fix"


def check_test_files(paths: dict[str, Path]) -> Iterator[str]:
    """Yield modules that no test file of their name belongs to."""
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for module, path in paths.items():
        stem = module.rsplit(".", 1)[-1] or "api"
        expected = {f"test_{stem}.py", f"test_{path.parent.name}.py", "test_catalogue.py"}
        if path.name == "__init__.py" and stem != "api":
            continue
        wanted = expected if module.startswith("messages") else {f"test_{stem}.py"}
        if stem != "__main__" and not wanted & tests:
            yield f"{path.relative_to(PACKAGE)}: tests: no tests/**/test_{stem}.py"


def check_readme_tree(paths: dict[str, Path]) -> Iterator[str]:
    """Yield files that the README's tree does not name, and names in it that do not exist."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```\nsrc/truetune/\n(.*?)```", text, re.DOTALL)
    if block is None:
        yield "README.md: tree: no block that starts with src/truetune/"
        return
    named = set(re.findall(r"[\w/]+\.py", block.group(1)))
    real = {path.name for path in paths.values() if path.name != "__init__.py"}
    for name in sorted(real - named):
        yield f"README.md: tree: {name} is missing"
    for name in sorted(named - real - {"__init__.py"}):
        yield f"README.md: tree: {name} does not exist"


def violations() -> list[str]:
    """Return every violation in the code base."""
    paths = modules()
    trees: dict[str, ast.AST] = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    found = [
        *check_imports(trees),
        *check_light(trees),
        *check_homes(paths),
        *check_test_files(paths),
        *check_readme_tree(paths),
    ]
    for module, path in paths.items():
        name = path.relative_to(PACKAGE).as_posix()
        found += [*check_shape(name, path, trees[module]), *check_errors(name, trees[module])]
    return found


if __name__ == "__main__":
    lines = violations()
    sys.stdout.writelines(line + "\n" for line in lines)
    sys.stdout.write(f"architecture: {len(modules())} modules, {len(lines)} violations\n")
    sys.exit(bool(lines))
