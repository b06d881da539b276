"""``README.md`` of a model: what the hub reads of it, and what people should know before they use it."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup as Markdown  # what is Markdown already and must not be escaped

from sftlab.errors import ConfigError, StageError
from sftlab.eval.score import METRICS, metric, truncated
from sftlab.model.hub import MODEL_FILES, explained
from sftlab.report.page import DASH, VERDICTS, count, decimals, finite, percent, points

if TYPE_CHECKING:
    from jinja2 import Template

PUSH_KEY = "hub.repo_id"
# What sftlab keeps in a merged model's folder: it tells paths of this machine, and is of no use to anybody else.
OWN_FILES = ["manifest.json", "inputs.json", "check.json", "error.json"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*(?<!\.jsonl)(?<!\.json)(?<!\.csv)(?<!\.parquet)", re.ASCII)


class Part(dict[str, Any]):
    """A section of a record in which what is missing, or null, is an empty section."""

    def __missing__(self, key: str) -> Part:
        return Part()


def card(run: dict[str, Any], config: dict[str, Any]) -> str:
    """The model card of a run (``run.json``), with the configuration of the job whose checkpoint was kept.

    Whatever they do not have, the card leaves out.
    """
    import yaml

    settings = _flat("peft.", config.get("peft")) | _flat("train.", config.get("train"))
    tables = {"Training": settings, "What took effect": _flat("", run.get("receipt"))}
    run, config = _part(run), _part(config)
    title = _line(run["experiment"] or config["name"] or "model")
    verdict = str(run["evaluation"]["comparison"]["verdict"] or "")
    word, _, reason = verdict.partition(": ") if verdict.startswith(VERDICTS) else ("", "", verdict)
    test = config["eval"]["dataset"] or config["dataset"]
    text = _template().render(
        run=run,
        config=config,
        title=title,
        command=_command(str(run["command"] or "")),
        word=word,
        reason=reason,
        base=_short(config["model"]["name_or_path"]),
        data=_short(config["dataset"]["name_or_path"]),
        test=_short(test["name_or_path"]) or "the test set",
        metric=metric(run["evaluation"]),
        metric_names=METRICS,
        others=[name for name in METRICS if name not in ("accuracy", metric(run["evaluation"]))],
        metric_name=METRICS[metric(run["evaluation"])],
        alpha=finite(config["eval"]["alpha"]) or 0.05,
        tables=tables,
    )
    front = yaml.safe_dump(_metadata(title, run, config, test), sort_keys=False, allow_unicode=True, width=1000)
    text = f"---\n{front}---\n\n" + re.sub(r"\n{3,}", "\n\n", text.strip()) + "\n"
    # A lone surrogate, which broken input can leave in a text, could not be written as UTF-8.
    return text.encode("utf-8", "replace").decode()


def _part(value: Any) -> Any:
    if isinstance(value, dict):
        return Part({str(key): _part(item) for key, item in value.items()})
    return Part() if value is None else [_part(item) for item in value] if isinstance(value, list | tuple) else value


def _metadata(title: str, run: Any, config: Any, test: Any) -> dict[str, Any]:
    """What the hub reads. It links what has a hub id; for anything else it has no field."""
    base, data = _hub_id(config["model"]["name_or_path"]), _hub_id(config["dataset"]["name_or_path"])
    method = config["peft"]["method"]
    made: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    made |= {"base_model": base} if base else {}
    made |= {"datasets": [data]} if data else {}
    made["tags"] = ["sft", "sftlab", *([_line(method)] if method and method != "none" else [])]
    judged = metric(run["evaluation"])
    value = finite(run["evaluation"]["finetuned"][judged])
    if value is not None:
        source = _hub_id(test["name_or_path"])
        name = _short(test["name_or_path"]) or "test set"
        about = {"name": name, "type": source or re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"}
        fields = {"config": test["subset"], "revision": test["revision"]} if source else {}
        about |= {field: _line(given) for field, given in fields.items() if given}
        kind, label = ("accuracy", "Accuracy") if judged == "accuracy" else ("rouge", METRICS[judged])
        found = {"type": kind, "name": label, "value": round(100 * value, 2), "verified": False}
        result = {"task": {"type": "text-generation"}, "dataset": about, "metrics": [found]}
        made["model-index"] = [{"name": title, "results": [result]}]
    return made


def _hub_id(name: Any) -> str | None:
    """A name if it is a hub id (owner/name) and no path."""
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _short(name: Any) -> str:
    """What people call a model or dataset: its hub id, or the last part of its path (not where it lies)."""
    text = str(name or "").replace("generate:vignettes", "vignettes made by sftlab")
    return _line(_hub_id(text) or re.split(r"[\\/]", text.rstrip("\\/"))[-1])


def _flat(prefix: str, values: dict[str, Any] | None) -> dict[str, str]:
    """The values of a section, as they would be written on the command line."""
    given = {prefix + key: value for key, value in (values or {}).items() if value not in (None, {})}
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in given.items()
    }


def _command(text: str) -> str:
    """A command without the folders that it wrote to: they change nothing, and tell about a machine."""
    try:
        parts = shlex.split(text)
    except ValueError:  # an open quote
        return text
    return shlex.join(part for part in parts if not part.startswith(("store=", "hydra.run.dir=", "hydra.sweep.dir=")))


def _line(value: Any) -> str:
    """A text on one line, without control characters."""
    return re.sub(r"[\x00-\x1f\x7f]", "", re.sub(r"\s+", " ", str(value)))


def escaped(value: Any) -> Markdown:
    """A value as Markdown that shows exactly it, also at the beginning of a line or in a table."""
    if isinstance(value, Markdown):
        return value
    text = DASH if value == {} else _line(value)
    return Markdown(re.sub(r"[\\`*_\[\]|~$&]|<(?=\S)|^[#>=+-]+(?=\s|$)", lambda found: "\\" + found[0], text))


def _fence(text: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def code(value: Any) -> Markdown:
    """A value as it is, in a code span that may stand in a table."""
    text = _line(value).strip().replace("|", "\\|")
    fence = _fence(text, 1)
    return Markdown(f"{fence} {text} {fence}" if "`" in text else f"`{text or DASH}`")


def block(value: Any) -> Markdown:
    """A command as it is, in a code block."""
    text = "\n".join(map(_line, str(value).splitlines()))
    fence = _fence(text, 3)
    return Markdown(f"{fence}sh\n{text}\n{fence}")


@cache
def _template() -> Template:
    from jinja2 import ChainableUndefined, Environment

    environment = Environment(undefined=ChainableUndefined, finalize=escaped, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {own.__name__: own for own in (code, block, count, decimals, percent, points, truncated)}
    return environment.from_string(Path(__file__).with_name("card.md.jinja").read_text("utf-8"))


def push(folder: Path, repo_id: str, *, private: bool, readme: str | None = None) -> str:
    """Upload a saved model to the hub, into a repository that is made if need be. Returns its address.

    What sftlab itself keeps in the model's folder is left out. ``readme`` is the model card, which need
    not be in the folder. With ``private`` a repository that is there and public is refused.

    Raises:
        ConfigError: the hub refuses it, or cannot be reached.
        StageError: the folder holds no model.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if not (folder / "config.json").is_file():
        raise StageError(f"{folder}: holds no saved model (no config.json); name the folder of one")
    api = HfApi()
    with explained(repo_id, PUSH_KEY):
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            name = url.repo_id
            if private and not api.model_info(name).private:
                raise ConfigError(f"{PUSH_KEY}={name!r}: is public; make it private at {url}/settings, or name another")
            allowed = [*MODEL_FILES, "*.py", "README.md"]
            api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=allowed, ignore_patterns=[*OWN_FILES])
            if readme is not None:
                api.upload_file(path_or_fileobj=readme.encode(), path_in_repo="README.md", repo_id=name)
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            raise ConfigError(
                f"{PUSH_KEY}={repo_id!r}: the hub ({constants.ENDPOINT}) does not let you write there; log in by "
                "`hf auth login` with a token that may write, and check the owner's name"
            ) from error
    return str(url)
