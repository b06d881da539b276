"""What tasks of lm-evaluation-harness exist, and which files those of a local folder read.

Tasks of a folder are read here, without the harness, which passes over a YAML file that it cannot parse. A task of the
harness itself is searched in the text of its files, since parsing all of them takes seconds.
"""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from sftlab.dataset.values import strings_in
from sftlab.runtime.store import digest

BUILDERS = ("arrow", "csv", "json", "pandas", "parquet", "text", "xml")
"""Values of dataset_path that read the files in dataset_kwargs.data_files."""


@dataclass
class Folder:
    """The tasks, groups and tags of a folder of YAML files.

    ``broken`` has a reason for each file that cannot be parsed, ``missing`` the data files that do not exist, by the
    name of their task, and ``files`` those that they name: rows, functions and included files.
    """

    path: Path
    names: set[str] = field(default_factory=set)
    broken: list[str] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=dict)
    files: set[Path] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path) -> Folder:
        """Read the YAML files of a folder and of the folders in it."""
        folder = cls(path)
        for file in sorted(path.rglob("*.yaml")):
            try:
                folder._add(_parsed(file, folder.files))
            except (OSError, ValueError, TypeError, AttributeError) as error:
                folder.broken.append(f"{file}: {' '.join(str(error).split())}")
        return folder

    def digests(self) -> dict[str, str]:
        """The hashes of all files that its tasks read: those in the folder by their place in it, others by their path.

        Data that is downloaded is not among them.
        """
        own = {path: str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file()}
        inside = {path.resolve() for path in own}
        others = {path: str(path) for path in self.files if path.resolve() not in inside}
        return {name: digest(path) for path, name in sorted((own | others).items(), key=lambda item: item[1])}

    def _add(self, values: Mapping[str, object]) -> None:
        """Add the names of a task or group, and the files that it names."""
        names = [values.get("group") or values.get("task"), *strings_in(values.get("tag"))]
        self.names.update(name for name in names if isinstance(name, str))
        own, source = values.get("dataset_kwargs"), values.get("dataset_path")
        own = own if isinstance(own, Mapping) else {}
        data = [*strings_in(own.get("data_files")), *strings_in(own.get("data_dir"))]
        for text in data if source in BUILDERS else [*data, *strings_in(source)]:
            self.files.update(_existing(text))
        if source in BUILDERS and not own.get("data_dir"):
            lost = [text for text in data if "://" not in text and not glob.glob(text, recursive=True)]
            if lost and isinstance(names[0], str):
                self.missing[names[0]] = lost


def _parsed(file: Path, files: set[Path]) -> Mapping[str, object]:
    """Parse a YAML file with those that it includes, and add the files of its functions and of these to ``files``.

    Raises:
        ValueError: it is not the YAML of a task.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """A loader that resolves no function."""

    def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
        name = str(loader.construct_scalar(node))
        files.update(_existing(str(file.parent / f"{name.rpartition('.')[0]}.py")))
        return name

    Loader.add_constructor("!function", function)
    try:
        values = Loader(file.read_text("utf-8")).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" (line {mark.line + 1})"
        raise ValueError(f"is not valid YAML{place}: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict):
        raise ValueError("is not a mapping of keys to values")
    included: dict[str, object] = {}
    for name in strings_in(values.get("include")):
        base = file.parent / name
        files.add(base)
        included |= _parsed(base, files)
    return {**included, **{key: value for key, value in values.items() if key != "include"}}


def _existing(text: str) -> Iterator[Path]:
    """The files that a text names: a path, a folder, or a pattern."""
    for path in map(Path, [text] if Path(text).exists() else glob.glob(text, recursive=True)):
        yield from [path] if path.is_file() else (file for file in path.rglob("*") if file.is_file())


def close_to(name: str) -> list[str] | None:
    """Return None if the harness has a task of this name, else the names that are most like it."""
    spec = find_spec("lm_eval")
    assert spec is not None
    line = re.compile(
        rf"^\s*(?:[\"']?(?:task|group|tag)[\"']?\s*:\s*|-\s+).*?(?<![\w.-]){re.escape(name)}(?![\w.-])", re.MULTILINE
    )
    for root in spec.submodule_search_locations or ():
        for file in Path(root, "tasks").rglob("*.yaml"):
            text = file.read_text("utf-8", errors="replace")
            if name in text and line.search(text):
                return None
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    return None if name in known else difflib.get_close_matches(name, known, n=3)
