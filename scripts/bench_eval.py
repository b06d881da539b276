#!/usr/bin/env python
"""Compare the speed of generation through sftlab with bare vLLM and with batched transformers, on the same prompts.

    scripts/bench_eval.py                 the demo's 200 test prompts, at most 128 tokens each
    scripts/bench_eval.py --rounds 3      measure each three times, in turn; the best result of each counts

Bare vLLM is a script that calls ``vllm.LLM(...).generate`` with the same settings. Each starts anew in every round;
the time to start is not part of the time to generate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from sftlab.dataset import stage as dataset
from sftlab.eval import stage as evaluate
from sftlab.eval.prompts import context_length, tokenize_prompts
from sftlab.hydra_app.compose import CONF
from sftlab.instance import machine as instance
from sftlab.model import base as models
from sftlab.runtime.processes import QUIET
from sftlab.runtime.store import Store
from sftlab.validation.validate import validate

BARE = """
import json, os, sys, time
settings = json.load(open(sys.argv[1]))
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
if settings["cpu"]:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings["kv_cache_gib"])
begin = time.monotonic()
from vllm import LLM, SamplingParams
memory = {} if settings["cpu"] else {"gpu_memory_utilization": settings["gpu_memory_utilization"]}
llm = LLM(model=settings["model"], dtype="bfloat16", max_model_len=settings["max_model_len"], seed=settings["seed"],
          enable_prefix_caching=True, enforce_eager=settings["cpu"], **memory)
ready = time.monotonic()
out = llm.generate([{"prompt_token_ids": ids} for ids in settings["prompts"]],
                   SamplingParams(max_tokens=settings["max_tokens"], temperature=0.0), use_tqdm=False)
end = time.monotonic()
tokens = sum(len(request.outputs[0].token_ids) for request in out)
json.dump({"start": ready - begin, "seconds": end - ready, "tokens": tokens}, open(sys.argv[2], "w"))
"""


def bare(folder: Path, settings: dict[str, Any], environment: dict[str, str]) -> tuple[float, int]:
    """Return the seconds and tokens of ``LLM.generate``, in a process with the environment of sftlab's engine."""
    (folder / "bare.py").write_text(BARE, "utf-8")
    (folder / "bare.json").write_text(json.dumps(settings), "utf-8")
    command = [sys.executable, *(str(folder / name) for name in ("bare.py", "bare.json", "out.json"))]
    subprocess.run(command, check=True, env={**os.environ, **QUIET, **environment}, stdout=subprocess.DEVNULL)
    out = json.loads((folder / "out.json").read_text("utf-8"))
    return out["seconds"], out["tokens"]


def main() -> None:
    """Print the tokens per second of the three, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each")
    parser.add_argument("overrides", nargs="*", help="overrides as on sftlab's command line")
    arguments = parser.parse_args()
    overrides = ["eval.max_tokens=128", "eval.forced=false", *arguments.overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = validate(compose("config", overrides=overrides))
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench_eval_") as name:
        folder = Path(name)
        store, machine = Store(folder / "store"), instance.find(cfg.instance)
        base = models.resolve(cfg.model, store, cfg.seed)
        data = dataset.make(store, cfg.dataset)
        prompts = tokenize_prompts(data.split("test"), base, cfg.eval)
        model = evaluate.Model(base.path, base.identity, base.trust_remote_code)
        settings = {
            "cpu": machine.device == "cpu",
            "model": str(base.path),
            "max_model_len": min(context_length(base.path), prompts.longest + cfg.eval.max_tokens + 64),
            "max_tokens": cfg.eval.max_tokens,
            "kv_cache_gib": max(1, round(cfg.eval.kv_cache_gib)),
            "gpu_memory_utilization": cfg.eval.gpu_memory_utilization,
            "seed": cfg.seed,
            "prompts": [prompt.token_ids for prompt in prompts.rows],
        }
        for number in range(arguments.rounds):
            for engine in ("vllm", "transformers"):
                evaluation = cfg.eval.model_copy(update={"engine": engine})
                store = Store(folder / f"{engine}{number}")
                generated = evaluate.make(store, model, prompts, evaluation, machine, cfg.seed)
                speed = json.loads((generated.stage.path / "speed.json").read_text("utf-8"))["tokens_per_second"]
                best[engine] = max(best.get(engine, 0), speed)
            seconds, tokens = bare(folder, settings, machine.engines(1)[0])
            best["bare"] = max(best.get("bare", 0), tokens / seconds)
    print(
        f"{len(prompts.rows)} prompts, at most {cfg.eval.max_tokens} tokens each, best of {arguments.rounds} rounds; "
        "generated tokens/s:"
    )
    print(f"  sftlab, vLLM          {best['vllm']:8.1f}")
    print(f"  bare vLLM             {best['bare']:8.1f}   sftlab / bare: {best['vllm'] / best['bare']:.2f}")
    print(f"  transformers, batch {cfg.eval.batch_size:<3}{best['transformers']:7.1f}   sftlab / transformers: "
          f"{best['vllm'] / best['transformers']:.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
