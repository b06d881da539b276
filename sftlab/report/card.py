"""``README.md`` of a model, the model card: metadata for the hub, and what people should know before they use it."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup as Markdown  # the type of text that is Markdown already and must not be escaped

from sftlab.config import Config, DatasetConfig, Section
from sftlab.eval import scorers
from sftlab.report import contenders, details, tables
from sftlab.report.caveats import caveats, one_draw
from sftlab.report.text import (
    DASH,
    count,
    decimals,
    early_stop,
    level,
    percent,
    points,
    probability,
    span,
    stated_p,
    titled,
)
from sftlab.results import Record, RunRecord

if TYPE_CHECKING:
    from jinja2 import Template
    from pydantic import JsonValue

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*(?<!\.jsonl)(?<!\.json)(?<!\.csv)(?<!\.parquet)", re.ASCII)


def card(run: RunRecord, cfg: Config) -> str:
    """Write the model card of a run; ``cfg`` is the configuration of the job whose checkpoint was selected."""
    import yaml

    evaluation, title = run.evaluation, _line(run.experiment)
    comparison = None if evaluation is None else evaluation.comparison
    test = cfg.eval.dataset or cfg.dataset
    settings = _settings("peft.", cfg.peft) | _settings("train.", cfg.train)
    measured = {} if run.receipt is None else _settings("", run.receipt)
    text = _template().render(
        run=run,
        cfg=cfg,
        title=title,
        command=_command(run.command),
        base=_short(cfg.model.name_or_path),
        data=_names(cfg.dataset),
        test=_names(test),
        evaluation=evaluation,
        comparison=comparison,
        view=None if evaluation is None else scorers.view(evaluation.task),
        metric="" if evaluation is None else tables.name_of_metric(evaluation),
        items=None if evaluation is None else tables.items(evaluation),
        details=details.sentences(evaluation) if evaluation is not None else [],
        results=None if evaluation is None else tables.results(evaluation),
        decision=None if evaluation is None else tables.decision(evaluation),
        guards=tables.guards(evaluation) if evaluation is not None and evaluation.guards else None,
        loss=tables.loss(comparison) if comparison is not None and comparison.verdict.outcome != "better" else None,
        subgroups=None if evaluation is None or evaluation.subgroups is None else tables.subgroups(evaluation),
        contenders=contenders.table(evaluation) if evaluation is not None and contenders.against(evaluation) else None,
        described=[] if evaluation is None else contenders.described(evaluation),
        chain=None if evaluation is None else contenders.chain(evaluation),
        deployed=None if evaluation is None else contenders.deployed(evaluation),
        exports=tables.exports(run),
        prompting=None if evaluation is None else contenders.prompting(evaluation),
        parts=None if evaluation is None else tables.parts(evaluation),
        caveats=[one_draw(run.mode, run.seed)]
        if evaluation is None
        else caveats(evaluation, run.mode, run.seed, run.replication),
        settings={"Training": settings, "What took effect": measured},
    )
    front = yaml.safe_dump(_metadata(title, run, cfg, test), sort_keys=False, allow_unicode=True, width=1000)
    text = f"---\n{front}---\n\n" + re.sub(r"\n{3,}", "\n\n", text.strip()) + "\n"
    # A lone surrogate, which broken input can leave in a text, cannot be written as UTF-8.
    return text.encode("utf-8", "replace").decode()


def _metadata(title: str, run: RunRecord, cfg: Config, test: DatasetConfig) -> dict[str, JsonValue]:
    """The metadata for the hub. It links models and datasets that have a hub id, and has no field for others."""
    base = _hub_id(cfg.model.name_or_path)
    data = [one for part in cfg.dataset.parts() if (one := _hub_id(part.cfg.name_or_path))]
    metadata: dict[str, JsonValue] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    metadata |= {"base_model": base} if base else {}
    metadata |= {"datasets": [*dict.fromkeys(data)]} if data else {}
    metadata["tags"] = ["sft", "sftlab", *([cfg.peft.method] if cfg.peft.method != "none" else [])]
    if (evaluation := run.evaluation) is not None:
        view, name, (first, *others) = scorers.view(evaluation.task), _names(test), test.parts()
        source = None if others else _hub_id(first.cfg.name_or_path)
        about: dict[str, JsonValue] = {
            "name": name,
            "type": source or re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown",
        }
        fields = {"config": test.subset, "revision": test.revision} if source else {}
        about |= {field: _line(value) for field, value in fields.items() if value}
        metric: dict[str, JsonValue] = {
            "type": view.hub_metric,
            "name": titled(tables.name_of_metric(evaluation)),
            "value": round(100 * evaluation.finetuned.value, 2),
            "verified": False,
        }
        result: JsonValue = {"task": {"type": "text-generation"}, "dataset": about, "metrics": [metric]}
        metadata["model-index"] = [{"name": title, "results": [result]}]
    return metadata


def _hub_id(name: str) -> str | None:
    """A name if it is a hub id (owner/name) and not a path."""
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _short(name: str) -> str:
    """The hub id of a model or dataset, or the last part of its path."""
    text = re.sub("^generate:(.*)", r"\1 made by sftlab", name)
    return _line(_hub_id(text) or re.split(r"[\\/]", text.rstrip("\\/"))[-1])


def _names(data: DatasetConfig) -> str:
    """The names of the sources of a dataset."""
    return " + ".join(dict.fromkeys(_short(part.cfg.name_or_path) for part in data.parts()))


def _settings(prefix: str, values: Section | Record) -> dict[str, str]:
    """The values of a section or record, as they are written on the command line."""
    filled = {prefix + key: value for key, value in values.model_dump().items() if value not in (None, {}, [])}
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in filled.items()
    }


def _command(text: str) -> str:
    """A command without the folders that it wrote to: they change no result, and are paths of one machine."""
    try:
        parts = shlex.split(text)
    except ValueError:  # an open quote
        return text
    return shlex.join(part for part in parts if not part.startswith(("store=", "hydra.run.dir=", "hydra.sweep.dir=")))


def _line(value: object) -> str:
    """A text on one line, without control characters."""
    return re.sub(r"[\x00-\x1f\x7f]", "", re.sub(r"\s+", " ", str(value)))


def escaped(value: object) -> Markdown:
    """A value as Markdown that shows exactly it, also at the beginning of a line or in a table."""
    if isinstance(value, Markdown):
        return value
    text = _line(value)
    return Markdown(re.sub(r"[\\`*_\[\]|~$&]|<(?=\S)|^[#>=+-]+(?=\s|$)", lambda match: "\\" + match[0], text))


def _fence(text: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def code(value: object) -> Markdown:
    """A value in a code span that may stand in a table."""
    text = _line(value).strip().replace("|", "\\|")
    fence = _fence(text, 1)
    return Markdown(f"{fence} {text} {fence}" if "`" in text else f"`{text or DASH}`")


def block(value: object) -> Markdown:
    """A command in a code block."""
    text = "\n".join(map(_line, str(value).splitlines()))
    fence = _fence(text, 3)
    return Markdown(f"{fence}sh\n{text}\n{fence}")


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, finalize=escaped, trim_blocks=True, lstrip_blocks=True)
    environment.filters["markdown"] = Markdown  # the output of a macro, in which every value was escaped
    own = (code, block, count, decimals, early_stop, level, percent, points, probability, span, stated_p, titled)
    environment.filters |= {function.__name__: function for function in own}
    return environment.from_string(Path(__file__).with_name("card.md.jinja").read_text("utf-8"))
