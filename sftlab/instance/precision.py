"""Choose between float32 and bfloat16 on a CPU by timing one layer of the model in both.

With matrix units for bfloat16 (AMX) a training step takes half of its time in float32, and without them up to one and
a half times as long; the name of a CPU does not show which. The first run that needs a choice measures, and the store
retains it: a sweep on several machines and a run that is resumed elsewhere compare and continue the same numbers.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Literal

from sftlab.config import EvalConfig, TrainConfig
from sftlab.errors import SftlabError
from sftlab.instance.machine import Machine
from sftlab.model.base import Base
from sftlab.runtime.processes import child, leave_out, serve
from sftlab.runtime.store import Stage, Store, key_of, recalled, remember, versions, write_json

log = logging.getLogger(__name__)

SECONDS = "seconds.json"
# float32 is the more exact of the two, and is left only for a gain that repeats from run to run.
GAIN = 0.95
# A measurement repeats each precision in turn, at least so often and for about so long.
ROUNDS, BUDGET_SECONDS = 3, 0.2
# What a timed pass computes at most: short on any CPU, and long enough to fill its cores.
FLOPS, TOKENS = 1e10, 512
# Passes over few tokens decide if one takes so many times as long as the other.
FEW, CLEAR = 32, 4

Kind = Literal["adapters", "all_weights", "generation"]


@dataclass(frozen=True)
class Seconds:
    """Seconds of one pass through one layer, by number format: ``float32`` and ``bfloat16``.

    ``adapters`` is a training step of adapters (frozen weights in the named format), ``all_weights`` one of full
    fine-tuning (float32 weights, with and without bfloat16 autocast), ``generation`` a forward pass over single tokens.
    """

    cpu: str
    adapters: dict[str, float]
    all_weights: dict[str, float]
    generation: dict[str, float]

    def bfloat16(self, kind: Kind) -> bool:
        """Whether bfloat16 is the faster one."""
        seconds: dict[str, float] = getattr(self, kind)
        return seconds["bfloat16"] < GAIN * seconds["float32"]


def chosen(
    store: Store, base: Base, train: TrainConfig, evaluation: EvalConfig, machine: Machine, *, whole: bool
) -> tuple[TrainConfig, EvalConfig, Stage | None]:
    """The sections with their precision instead of ``auto``, and the stage with the measurement where there is one.

    ``whole`` is full fine-tuning. GPUs are given bfloat16, and so are CPU machines that train together: they must
    agree, and each would measure for itself.
    """
    if "auto" not in (train.bf16, evaluation.dtype):
        return train, evaluation, None
    measured, stage = None, None
    if machine.device == "cpu" and machine.nnodes == 1:
        stage = _stage(store, base, machine)
        measured = _read(stage)
    if train.bf16 == "auto":
        faster = measured is None or measured.bfloat16("all_weights" if whole else "adapters")
        train = train.model_copy(update={"bf16": faster})
    if evaluation.dtype == "auto":
        faster = measured is None or measured.bfloat16("generation")
        evaluation = evaluation.model_copy(update={"dtype": "bfloat16" if faster else "float32"})
    return train, evaluation, stage


def _stage(store: Store, base: Base, machine: Machine) -> Stage:
    layer = _layer_of(base.path)
    here = {**_cpu(), "layer": layer, "environment": machine.training_environment(), "libraries": versions("torch")}

    def measure(folder: Path) -> dict[str, Any]:
        given = {"base": str(base.path.resolve()), "trust_remote_code": base.trust_remote_code, "cpu": here["cpu"]}
        child("sftlab.instance.precision", folder, given, environment=machine.training_environment())
        found: dict[str, Any] = json.loads((folder / SECONDS).read_text("utf-8"))
        remember("precision", key_of(here), found)
        return found

    def build(folder: Path) -> None:
        try:
            found = recalled("precision").get(key_of(here)) or measure(folder)
        except SftlabError as error:
            log.warning(
                "instance.bf16=auto: no layer of %s could be timed (%s); bfloat16 is used. Set instance.bf16 and "
                "eval.dtype to choose",
                base.name,
                error,
            )
            found = {}
        write_json(folder / SECONDS, found)

    stage = store.stage("precision", {"version": 1, "layer": layer}, build)
    measured = _read(stage)
    if measured is not None and not stage.cached:
        log.info("precision: %s", _described(measured))
    elif measured is not None and measured.cpu != here["cpu"]:
        log.info(
            "precision: as this store's first run measured it on %s; set instance.bf16 and eval.dtype to choose",
            measured.cpu,
        )
    return stage


def _read(stage: Stage) -> Seconds | None:
    """The measurement; None where the model's layer could not be timed."""
    values = json.loads((stage.path / SECONDS).read_text("utf-8"))
    return Seconds(**values) if values else None


