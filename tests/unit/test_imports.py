"""Who may import whom (docs/architecture.md), read from the source without importing anything."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_nft"

LAYERS = (
    ("types", "section", "files", "file_array", "locks", "processes", "distributed", "console", "arguments", "metrics"),
    ("algorithms",),
    ("config", "losses"),
    ("verify",),
    ("data",),
    ("policy",),
    ("weights",),
    ("engines",),
    ("plan", "report"),
    ("evaluate",),
    ("train",),
    ("cli",),
    ("__main__",),
)
"""From the ground up. A part imports from layers below its own, and from itself."""
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
TOP_MODULES, TOP_PACKAGES = 12, 11
ALIASES = {"losses"}


UNPICKLES = {"distributed.py", "policy/checkpoint_metadata.py", "verify/pool.py", "verify/worker.py"}
"""Between processes that the run started itself; policy/checkpoint_metadata.py holds a restricted unpickler for torch's
own index of a checkpoint."""


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports at any depth, type-checking blocks left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{a.name}" for a in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    return files


def ours(path: Path) -> set[str]:
    """The part of a dotted name behind `megatron_nft.`, for every import of our own."""
    names = {name.removeprefix("megatron_nft.") for name in imports(path) if name.startswith("megatron_nft.")}
    return names - {"__version__"}


def test_every_part_has_its_layer():
    tops = {part_of(path) for path in sources()} - {"__init__"}
    assert tops == set(LAYER)


def test_no_part_imports_from_its_own_layer_or_above():
    wrong = []
    for path in sources():
        part = part_of(path)
        for name in ours(path):
            other = name.split(".")[0]
            if other != part and LAYER[other] >= LAYER.get(part, -1) and LAYER[other] > 0:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def modules_of(names: set[str], known: set[str]) -> set[str]:
    """The modules that dotted names stand for: `files.read_rows` is in `files`."""
    found = set()
    for name in names:
        while name and name not in known:
            name = name.rpartition(".")[0]
        found |= {name} - {""}
    return found


def test_no_import_circle():
    """File by file, imports inside of functions included."""
    modules = {}
    for path in sources():
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    arrows = {name: modules_of(ours(path), set(modules)) - {name} for name, path in modules.items()}
    assert sum(map(len, arrows.values())) > 300
    try:
        tuple(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        raise AssertionError(f"import circle: {' <- '.join(error.args[1])}") from None


def test_few_things_stand_at_the_top():
    modules = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__"} - ALIASES
    packages = {p.parent.name for p in PACKAGE.glob("*/__init__.py")} - ALIASES
    assert len(modules) <= TOP_MODULES, sorted(modules)
    assert len(packages) <= TOP_PACKAGES, sorted(packages)


def test_only_policy_and_weights_import_megatron_core():
    wrong = [
        str(path.relative_to(ROOT))
        for path in sources()
        if part_of(path) not in ("policy", "weights") and any(n.startswith("megatron.") for n in imports(path))
    ]
    assert wrong == []


def test_what_is_below_the_policy_is_free_of_distributed_and_engines():
    forbidden = ("torch.distributed", "sglang", "vllm", "megatron.")
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        if LAYER.get(part_of(path), 0) < LAYER["policy"] and part_of(path) != "distributed"
        for name in imports(path)
        if name.startswith(forbidden)
    ]
    assert wrong == []


def test_the_trained_model_and_the_engines_meet_in_the_weights_alone():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        if part_of(path) == "engines"
        for name in imports(path)
        if name.startswith("megatron_nft.policy")
    ]
    assert wrong == []


def test_config_and_launch_slurm_are_light():
    for path in (PACKAGE / "config").rglob("*.py"):
        assert not {n.split(".")[0] for n in imports(path)} & {"torch", "numpy", "transformers", "megatron"}, path
    launchers = sorted((ROOT / "launch_slurm").glob("*.py"))
    assert launchers
    for path in launchers:
        ours = {n for n in imports(path) if n.startswith("megatron_nft")}
        ours.discard("megatron_nft.train.preflight.check_without_torch")  # what its name says: test_preflight.py
        assert all(n.startswith("megatron_nft.config") for n in ours), f"{path}: {ours}"


def test_the_documentation_lists_every_module():
    listed = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Ranks")[0]
    tops = {part_of(path) for path in sources()} - {"__init__", "__main__"}
    names = {name: f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py" for name in tops}
    assert [name for name in sorted(tops) if f"`{names[name]}`" not in listed] == []


def test_nothing_is_unpickled_from_files_and_no_remote_code_runs():
    beside = [
        p for folder in ("tools", "examples", "launch_slurm", "benchmarks") for p in (ROOT / folder).rglob("*.py")
    ]
    for path in [*sources(), *beside]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            name, keywords = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
            where = f"{path}:{call.lineno}"
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", where
            assert keywords.get("trust_remote_code", "False") == "False", where
            assert keywords.get("allow_pickle", "False") == "False", where
            if name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "pickle_load"):
                assert path.is_relative_to(PACKAGE) and str(path.relative_to(PACKAGE)) in UNPICKLES, where
