"""The pages that are written as files, from static/: one look, and no text of a row is ever read as markup."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader


def render(name: str, lang: str, **values: Any) -> str:
    """Return the page or text `name` of static/, filled with `values`; in pages everything is escaped."""
    environment = Environment(
        loader=PackageLoader("truetune", "static"),
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["indented"] = lambda shown: "\n".join(f"    {line}" for line in str(shown).splitlines())
    return environment.get_template(name).render(lang="zh-CN" if lang == "zh" else lang, **values)
