"""A finished run as something to use: its base model, merged model, adapter and generation settings."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from sftlab.config import Config, ModelConfig
from sftlab.dataset.arrow_examples import Examples
from sftlab.errors import ConfigError, Problem, shown
from sftlab.model import base as models
from sftlab.model.base import Base, reads_images
from sftlab.records import Example, text_of_turn
from sftlab.results import RunRecord
from sftlab.runtime import listing
from sftlab.runtime.job import Job, jobs
from sftlab.runtime.run import Run
from sftlab.runtime.store import Store

log = logging.getLogger(__name__)

AGAIN = "run its command again; completed stages are reused"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of vLLM's max_lora_rank
MERGED, BEST = "merged", "best"  # links in the folder of a run


class Generation(BaseModel):
    """The settings with which a run generated answers: ``dtype`` is resolved, ``max_tokens`` is in tokens."""

    dtype: str
    max_tokens: int
    temperature: float


class _Settings(BaseModel):
    """The part of a job's configuration that is read here; a job of an earlier version lacks other keys."""

    model: ModelConfig
    eval: Generation
    seed: int


@dataclass(frozen=True)
class Finished:
    """A run with a merged model, and the job of its selected checkpoint.

    ``adapter`` is the folder of the selected checkpoint if it is a LoRA adapter that is still there. ``data`` has the
    stage of the dataset, unless it was deleted.
    """

    folder: Path
    record: RunRecord
    job: Job
    generation: Generation
    base: Base
    merged: Path
    adapter: Path | None
    data: Path | None

    def split(self, name: str) -> list[Example]:
        """Return the examples of a split; [] if the stage of the dataset was deleted."""
        file = None if self.data is None else self.data / f"{name}.arrow"
        return list(Examples(file)) if file is not None and file.is_file() else []

    def system_prompt(self) -> str | None:
        """Return the system prompt that all validation rows share; None if they have none, or several."""
        turns = [example.messages[0] for example in self.split("validation")]
        texts = {text_of_turn(turn) if turn["role"] == "system" else None for turn in turns}
        return texts.pop() if len(texts) == 1 else None


def find(cfg: Config) -> Finished:
    """Return the run in ``run``, or the newest successful one with a merged model.

    Raises:
        ConfigError: there is none, it has no merged model, or its base model cannot be resolved.
    """
    if cfg.run is not None:
        folder = Path(cfg.run)
        if not folder.is_dir():
            message, remedy = f"no such folder in {Path.cwd()}", "`python -m sftlab mode=runs` lists the runs"
            raise ConfigError(Problem("run", shown(cfg.run), message, remedy))
        if not (folder / "run.json").is_file():
            message = "has no run.json"
            raise ConfigError(Problem("run", shown(cfg.run), message, "set it to the folder of a run"))
        run = Run.read(folder)
    else:
        run = _newest(cfg)
        log.info("run: %s (the newest with a merged model)", run.folder)
    return _opened(run, cfg)


def _newest(cfg: Config) -> Run:
    outputs = Path(cfg.runs.outputs)
    listed = listing.runs(outputs, Path(cfg.store)) if outputs.is_dir() else []
    for one in listed:
        if one.state == "success" and one.record is not None and (one.folder / MERGED / "config.json").is_file():
            return Run(one.folder, one.record)
    message = f"no successful run with a merged model in {outputs}"
    remedy = "train one with mode=all, or set run to the folder of a run, or runs.outputs to the folder of your runs"
    raise ConfigError(Problem("run", "null", message, remedy, ("runs.outputs",)))


def _opened(run: Run, cfg: Config) -> Finished:
    folder, record = run.folder, run.record
    if reason := _not_merged(folder, record):
        message, remedy = reason
        raise ConfigError(Problem("run", shown(str(folder)), message, remedy))
    selection = record.selection
    assert selection is not None
    job = next((job for job in jobs(folder) if job.number == selection.job), None)
    if job is None:
        raise ConfigError(Problem("run", shown(str(folder)), f"job {selection.job} has no job.json", AGAIN))
    try:
        settings = _Settings.model_validate(job.config)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        message = f"its job.json lacks a valid {key}, as if an earlier version had written it"
        raise ConfigError(Problem("run", shown(str(folder)), message, AGAIN)) from error
    store = Store(cfg.store)
    adapter = (folder / BEST).resolve()
    recorded = Path(record.stages.get("dataset", "."))
    places = [recorded, store.root / "dataset" / recorded.name]  # the first is relative to the folder of the command
    return Finished(
        folder=folder,
        record=record,
        job=job,
        generation=settings.eval,
        base=models.resolve(settings.model, store, settings.seed),
        merged=(folder / MERGED).resolve(),
        adapter=adapter if (adapter / "adapter_config.json").is_file() else None,
        data=next((place for place in places if (place / "validation.arrow").is_file()), None),
    )


def _not_merged(folder: Path, record: RunRecord) -> tuple[str, str] | None:
    """Return why a run has no merged model, and what to do; None if it has one."""
    if (folder / MERGED / "config.json").is_file() and record.selection is not None:
        return None
    if record.status != "success":
        return f"has no merged model: its status is {record.status}", AGAIN
    if record.skipped is not None:
        return f"has no merged model: {record.skipped}", "name another run"
    if record.mode != "all":
        return f"has no merged model: mode={record.mode} does not merge", "run its command again with mode=all"
    return "its merged model was deleted", AGAIN


def lora_rank(adapter: Path, base: Path) -> int | None:
    """Return the rank that vLLM reserves to add an adapter to its base model; None if vLLM cannot add it.

    vLLM adds low-rank matrices only: not the magnitudes of DoRA, trained biases or whole trained modules. It names the
    layers of a model that also reads images differently.
    """
    values = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    beyond = ("use_dora", "modules_to_save", "lora_bias", "rank_pattern", "alpha_pattern", "trainable_token_indices")
    if values.get("peft_type") != "LORA" or values.get("bias", "none") != "none" or any(map(values.get, beyond)):
        return None
    if reads_images(base):
        return None
    return next((rank for rank in RANKS if rank >= values["r"]), None)
