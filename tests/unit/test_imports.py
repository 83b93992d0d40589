"""Who may import whom (docs/architecture.md), read from the source without importing anything."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_nft"

LAYER = {
    "types": 0,
    "processes": 0,
    "distributed": 0,
    "files": 0,
    "console": 0,
    "config": 0,
    "algorithms": 1,
    "losses": 1,
    "verify": 1,
    "data": 1,
    "policy": 2,
    "weights": 2,
    "engines": 2,
    "evaluate": 2,
    "plan": 2,
    "report": 2,
}
"""Everything else in the package is layer 3: the run, the loop, the command line."""


UNPICKLES = {"distributed.py", "policy/checkpoint.py", "verify/pool.py", "verify/worker.py"}
"""Between processes that the run started itself; policy/checkpoint.py holds a restricted unpickler for torch's own
index of a checkpoint."""


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


def test_no_layer_imports_a_higher_one():
    wrong = []
    for path in sources():
        layer = LAYER.get(part_of(path), 3)
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "megatron_nft" and len(parts) > 1 and LAYER.get(parts[1], 3) > layer:
                if parts[1] == "__version__":
                    continue
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_only_policy_and_weights_import_megatron_core():
    wrong = [
        str(path.relative_to(ROOT))
        for path in sources()
        if part_of(path) not in ("policy", "weights") and any(n.startswith("megatron.") for n in imports(path))
    ]
    assert wrong == []


def test_policy_and_rollout_do_not_know_each_other():
    pairs = [("policy", "megatron_nft.engines"), ("engines", "megatron_nft.policy"), ("policy", "megatron_nft.weights")]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for part, forbidden in pairs
        for path in (PACKAGE / part).rglob("*.py")
        for name in imports(path)
        if name.startswith(forbidden)
    ]
    assert wrong == []


def test_layer_one_is_free_of_distributed_and_engines():
    forbidden = ("torch.distributed", "sglang", "vllm", "megatron.")
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        if LAYER.get(part_of(path)) == 1
        for name in imports(path)
        if name.startswith(forbidden)
    ]
    assert wrong == []


def test_config_and_launch_slurm_are_light():
    for path in (PACKAGE / "config").rglob("*.py"):
        assert not {n.split(".")[0] for n in imports(path)} & {"torch", "numpy", "transformers", "megatron"}, path
    launchers = sorted((ROOT / "launch_slurm").glob("*.py"))
    assert launchers
    for path in launchers:
        ours = {n for n in imports(path) if n.startswith("megatron_nft")}
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
