"""Export the merged model of a run, and compare its answers to the test questions with those of the merged model."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from sftlab.config import Config, ExportConfig
from sftlab.dataset import stage as dataset
from sftlab.errors import ConfigError, Problem, StageError, shown
from sftlab.eval import contenders, decision
from sftlab.eval import stage as evaluate
from sftlab.eval.contenders import Contender
from sftlab.eval.scorers import scorer
from sftlab.export.formats import FORMATS
from sftlab.export.worker import GGUF, ExportTask
from sftlab.instance import machine as instance
from sftlab.instance.machine import Machine
from sftlab.model.finished import AGAIN, Finished
from sftlab.records import Prediction
from sftlab.results import Export
from sftlab.runtime.processes import child
from sftlab.runtime.run import Run, link
from sftlab.runtime.store import Stage, Store, key_of, versions

log = logging.getLogger(__name__)

MERGED, EXPORTED = "the merged model", "the exported model"  # in verdicts


def label(cfg: ExportConfig) -> str:
    """The name of an export: its format, and the type of a GGUF file."""
    return f"gguf-{cfg.gguf}" if cfg.format == "gguf" else cfg.format


def inputs(run: Finished, cfg: ExportConfig, texts: list[str]) -> dict[str, object]:
    """List what an exported model depends on."""
    key = {
        "version": 1,
        "merged": run.merged.name,
        "export": label(cfg),
        "libraries": versions(FORMATS[cfg.format].package, "torch", "transformers"),
    }
    return {**key, "texts": key_of({"texts": texts})} if texts else key


def make(store: Store, run: Finished, cfg: ExportConfig, machine: Machine) -> Stage:
    """Return the exported model, from the store or written now.

    Raises:
        ConfigError: AWQ needs training rows, and the stage of the dataset was deleted.
    """
    texts: list[str] = []
    if cfg.format == "awq":
        rows = run.split("train")[: cfg.rows]
        texts = ["\n\n".join(turn.get("content") or "" for turn in row.messages) for row in rows]
        if not texts:
            message = "measures activations on training rows, and those of the run were deleted"
            raise ConfigError(Problem("export.format", "awq", message, AGAIN))

    def build(folder: Path) -> None:
        task = ExportTask(
            format=cfg.format, gguf=cfg.gguf, model=run.merged, texts=texts, device=machine.device, seed=run.record.seed
        )
        child("sftlab.export.worker", folder, task, environment=_environment(machine))

    return store.stage("export", inputs(run, cfg, texts), build)


def _environment(machine: Machine) -> dict[str, str]:
    return {**machine.environment(), "AR_LOG_LEVEL": "ERROR"}


def settings(run: Finished, cfg: Config) -> Config:
    """The configuration of the run's evaluation on this machine, with the engine that runs the exported model.

    Raises:
        ConfigError: an earlier version wrote it.
    """
    try:
        own = run.job.settings()
    except ValueError as error:
        message = f"its configuration cannot be read: {next(iter(str(error).splitlines()))}"
        raise ConfigError(Problem("run", shown(str(run.folder)), message, AGAIN)) from error
    engine = FORMATS[cfg.export.format].engine or own.eval.engine
    names = ("batch_size", "tensor_parallel_size", "gpu_memory_utilization", "kv_cache_gib", "stall_min")
    here = {name: getattr(cfg.eval, name) for name in names}
    evaluation = own.eval.model_copy(update={**here, "engine": engine, "contenders": None, "guards": {}})
    return own.model_copy(update={"eval": evaluation, "instance": cfg.instance, "store": cfg.store})


def export(run: Finished, cfg: Config) -> Export:
    """Export the merged model, test it, and add model, answers and result to the run.

    Raises:
        StageError: the tool cannot write this model in this format.
    """
    store, machine, own = Store(cfg.store), instance.find(cfg.instance), settings(run, cfg)
    test = contenders.read_test(own, store, dataset.make(store, own.dataset))
    try:
        stage = make(store, run, cfg.export, machine)
    except StageError as error:
        raise StageError(
            f"export.format={cfg.export.format}: {run.record.experiment} cannot be written: {error}"
        ) from error
    log.info("export: %s, %d test questions, %s", label(cfg.export), len(test.examples), own.eval.engine)
    merged = Contender(evaluate.Model(run.merged, run.merged.name, run.base.trust_remote_code), run.base)
    before, _ = contenders.answers(own, store, merged, test)
    exported = replace(merged, model=replace(merged.model, path=stage.path, identity=stage.key))
    with TemporaryDirectory(prefix="sftlab-") as temporary:
        if cfg.export.format == "gguf":
            exported = replace(exported, model=replace(exported.model, path=Path(temporary)))
            if not evaluate.cached(
                store, exported.model, contenders.prompts(own, run.base, test), own.eval, machine, own.seed
            ):
                plain = ExportTask(
                    format="plain", gguf="", model=stage.path / GGUF, texts=[], device="cpu", seed=run.record.seed
                )
                child("sftlab.export.worker", Path(temporary), plain, environment=_environment(machine))
        after, answers = contenders.answers(own, store, exported, test)
    score = scorer(own.eval)
    named = {name: [score.scored(rows) for rows in runs] for name, runs in ((MERGED, before), (EXPORTED, after))}
    result = Export(
        format=cfg.export.format,
        gguf=cfg.export.gguf if cfg.export.format == "gguf" else None,
        folder=str(stage.path),
        weight_bytes=_weights(stage.path),
        merged_bytes=_weights(run.merged),
        engine=own.eval.engine,
        comparison=decision.against(score, named, both_mute=False),
    )
    Prediction.write(run.folder / "predictions" / f"{label(cfg.export)}.jsonl", named[EXPORTED][0])
    (run.folder / "export").mkdir(exist_ok=True)
    link(run.folder / "export" / label(cfg.export), stage.path)
    _record(run.folder, cfg.export, result, stage, answers)
    return result


def _record(folder: Path, cfg: ExportConfig, result: Export, stage: Stage, answers: Stage) -> None:
    """Add the result to ``run.json``. Another export of the run may do the same."""
    from filelock import FileLock

    with FileLock(folder / ".export.lock"):
        run = Run.read(folder)
        same = (result.format, result.gguf)
        others = [one for one in run.record.exports if (one.format, one.gguf) != same]
        added = {f"export.{label(cfg)}": str(stage.path), f"export.{label(cfg)}.answers": str(answers.path)}
        run.update(exports=[*others, result], stages={**run.record.stages, **added})


def _weights(folder: Path) -> int:
    """Bytes of the files with weights in a folder."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)
