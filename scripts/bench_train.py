#!/usr/bin/env python
r"""Time training through sftlab beside a bare TRL script with the same settings, on rows of random tokens.

    scripts/bench_train.py                                     the 135M shape, short rows: also on a CPU
    scripts/bench_train.py --shape gemma-3-4b --length 2048 --batch 4 --attention eager sdpa flash_attention_2 \
        --liger false true --packing false true                a table over all of these, on a GPU

LoRA r 16 on all linear layers, bf16, random weights (they are as slow as trained ones). Each line is a process of
its own. Tokens/s are those of the median step, the first one left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from sftlab import instance
from sftlab.cli import CONF
from sftlab.launch import QUIET, child
from sftlab.validate import validate

SHAPES: dict[str, dict[str, Any]] = {
    # As in the config.json of HuggingFaceTB/SmolLM2-135M-Instruct and google/gemma-3-4b-it (its text model).
    "smollm2-135m": {
        "kind": "LlamaConfig", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "gemma-3-4b": {
        "kind": "Gemma3TextConfig", "vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "sliding_window": 1024,
    },
}  # fmt: skip

BARE = """
import json, sys, time
from statistics import median
import torch
from datasets import load_from_disk
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
given = json.load(open(sys.argv[1]))
class Clock(TrainerCallback):
    ends = []
    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())
train = given["train"]
arguments = SFTConfig(
    output_dir=given["out"], use_cpu=given["cpu"], num_train_epochs=1, report_to=[], save_strategy="no",
    completion_only_loss=True, disable_tqdm=True, dataloader_pin_memory=not given["cpu"],
    **{name: train[name] for name in (
        "per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "optim", "max_length", "packing", "bf16",
        "gradient_checkpointing", "use_liger_kernel", "logging_steps")})
model = AutoModelForCausalLM.from_pretrained(
    given["base"], dtype=torch.bfloat16, attn_implementation=given["attention"])
clock = Clock()
trainer = SFTTrainer(
    model=model, args=arguments, train_dataset=load_from_disk(given["tokens"] + "/bare"), callbacks=[clock],
    processing_class=AutoTokenizer.from_pretrained(given["base"]),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"))
trainer.train()
if given["cpu"]:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
else:
    peak = torch.cuda.max_memory_allocated() / 2**30
steps = [end - begin for begin, end in zip(clock.ends, clock.ends[1:])]
json.dump({"step_seconds": median(steps), "peak_memory_gib": peak}, open(sys.argv[2], "w"))
"""


def model(folder: Path, shape: str) -> None:
    """Save a model of a shape, with random weights, and a tokenizer that is needed for its special tokens only."""
    import torch
    import transformers

    from sftlab import models
    from sftlab.config import ModelConfig
    from sftlab.store import Store

    values = dict(SHAPES[shape])
    config = getattr(transformers, values.pop("kind"))(**values, max_position_embeddings=8192, pad_token_id=0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder)
    tiny = ModelConfig(
        name_or_path="random:llama", revision=None, trust_remote_code=False, chat_template=None, template_time=None
    )
    models.resolve(tiny, Store(folder / "store"), 0).tokenizer().save_pretrained(folder)


def rows(folder: Path, count: int, length: int) -> dict[str, Any]:
    """Rows of random tokens, the second half of each with a loss."""
    import random

    from datasets import Dataset

    draw = random.Random(1)
    made = []
    for _ in range(count):
        ids = [draw.randrange(3, 1000) for _ in range(length)]
        made.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    for split, part in (("train", made), ("validation", made[:1])):
        Dataset.from_list(part).save_to_disk(folder / split)
    mask = [0] * (length // 2) + [1] * (length - length // 2)
    Dataset.from_list([{"input_ids": row["input_ids"], "completion_mask": mask} for row in made]).save_to_disk(
        folder / "bare"
    )
    counts = {"rows": count, "tokens": count * length, "supervised": count * (length - length // 2)}
    each = {**counts, "truncated": 0, "left_out": 0, "longest": length}
    return {"train": each, "validation": each, "prompt_bos": 0}


def main() -> None:
    """Print a line for each combination, and the ratio of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="of the model")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=2, help="rows per device")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each run")
    parser.add_argument("--attention", nargs="+", default=["sdpa"], help="attention implementations")
    parser.add_argument("--liger", nargs="+", default=["false"], choices=["false", "true"], help="with Liger, without")
    parser.add_argument("--packing", nargs="+", default=["false"], choices=["false", "true"], help="with, without")
    given = parser.parse_args()
    print(f"{given.shape}, {given.steps} steps of {given.batch} × {given.length} tokens")
    heads = f"{'attention':18} {'Liger':6} {'packing':8} {'tokens/s':>10} {'GiB':>6} {'MFU':>6}"
    print(f"{heads}   bare TRL: tokens/s, GiB; ratio")
    with tempfile.TemporaryDirectory(prefix="bench_train_") as place:
        folder = Path(place)
        model(folder / "model", given.shape)
        counts = rows(folder / "rows", given.batch * given.steps, given.length)
        for attention, liger, packing in itertools.product(given.attention, given.liger, given.packing):
            with initialize_config_dir(str(CONF), version_base="1.3"):
                cfg = validate(compose("config", overrides=[
                    "mode=train", f"instance.attn_implementation={attention}", f"train.use_liger_kernel={liger}",
                    f"train.packing={packing}", f"train.per_device_train_batch_size={given.batch}",
                    f"train.max_length={given.length}", "train.lr_scheduler_type=constant", "train.logging_steps=1",
                    "train.num_train_epochs=1", "train.bf16=true", "peft.lora_dropout=0.0",
                ]))  # fmt: skip
            machine = instance.find(cfg.instance)
            arguments: dict[str, Any] = {
                "checkpoints": str(folder), "tokens": str(folder / "rows"), "base": str(folder / "model"),
                "trust_remote_code": False, "chat_template": None, "peft": cfg.peft.model_dump(),
                "train": {**cfg.train.model_dump(), "extra": {"save_strategy": "no"}},
                "machine": machine.as_dict(), "seed": 1, "counts": counts,
                "report_to": [],
            }  # fmt: skip
            out = Path(tempfile.mkdtemp(dir=folder))
            variables = machine.training_environment()
            child("sftlab.stages.train", out, arguments, launcher=machine.launcher(), environment=variables)
            ours = json.loads((out / "receipt.json").read_text("utf-8"))
            (out / "bare.py").write_text(BARE, "utf-8")
            bare = {**arguments, "cpu": machine.device == "cpu", "attention": attention, "out": str(out / "bare")}
            (out / "given.json").write_text(json.dumps(bare), "utf-8")
            command = [sys.executable, *(str(out / name) for name in ("bare.py", "given.json", "bare.json"))]
            subprocess.run(command, check=True, env={**os.environ, **QUIET, **variables}, stdout=subprocess.DEVNULL)
            theirs = json.loads((out / "bare.json").read_text("utf-8"))
            tokens = given.batch * given.length
            speed, other = tokens / ours["step_seconds"], tokens / theirs["step_seconds"]
            share = "—" if ours["mfu"] is None else f"{100 * ours['mfu']:.1f} %"
            print(
                f"{attention:18} {liger:6} {packing:8} {speed:10,.0f} {ours['peak_memory_gib']:6.1f} {share:>6}   "
                f"{other:10,.0f} {theirs['peak_memory_gib']:6.1f}; {speed / other:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