def record(stage: Stage | None, train: TrainConfig, evaluation: EvalConfig) -> dict[str, Any]:
    """What was chosen, and the measurement that it rests on, for ``run.json``."""
    measured = _read(stage) if stage is not None else None
    return {
        "train.bf16": train.bf16,
        "eval.dtype": evaluation.dtype,
        "measured": None if measured is None else asdict(measured),
    }


def _described(measured: Seconds) -> str:
    kinds: tuple[tuple[str, Kind], ...] = (("training", "adapters"), ("generation", "generation"))
    parts = []
    for name, kind in kinds:
        seconds: dict[str, float] = getattr(measured, kind)
        word = "bfloat16" if measured.bfloat16(kind) else "float32"
        times = f"{1000 * seconds['bfloat16']:.0f} ms against {1000 * seconds['float32']:.0f} ms in float32"
        parts.append(f"{name} in {word} (a layer takes {times})")
    return "; ".join(parts)


def _layer_of(folder: Path) -> dict[str, Any]:
    """What the speed of a layer depends on: the sizes in a model's config, but for how many layers and words it has."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config = {**config, **config.get("text_config", {})}
    return {
        name: value
        for name, value in config.items()
        if name == "model_type"
        or (isinstance(value, int) and name not in ("num_hidden_layers", "vocab_size") and not name.endswith("_id"))
    }


def _cpu() -> dict[str, Any]:
    """Name, instruction sets and number of the cores that this process may use, and the user's limit on them."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    known = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines)}
    return {
        "cpu": known.get("model name", os.uname().machine),
        "flags": known.get("flags", ""),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "limits": {name: os.environ[name] for name in ("ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS") if name in os.environ},
    }


# ------------------------------------------------------------------- in the child process


def run(folder: Path, given: Mapping[str, Any]) -> None:
    """Time a layer of the model, and write ``seconds.json``."""
    leave_out("bitsandbytes", "wandb")
    from transformers import AutoConfig

    code = given["trust_remote_code"]
    config = AutoConfig.from_pretrained(given["base"], trust_remote_code=code, local_files_only=True)
    single = one_layer(config, "float32", code=code)
    half = copy.deepcopy(single).bfloat16()
    size = sum(parameter.numel() for parameter in single.parameters())
    tokens = int(min(TOKENS, max(FEW, FLOPS / (4 * size))))
    trained = copy.deepcopy(single).requires_grad_()
    for layer in (single, half):
        layer.requires_grad_(requires_grad=False)
        layer.enable_input_require_grads()  # as adapters have it: the gradient of the input, not that of the weights
    found = Seconds(
        cpu=given["cpu"],
        adapters=_compare(tokens, {"float32": partial(_step, single), "bfloat16": partial(_step, half, autocast=True)}),
        all_weights=_compare(
            tokens, {"float32": partial(_step, trained), "bfloat16": partial(_step, trained, autocast=True)}
        ),
        generation=_compare(64, {"float32": partial(_forward, single), "bfloat16": partial(_forward, half)}),
    )
    write_json(folder / SECONDS, asdict(found))


def one_layer(config: Any, dtype: str, *, attention: str = "sdpa", code: bool = False) -> Any:
    """A model's text part with one layer, a vocabulary of 64 words and random weights, by its config."""
    import torch
    from transformers import AutoModelForCausalLM

    text = copy.deepcopy(config.get_text_config())
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, 64, 0
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    return AutoModelForCausalLM.from_config(
        text, dtype=getattr(torch, dtype), attn_implementation=attention, trust_remote_code=code
    )


def _step(layer: Any, tokens: int, *, autocast: bool = False) -> None:
    """Forward and backward over rows of at most 256 tokens."""
    import torch

    length = min(tokens, 256)
    ids = torch.zeros(tokens // length, length, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = layer(input_ids=ids, use_cache=False).logits
    logits.float().sum().backward()
    layer.zero_grad()


def _forward(layer: Any, tokens: int) -> None:
    """Single tokens of different answers: what generation does at a step."""
    import torch

    with torch.inference_mode():
        layer(input_ids=torch.zeros(min(tokens, 64), 1, dtype=torch.long), use_cache=False)


def _compare(tokens: int, passes: Mapping[str, Callable[[int], None]]) -> dict[str, float]:
    """The best time of each in seconds, measured in turn: what else the machine does then slows both.

    On a CPU without instructions for bfloat16 a pass takes 20 times as long as in float32: a few tokens show it.
    """
    best: dict[str, float] = {}
    for count in (FEW, tokens):
        best, begin, rounds = dict.fromkeys(passes, inf), time.perf_counter(), 0
        for work in passes.values():
            work(count)  # the first pass compiles and allocates
        while rounds < ROUNDS or time.perf_counter() - begin < BUDGET_SECONDS:
            for name, work in passes.items():
                start = time.perf_counter()
                work(count)
                best[name] = min(best[name], time.perf_counter() - start)
            rounds += 1
        if max(best.values()) > CLEAR * min(best.values()):
            break
    return {name: round(seconds, 6) for name, seconds in best.items()}


if __name__ == "__main__":
    serve(run)
