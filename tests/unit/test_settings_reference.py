"""docs/settings.md: current, complete, and with a text for every key."""

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from megatron_nft.algorithms import ALGORITHMS
from megatron_nft.config import load_config
from megatron_nft.section import Section

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("settings_reference", ROOT / "tools" / "settings_reference.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def dotted(tree, path=""):
    """Keys of a mapping of settings, those of `model.architecture` left out: it is one value."""
    for key, value in tree.items():
        if isinstance(value, dict) and key not in ("architecture", "env"):
            yield from dotted(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def test_the_page_is_current(reference):
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == reference.page(), (
        "run python tools/settings_reference.py > docs/settings.md"
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_page_has_every_key_of_the_resolved_settings(name):
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    parts = page.replace("\n### ", "\n## ").split("\n## ")
    bodies = {part.partition("\n")[0].strip("`"): part for part in parts}
    config = load_config([ROOT / "configs" / "quickstart.yaml"], [f"algorithm.name={name}"])
    missing = []
    for key in dotted(config.model_dump(mode="json")):
        section, _, field = key.rpartition(".")
        texts = bodies[section or "Top level"]
        if section == "algorithm":
            texts += bodies[f"algorithm.name={name}"]
        if f"\n| `{field}` | " not in texts:
            missing.append(key)
    assert missing == []


def test_a_field_without_a_text_is_refused(reference):
    class MadeUp(Section):
        """A section."""

        told: int = 1
        """A number."""
        untold: int = 2

    with pytest.raises(ValueError, match=r"MadeUp\.untold has no text below it"):
        reference.table(MadeUp)


def test_rows_by_hand(reference):
    class MadeUp(Section):
        """A section."""

        share: Annotated[float, Field(gt=0, le=1)] = 0.5
        """Share
        of a | b."""
        folder: Path
        """A folder."""
        mode: Literal["a", "b"] | None = None
        """A mode."""

    assert reference.table(MadeUp) == (
        "| key | values | default | |\n"
        "|---|---|---|---|\n"
        "| `share` | number, > 0, ≤ 1 | `0.5` | Share of a \\| b. |\n"
        "| `folder` | path | required | A folder. |\n"
        "| `mode` | `a`, `b` or `null` | `null` | A mode. |\n"
    )


def test_inherited_fields_have_their_texts_and_may_be_given_new_ones(reference):
    class Parent(Section):
        """A section."""

        first: int = 1
        """First."""
        second: int = 2
        """Second."""

    class Child(Parent):
        """A section."""

        second: int = 3
        """Second of the child."""

    assert reference.field_texts(Child) == {"first": "First.", "second": "Second of the child."}


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (bool, "`true`, `false`"),
        (list[Path], "list of paths"),
        (dict[str, Any], "mapping of text to any value"),
        (Literal["tokens"] | Annotated[float, Field(gt=0)], "`tokens` or number, > 0"),
        (Annotated[int, Field(ge=2)] | None, "integer, ≥ 2 or `null`"),
    ],
)
def test_values_in_words(reference, annotation, words):
    assert reference.values(annotation) == words
