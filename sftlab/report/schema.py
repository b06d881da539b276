"""``docs/run-json.md``: every field of ``run.json`` and ``job.json``, from the records (``scripts/schema`` writes it)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sftlab.results import SCHEMA_VERSION, JobRecord, RunRecord

PAGE = Path(__file__).parents[2] / "docs" / "run-json.md"
HEAD = f"""# run.json and job.json

<!-- Generated from sftlab/results.py by scripts/schema. -->

`run.json` is one [RunRecord](#runrecord), `job.json` in the folder of each job one [JobRecord](#jobrecord). This is
schema version {SCHEMA_VERSION}. `mode=report` reads version 1 too. Readers ignore unknown fields. Accuracies, scores,
shares and differences are fractions; intervals are `[low, high]` at the confidence `level` beside them.
"""


def page() -> str:
    """Render the page: one section per record, in the order in which they are first mentioned."""
    records: dict[str, dict[str, Any]] = {}
    for model in (RunRecord, JobRecord):
        schema = model.model_json_schema(mode="serialization")
        records |= {model.__name__: schema} | schema.pop("$defs", {})
    sections = [_section(name, records[name]) for name in _mentioned(records, "RunRecord", "JobRecord")]
    return "\n".join([HEAD, *sections])


def _mentioned(records: dict[str, dict[str, Any]], *start: str) -> list[str]:
    order: list[str] = []
    todo = list(start)
    while todo:
        name = todo.pop(0)
        if name not in order and name != "JsonValue":
            order.append(name)
            todo += re.findall(r"#/\$defs/(\w+)", str(records[name]))
    return order


def _section(name: str, schema: dict[str, Any]) -> str:
    rows = [
        f"| `{field}` | {_type(value)} | {_line(value['description'])} |"
        for field, value in schema["properties"].items()
    ]
    return "\n".join(
        [
            f"## {name}",
            "",
            _line(schema["description"]),
            "",
            "| field | type | meaning |",
            "|:---|:---|:---|",
            *rows,
            "",
        ]
    )


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})" if name != "JsonValue" else "JSON"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "prefixItems" in schema:
        return f"[{', '.join(map(_type, schema['prefixItems']))}]"
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return f"map of {_type(values)}" if isinstance(values, dict) and values else "map of JSON"
    return str(schema["type"])


def _line(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
