"""Choose between float32 and bfloat16 on a CPU by timing one layer of the model in both.

With matrix units for bfloat16 (AMX) a training step takes half of its time in float32, and without them up to one and
a half times as long; the name of a CPU does not show which. The first run that needs a choice measures, and the store
retains it: a sweep on several machines and a run that is resumed elsewhere compare and continue the same numbers.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from sftlab.config import EvalConfig, TrainConfig
from sftlab.errors import SftlabError
from sftlab.instance.machine import Machine
from sftlab.instance.precision_worker import SECONDS, PrecisionTask
from sftlab.model.base import Base
from sftlab.results import LayerSeconds, Precision
from sftlab.runtime.processes import child
from sftlab.runtime.store import Stage, Store, key_of, recalled, remember, versions, write_json

log = logging.getLogger(__name__)

# float32 is more exact, and is given up only for a gain that repeats from run to run.
GAIN = 0.95


def chosen(
    store: Store, base: Base, train: TrainConfig, evaluation: EvalConfig, machine: Machine, *, whole: bool
) -> tuple[TrainConfig, EvalConfig, Stage | None]:
    """Resolve ``auto`` in train.bf16 and eval.dtype; return both sections, and the stage with the measurement if any.

    ``whole`` is full fine-tuning. GPUs use bfloat16, and so do CPU machines that train together: they must agree, and
    each would measure for itself.
    """
    if "auto" not in (train.bf16, evaluation.dtype):
        return train, evaluation, None
    measured, stage = None, None
    if machine.device == "cpu" and machine.nnodes == 1:
        stage = _stage(store, base, machine)
        measured = _read(stage)
    if train.bf16 == "auto":
        bfloat16 = measured is None or _prefers_bfloat16(measured.all_weights if whole else measured.adapters)
        train = train.model_copy(update={"bf16": bfloat16})
    if evaluation.dtype == "auto":
        bfloat16 = measured is None or _prefers_bfloat16(measured.generation)
        evaluation = evaluation.model_copy(update={"dtype": "bfloat16" if bfloat16 else "float32"})
    return train, evaluation, stage


def record(stage: Stage | None, train: TrainConfig, evaluation: EvalConfig) -> Precision:
    """Record the resolved number formats, and the measurement that they rest on."""
    assert train.bf16 != "auto"
    return Precision(bf16=train.bf16, dtype=evaluation.dtype, measured=None if stage is None else _read(stage))


def _prefers_bfloat16(seconds: dict[str, float]) -> bool:
    return seconds["bfloat16"] < GAIN * seconds["float32"]


def _stage(store: Store, base: Base, machine: Machine) -> Stage:
    """Measure a layer of the model, unless the store or this machine's cache has the result."""
    layer = _layer_of(base.path)
    here = {**_cpu(), "layer": layer, "environment": machine.training_environment(), "libraries": versions("torch")}
    cpu = str(here["cpu"])

    def measure(folder: Path) -> LayerSeconds:
        task = PrecisionTask(base=base.path.resolve(), trust_remote_code=base.trust_remote_code, cpu=cpu)
        child("sftlab.instance.precision_worker", folder, task, environment=machine.training_environment())
        seconds = LayerSeconds.model_validate_json((folder / SECONDS).read_bytes())
        remember("precision", key_of(here), seconds.model_dump())
        return seconds

    def build(folder: Path) -> None:
        try:
            remembered = recalled("precision").get(key_of(here))
            seconds = LayerSeconds.model_validate(remembered) if remembered else measure(folder)
        except SftlabError as error:
            log.warning(
                "instance.bf16=auto: no layer of %s could be timed (%s), so bfloat16 is used. Set instance.bf16 and "
                "eval.dtype to choose",
                base.name,
                error,
            )
            write_json(folder / SECONDS, {})
        else:
            write_json(folder / SECONDS, seconds.model_dump())

    stage = store.stage("precision", {"version": 1, "layer": layer}, build)
    measured = _read(stage)
    if measured is not None and not stage.cached:
        log.info("precision: %s", _described(measured))
    elif measured is not None and measured.cpu != cpu:
        log.info(
            "precision: as the first run of this store measured it on %s. Set instance.bf16 and eval.dtype to choose",
            measured.cpu,
        )
    return stage


def _read(stage: Stage) -> LayerSeconds | None:
    """Read the measurement; None if the model's layer could not be timed."""
    seconds = json.loads((stage.path / SECONDS).read_text("utf-8"))
    return LayerSeconds.model_validate(seconds) if seconds else None


def _described(measured: LayerSeconds) -> str:
    parts = []
    for name, seconds in {"training": measured.adapters, "generation": measured.generation}.items():
        dtype = "bfloat16" if _prefers_bfloat16(seconds) else "float32"
        times = f"{1000 * seconds['bfloat16']:.0f} ms against {1000 * seconds['float32']:.0f} ms in float32"
        parts.append(f"{name} in {dtype} (a layer takes {times})")
    return "; ".join(parts)


def _layer_of(folder: Path) -> dict[str, object]:
    """Return what the speed of a layer depends on: the sizes in a model's config, except layers and vocabulary."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config = {**config, **config.get("text_config", {})}
    return {
        name: value
        for name, value in config.items()
        if name == "model_type"
        or (isinstance(value, int) and name not in ("num_hidden_layers", "vocab_size") and not name.endswith("_id"))
    }


def _cpu() -> dict[str, object]:
    """Return model, instruction sets and number of the cores that this process may use, and the user's limits on them.

    They are read from /proc/cpuinfo, which only Linux has.
    """
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    first = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines)}
    return {
        "cpu": first.get("model name", os.uname().machine),
        "flags": first.get("flags", ""),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "limits": {name: os.environ[name] for name in ("ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS") if name in os.environ},
    }
