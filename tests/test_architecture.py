"""The architecture, read from the sources: imports point one way, heavy libraries wait, values are typed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sftlab"

# What each folder may import from, besides itself: imports point one way.
VOCABULARY = {"config", "errors", "records", "results"}
SUBJECTS = {"model", "dataset", "instance", "tracking"}
LAYERS = [
    VOCABULARY,
    {"runtime"},
    SUBJECTS,
    {"train", "eval"},
    {"export"},
    {"report", "serve"},
    {"selection", "validation"},
    {"pipeline"},
    {"dry_run"},
    {"work"},
    {"hydra_app"},
    {"cli"},
]

HEAVY = {
    "accelerate", "auto_round", "bitsandbytes", "datasets", "evaluate", "gradio", "huggingface_hub", "matplotlib",
    "mlflow", "openai", "pandas", "peft", "pyarrow", "rouge_score", "scipy", "statsmodels", "torch", "trackio",
    "transformers", "trl", "vllm", "wandb",
}  # fmt: skip
# Imported inside functions only: a subclass must know its parent.
HEAVY_MODULES = {
    "sftlab.model.fused_lora",
    "sftlab.train.batches",
    "sftlab.train.callbacks",
    "sftlab.train.trainer",
    "sftlab.eval.metrics.exact_match",
    "sftlab.eval.metrics.rouge",
}

# Modules in which ``dict[str, Any]`` is allowed: how often, and the edge that it stands at.
UNTYPED = {
    "sftlab.config": (2, "keyword arguments of TRL and torch, which scripts/library_names.py lists"),
    "sftlab.dataset.json_rows": (1, "the rows of a JSON file"),
    # The bytes of this folder are part of the keys of all stages made from it.
    "sftlab.dataset.vignettes": (3, "generated rows, which are read like those of a JSON file"),
    "sftlab.eval.answers": (1, "the lines of a JSON file, of which a kill may leave a part"),
    "sftlab.eval.predictions": (1, "the lines of a JSON file of any origin"),
    "sftlab.eval.rows": (6, "the objects of such a file"),
    "sftlab.eval.sql_worker": (1, "a request of the parent, as JSON"),
    "sftlab.hydra_app.sweep": (2, "a Hydra config before validation"),
    "sftlab.records": (2, "JSON lines"),
    "sftlab.report.figures": (3, "keyword arguments of matplotlib"),
    "sftlab.report.schema": (1, "a JSON schema from pydantic"),
    "sftlab.runtime.earlier": (1, "JSON of an earlier schema version"),
    "sftlab.runtime.store": (3, "the JSON of a manifest, and of the user's cache"),
    "sftlab.train.arguments": (2, "keyword arguments of TRL"),
    "sftlab.train.trainer": (2, "keyword arguments of a model, in a hook of torch"),
}

LINES = 350
# Longer modules: one subject each, which is read as a whole.
LONG = {"sftlab.config", "sftlab.results", "sftlab.runtime.store"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse(SOURCES[name])


def imports(tree: ast.AST, *, top: bool = False) -> Iterator[tuple[str, str | None]]:
    """Every (module, name) that is imported; ``top`` leaves out functions and what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif not (top and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_type_checkers(node))):
            yield from imports(node, top=top)


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@cache
def own(name: str, *, top: bool = False) -> set[str]:
    """The modules of this package that a module imports."""
    found = set()
    for module, imported in imports(parsed(name), top=top):
        for candidate in (f"{module}.{imported}", module):
            if candidate in SOURCES:
                found.add(candidate)
                break
    return found - {name}


def below(name: str) -> set[str]:
    """All that a module imports when it is imported, directly or not."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        for found in own(todo.pop(), top=True) - seen:
            seen.add(found)
            todo.append(found)
    return seen


def folder_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_folders_import_from_the_layers_above_them_only() -> None:
    place = {folder: number for number, layer in enumerate(LAYERS) for folder in layer}
    upward = {
        (name, other)
        for name in SOURCES
        if (here := folder_of(name)) in place
        for other in own(name)
        if folder_of(other) and place[folder_of(other)] > place[here]
    }
    assert upward == set()


def test_every_folder_and_module_has_its_layer() -> None:
    assert {folder_of(name) for name in SOURCES} - {"", "__main__"} == set().union(*LAYERS)


def test_there_is_no_circle() -> None:
    """Not even one of imports inside functions: it would say that two modules are one."""
    state: dict[str, bool] = {}

    def visit(name: str, path: list[str]) -> None:
        assert state.get(name, True), f"a circle: {' → '.join([*path, name])}"
        if name in state:
            return
        state[name] = False
        for other in sorted(own(name)):
            visit(other, [*path, name])
        state[name] = True

    for name in SOURCES:
        visit(name, [])


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - HEAVY_MODULES))
def test_nothing_heavy_is_imported_before_it_is_needed(name: str) -> None:
    for module in [name, *sorted(below(name))]:
        assert heavy_imports(module) == set(), f"{name} imports {module}"


@cache
def heavy_imports(name: str) -> set[str]:
    return {imported.partition(".")[0] for imported, _ in imports(parsed(name), top=True)} & HEAVY


def test_the_command_line_is_light_until_it_runs_something() -> None:
    hydra_app = {f"sftlab.hydra_app.{name}" for name in ("callback", "compose", "study", "task")}
    assert below("sftlab.cli") <= {"sftlab", "sftlab.errors", "sftlab.runtime.console", *hydra_app}


def test_values_are_typed_except_at_the_edges() -> None:
    untyped = {name: count for name in SOURCES if (count := dicts_of_any(parsed(name)))}
    assert untyped == {name: count for name, (count, _) in UNTYPED.items()}


def dicts_of_any(tree: ast.AST) -> int:
    """The number of annotations ``dict[str, Any]`` in a module."""
    annotations = (node for node in ast.walk(tree) if isinstance(node, ast.Subscript))
    return sum(ast.unparse(node) == "dict[str, Any]" for node in annotations)


def test_no_module_is_too_long_to_read_at_once() -> None:
    lines = {name: source.count("\n") for name, source in SOURCES.items()}
    assert {name for name, count in lines.items() if count > LINES} == LONG
    assert lines["sftlab.pipeline"] <= 250
