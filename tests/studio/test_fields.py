"""Forms made of the configuration: every key, and what the form sends is what the configuration takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from truetune.config import Config, examples_folder, load_yaml, resolve
from truetune.errors import UserError, UserErrors
from truetune.messages import CATALOGUES, text
from truetune.studio.fields import NOT_IN_A_RECIPE, fault, fields, models, presets


@pytest.mark.parametrize("lang", CATALOGUES)
def test_every_key_has_a_field(lang: str) -> None:
    found = fields(lang)
    assert [field["name"] for field in found] == list(Config.model_fields)
    assert {field["kind"] for field in found} == {"text", "number", "bool", "choice", "list"}
    assert all(field["help"] == text(f"field.{field['name']}", lang) for field in found)
    kinds = {field["name"]: (field["kind"], field["choices"]) for field in found}
    assert kinds["learning_rate"] == ("number", [])
    assert kinds["eval_steps"] == ("number", ["auto"])
    assert kinds["train_on"] == ("choice", ["all_turns", "last_turn"])
    assert kinds["template"] == ("choice", ["chatml", "instruction-response"])
    assert kinds["gradient_checkpointing"] == ("choice", ["auto", "true", "false"])
    assert kinds["streaming"] == ("bool", [])
    assert kinds["use_dora"] == ("bool", [])
    assert kinds["target_modules"][0] == "list"


def test_every_choice_is_taken() -> None:
    num_tried = 0
    for field in fields("en"):
        for choice in field["choices"]:
            if field["kind"] != "list":
                assert resolve({field["name"]: choice}).config is not None
                num_tried += 1
    assert num_tried > 25


def test_recipes_are_the_examples_without_their_files() -> None:
    found = presets()
    assert len(found) == 9
    for preset in found:
        values, _ = load_yaml(examples_folder() / f"{preset['name']}.yaml")
        assert preset["values"] == {key: value for key, value in values.items() if key not in NOT_IN_A_RECIPE}
        assert resolve(preset["values"]).config is not None


def test_faults_are_where_what_fix() -> None:
    one = UserError("no_folder", where="a", fix="no_folder", folder="<b>")
    assert fault(one, "en")["message"] == "the folder <b> does not exist"
    with pytest.raises(UserErrors) as caught:
        resolve({"lora_r": 0, "lora_alpha": "x"})
    told = fault(caught.value, "zh")
    assert told["where"] == "--lora-r\n--lora-alpha"
    assert len(told["message"].split("\n")) == 2


def test_models_that_lie_about(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "x.gguf").write_text("")
    assert models(tmp_path, ["a", None, "a"]) == ["a", str(tmp_path / "m"), str(tmp_path / "x.gguf")]
