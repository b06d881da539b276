"""A finished run as files, without a training: a base model, an adapter and a merged model of a few bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import composed, write_model

from sftlab.results import Selection
from sftlab.runtime.job import Job
from sftlab.runtime.run import Run

ADAPTER = {"peft_type": "LORA", "r": 16, "bias": "none", "use_dora": False, "modules_to_save": None}


def make_run(folder: Path, *, mode: str = "all", status: Any = "success", **adapter: Any) -> Path:
    """Write a run below ``folder``/outputs whose base model is ``folder``/base; fields of its adapter may differ."""
    write_model(folder / "base")
    place = folder / "outputs" / "demo" / f"{mode}-{status}"
    run = Run.start(place, name="demo", mode=mode, seed=1, command="")
    checkpoint = folder / "outputs" / "store" / "train" / "key" / "checkpoint-4"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "adapter_config.json").write_text(json.dumps(ADAPTER | adapter), "utf-8")
    merged = write_model(folder / "outputs" / "store" / "merged" / "key")
    (merged / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}), "utf-8")
    (place / "best").symlink_to(checkpoint)
    if mode == "all":
        (place / "merged").symlink_to(merged)
    cfg = composed(f"model.name_or_path={folder}/base", "eval.dtype=float32")
    job = Job(number=0, overrides=[], config=cfg.model_dump(), status="success", run=run.record.id)
    job.write(place)
    selection = Selection(
        metric="eval_loss", checkpoint=str(checkpoint), step=4, epoch=1, eval_loss=1, train_loss=1, exact_match=None,
        job=0, overrides=[], seconds=1, lowest_eval_loss=1, best=str(checkpoint), ties=[], candidates=[],
    )  # fmt: skip
    run.update(selection=selection)
    if status != "running":
        run.finish(status)
    return place
