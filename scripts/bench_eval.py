#!/usr/bin/env python
"""Time generation through sftlab beside bare vLLM and beside batched transformers, on the same prompts.

    scripts/bench_eval.py                 the demo's 200 test prompts, 128 tokens each at most
    scripts/bench_eval.py --rounds 3      each measured three times, in turns; the best of each counts

Bare vLLM is a script that calls ``vllm.LLM(...).generate`` with the same settings. All start anew for every
round; the time to start is told apart from the time to generate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from sftlab.dataset import stage as dataset
from sftlab.eval import stage as evaluate
from sftlab.hydra_app.compose import CONF
from sftlab.instance import machine as instance
from sftlab.model import base as models
from sftlab.runtime.store import Store
from sftlab.validation.validate import validate

BARE = """
import json, os, sys, time
given = json.load(open(sys.argv[1]))
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
if given["cpu"]:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(given["kv_cache_gib"])
begin = time.monotonic()
from vllm import LLM, SamplingParams
memory = {} if given["cpu"] else {"gpu_memory_utilization": given["gpu_memory_utilization"]}
llm = LLM(model=given["model"], dtype="bfloat16", max_model_len=given["max_model_len"], seed=given["seed"],
          enable_prefix_caching=True, enforce_eager=given["cpu"], **memory)
ready = time.monotonic()
out = llm.generate([{"prompt_token_ids": ids} for ids in given["prompts"]],
                   SamplingParams(max_tokens=given["max_tokens"], temperature=0.0), use_tqdm=False)
end = time.monotonic()
tokens = sum(len(one.outputs[0].token_ids) for one in out)
json.dump({"start": ready - begin, "seconds": end - ready, "tokens": tokens}, open(sys.argv[2], "w"))
"""


def bare(folder: Path, given: dict[str, Any], environment: dict[str, str]) -> tuple[float, int]:
    """Seconds and tokens of ``LLM.generate``, in a process with the environment that sftlab's engine has."""
    import os

    from sftlab.runtime.processes import QUIET

    (folder / "bare.py").write_text(BARE, "utf-8")
    (folder / "bare.json").write_text(json.dumps(given), "utf-8")
    command = [sys.executable, *(str(folder / name) for name in ("bare.py", "bare.json", "out.json"))]
    subprocess.run(command, check=True, env={**os.environ, **QUIET, **environment}, stdout=subprocess.DEVNULL)
    out = json.loads((folder / "out.json").read_text("utf-8"))
    return out["seconds"], out["tokens"]


def main() -> None:
    """Print tokens per second of the three, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="how often each is measured")
    parser.add_argument("overrides", nargs="*", help="as on sftlab's command line")
    arguments = parser.parse_args()
    overrides = ["eval.max_tokens=128", "eval.forced=false", *arguments.overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = validate(compose("config", overrides=overrides))
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench_eval_") as place:
        folder = Path(place)
        store, machine = Store(folder / "store"), instance.find(cfg.instance)
        base = models.resolve(cfg.model, store, cfg.seed)
        data = dataset.make(store, cfg.dataset, cfg.seed)
        prompts = evaluate.prompts(data.split("test"), base, data.stage.key, cfg.eval, cfg.seed)
        model = evaluate.Model(base.path, base.identity, base.trust_remote_code)
        room = min(evaluate.context_length(base.path), prompts.longest + cfg.eval.max_tokens + 64)
        given = {
            "cpu": machine.device == "cpu",
            "model": str(base.path),
            "max_model_len": room,
            "max_tokens": cfg.eval.max_tokens,
            "kv_cache_gib": max(1, round(cfg.eval.kv_cache_gib)),
            "gpu_memory_utilization": cfg.eval.gpu_memory_utilization,
            "seed": cfg.seed,
            "prompts": [row["prompt_token_ids"] for row in prompts.rows],
        }
        for number in range(arguments.rounds):
            for engine in ("vllm", "transformers"):
                settings = cfg.eval.model_copy(update={"engine": engine})
                made = evaluate.make(Store(folder / f"{engine}{number}"), model, prompts, settings, machine, cfg.seed)
                speed = json.loads((made.stage.path / "speed.json").read_text("utf-8"))["tokens_per_second"]
                best[engine] = max(best.get(engine, 0), speed)
            seconds, tokens = bare(folder, given, machine.engines(1)[0])
            best["bare"] = max(best.get("bare", 0), tokens / seconds)
    print(
        f"{len(prompts.rows)} prompts, {cfg.eval.max_tokens} tokens at most, best of {arguments.rounds} rounds; "
        "generated tokens/s:"
    )
    print(f"  sftlab, vLLM          {best['vllm']:8.1f}")
    print(f"  bare vLLM             {best['bare']:8.1f}   sftlab / bare: {best['vllm'] / best['bare']:.2f}")
    print(f"  transformers, batch {cfg.eval.batch_size:<3}{best['transformers']:7.1f}   sftlab / transformers: "
          f"{best['vllm'] / best['transformers']:.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
