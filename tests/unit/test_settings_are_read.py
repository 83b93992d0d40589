"""Every key of the settings is read by the code it is for: one that nothing reads would be a false promise.

mypy says of which type the `x` of every `x.name` is. A field counts as read where `x` is its section, in the package,
the tools or the launchers. Validators do not count: they check a field, they do not act on it.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from megatron_nft.algorithms import ALGORITHMS, algorithm_class
from megatron_nft.config import Config
from megatron_nft.section import Section

ROOT = Path(__file__).parents[2]
SECTION = "megatron_nft.section.Section"

ONLY_CHECKED = {"rollout.allow_biased_sampling": "permits settings that a validator refuses without it"}
"""Dotted key -> why a validator is all that reads it."""

MADE_UP = '''
"""Fields that are read, and fields that are not, under names that other objects have too."""
from pydantic import model_validator
from megatron_nft.section import Section

class Inner(Section):
    path: str = ""
    name: str = ""

class Outer(Section):
    inner: Inner = Inner()
    read: int = 1
    read_in_a_property: int = 1
    checked: int = 1
    checked_by_method: int = 1
    step: int = 1

    @model_validator(mode="after")
    def _check(self) -> "Outer":
        assert self.checked > 0
        return self

    def check_more(self) -> None:
        assert self.checked_by_method > 0

    @property
    def twice(self) -> int:
        return 2 * self.read_in_a_property

class Derived(Outer):
    own: int = 1

class Other:
    step: int = 1
    name: str = ""

def work(settings: Outer | None, other: Other, derived: Derived) -> str:
    assert settings
    inner = settings.inner
    return f"{inner.path} {derived.read} {other.step} {other.name}"
'''


def sources() -> list[tuple[str, str, str]]:
    """(module, path, text) of all files that may read a setting, and of the made-up one."""
    files = [p for folder in ("megatron_nft", "tools", "launch_slurm") for p in sorted((ROOT / folder).rglob("*.py"))]
    found = [
        (".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), str(p), p.read_text("utf-8"))
        for p in files
    ]
    assert len(found) > 100
    return [*found, ("made_up", "made_up.py", MADE_UP)]


def without_validators(text: str) -> str:
    """The source with blank lines in place of validators, and of methods of sections that return nothing."""
    lines = text.split("\n")
    for owner in (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef)):
        in_section = any(ast.unparse(base).endswith(("Section", "Settings", "Outer")) for base in owner.bases)
        for method in (n for n in owner.body if isinstance(n, ast.FunctionDef)):
            decorators = [ast.unparse(d).partition("(")[0] for d in method.decorator_list]
            checks = in_section and method.returns is not None and ast.unparse(method.returns) == "None"
            if checks or any(d.endswith("_validator") for d in decorators):
                first = min([method.lineno, *(d.lineno for d in method.decorator_list)])
                lines[first - 1 : method.end_lineno] = [""] * (method.end_lineno - first + 1)
    return "\n".join(lines)


@pytest.fixture(scope="module")
def read() -> set[tuple[str, str]]:
    """(class that declares it, field) of every field of a section that is read somewhere."""
    from mypy import build
    from mypy.modulefinder import BuildSource
    from mypy.nodes import MemberExpr
    from mypy.options import Options
    from mypy.types import Instance, TypeVarType, get_proper_type

    options = Options()
    options.export_types, options.preserve_asts, options.incremental = True, True, False
    options.ignore_errors, options.check_untyped_defs = True, True
    # Of other packages only the part of pydantic that wraps the type of a field must be understood.
    options.follow_imports = "skip"
    options.per_module_options = {name: {"follow_imports": "silent"} for name in ("pydantic", "pydantic.*")}
    options.build_per_module_cache()
    result = build.build([BuildSource(p, module, without_validators(t)) for module, p, t in sources()], options)

    found = set()
    for expression in result.types:
        owner = get_proper_type(result.types.get(expression.expr)) if isinstance(expression, MemberExpr) else None
        owner = get_proper_type(owner.upper_bound) if isinstance(owner, TypeVarType) else owner
        if isinstance(owner, Instance) and any(base.fullname == SECTION for base in owner.type.mro):
            declaring = [base.fullname for base in owner.type.mro if expression.name in base.names]
            if declaring:
                found.add((declaring[-1], expression.name))
    return found


def fields(section: type[Section], path: str = "") -> dict[str, tuple[str, str]]:
    """Dotted key -> (class that declares it, field), sections below included."""
    found = {}
    for name, field in section.model_fields.items():
        declaring = [c for c in section.__mro__ if name in inspect.get_annotations(c)][-1]
        found[f"{path}{name}"] = (f"{declaring.__module__}.{declaring.__qualname__}", name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= fields(field.annotation, f"{path}{name}.")
    return found


def test_every_setting_is_read(read):
    declared = fields(Config)
    for name in ALGORITHMS:
        declared |= fields(algorithm_class(name).Settings, f"algorithm({name}).")
    assert {"rollout.server.urls", "policy.fp8.recipe", "algorithm(nft).clamp", "algorithm.truncated"} <= set(declared)
    unread = {key for key, where in declared.items() if where not in read}
    assert unread == set(ONLY_CHECKED), "read it, remove it, or say in ONLY_CHECKED why a validator is enough"


def test_a_field_that_nothing_reads_is_found(read):
    declared = {("Inner", "path"), ("Inner", "name"), ("Derived", "own")}
    declared |= {
        ("Outer", name) for name in ("inner", "read", "read_in_a_property", "checked", "checked_by_method", "step")
    }
    unread = {(owner, name) for owner, name in declared if (f"made_up.{owner}", name) not in read}
    assert unread == {
        ("Inner", "name"),  # Other.name is another one
        ("Outer", "checked"),
        ("Outer", "checked_by_method"),
        ("Outer", "step"),
        ("Derived", "own"),
    }
