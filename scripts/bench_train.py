#!/usr/bin/env python
r"""Time training with sftlab and with a bare TRL script with the same settings, on rows of random tokens.

    scripts/bench_train.py                                     the 135M shape, short rows: also on a CPU
    scripts/bench_train.py --shape gemma-3-4b --length 2048 --batch 4 --attention eager sdpa flash_attention_2 \
        --liger false true --packing false true                a table of all combinations, on a GPU
    scripts/bench_train.py --rows medqa --batch 16             rows with the lengths of MedQA-CoT

LoRA r 16 on all linear layers, bf16, random weights (speed does not depend on their values). Each training runs in its
own process. Tokens/s exclude padding and the first steps. Gradient checkpointing is the same on both sides: as set by
--set, or as sftlab chooses it for these rows and this machine. scripts/gpu_check.py times its cells with `training`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir

from sftlab.config import Config
from sftlab.dataset.token_rows import schema, write_rows
from sftlab.dataset.tokenize import COUNTS, GROUPS, Tokenized
from sftlab.hydra_app.compose import CONF
from sftlab.instance import machine as instance
from sftlab.instance.machine import Machine
from sftlab.model.base import Base
from sftlab.records import IGNORED
from sftlab.results import SplitCounts, TokenCounts
from sftlab.runtime.processes import NEEDED, QUIET
from sftlab.runtime.store import Stage, Store, write_json
from sftlab.train import memory
from sftlab.train.checkpoints import read_receipt
from sftlab.validation.validate import validate

SHAPES: dict[str, dict[str, Any]] = {
    # From the config.json of HuggingFaceTB/SmolLM2-135M-Instruct, google/gemma-3-270m, google/gemma-3-4b-it (its text
    # model) and meta-llama/Llama-3.1-8B. The last two are for tests of the scripts.
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "gemma-3-270m": {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
        "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "sliding_window": 512,
    },
    "gemma-3-4b": {
        "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "sliding_window": 1024,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "tiny-llama": {
        "model_type": "llama", "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "tiny-gemma3": {
        "model_type": "gemma3_text", "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "sliding_window": 32,
    },
}  # fmt: skip
POSITIONS = 8192

# Tokens per row of MedQA-CoT, as a log-normal distribution: 5 % under 165, median 280, 5 % over 475, 1 % over 590.
# Fitted to 3,741 board questions with a rationale (at 4.2 characters per token): their median is 279, 1 % are over 581,
# and random batches of 16 and 64 rows have 1.62 and 2.13 tokens with padding per token without. 45 % of a row are the
# rationale.
MEDQA_MEDIAN, MEDQA_SIGMA = 280, 0.32
COMPLETION = {"full": 0.5, "medqa": 0.45}

COMMON = [
    # Neither model nor dataset is read; these two need no download.
    "mode=train", "model=tiny_random", "dataset=vignettes", "tracking=none", "train.lr_scheduler_type=constant",
    "train.logging_steps=1", "train.num_train_epochs=1", "train.bf16=true",
    # As many adapters as the bare script has: peft=demo leaves the lower layers out.
    "peft.top_layers=1.0",
]  # fmt: skip


def describe(folder: Path, shape: str) -> Path:
    """Write the config.json of a shape, the only file of a model that ``mode=plan`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {**SHAPES[shape], "max_position_embeddings": POSITIONS, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    return folder


def model(folder: Path, shape: str) -> None:
    """Save a model of a shape with random weights, and a tokenizer of which only the special tokens are used."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sftlab.config import ModelConfig
    from sftlab.model import base as models

    config = AutoConfig.from_pretrained(describe(folder, shape))
    torch.manual_seed(1)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        random_model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    random_model.save_pretrained(folder)
    tiny = ModelConfig(
        name_or_path="random:llama", revision=None, trust_remote_code=False, chat_template=None, template_time=None
    )
    with tempfile.TemporaryDirectory(dir=folder) as store:
        models.resolve(tiny, Store(store), 0).tokenizer().save_pretrained(folder)


def lengths(kind: str, count: int, longest: int) -> list[int]:
    """Number of tokens of each row: ``longest`` for ``full`` rows, varying for ``medqa`` rows."""
    if kind == "full":
        return [longest] * count
    draw = random.Random(1)
    middle = min(MEDQA_MEDIAN, longest / 4)  # a small test has shorter rows
    drawn = (round(draw.lognormvariate(math.log(middle), MEDQA_SIGMA)) for _ in range(count))
    return [min(max(tokens, 8), longest) for tokens in drawn]


def rows(folder: Path, train: Sequence[int], validation: Sequence[int], completion: float = 0.5) -> None:
    """Save rows of random tokens with these lengths as a tokens stage. The last part of each row has a loss.

    Half of the tokens repeat an earlier token of their row, so that the context helps to predict them.
    """
    from datasets import Dataset
    from pyarrow import RecordBatch

    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(1)
    counts: dict[str, SplitCounts] = {}
    for split, sizes in (("train", train), ("validation", validation)):
        table = []
        for size in sizes:
            ids = [draw.randrange(3, 1000)]
            while len(ids) < size:
                ids.append(draw.choice(ids) if draw.random() < 0.5 else draw.randrange(3, 1000))
            first = size - max(1, round(size * completion))
            table.append({"input_ids": ids, "labels": [IGNORED] * first + ids[first:]})
        write_rows(folder, split, [RecordBatch.from_pylist(table, schema())])
        firsts = [row["labels"].count(IGNORED) for row in table]
        np.save(folder / f"{split}-lengths.npy", np.array([sizes, firsts, [0] * len(sizes)], dtype=np.int32))
        counts[split] = SplitCounts(
            rows=len(sizes),
            tokens=sum(sizes),
            supervised=sum(label != IGNORED for row in table for label in row["labels"]),
            longest=max(sizes),
            truncated=0,
            left_out=0,
        )
        if split == "train":
            bare = [
                {"input_ids": row["input_ids"], "completion_mask": [int(label != IGNORED) for label in row["labels"]]}
                for row in table
            ]
            Dataset.from_list(bare).save_to_disk(folder / "bare")
    record = TokenCounts(train=counts["train"], validation=counts["validation"], prompt_bos=0, turn_ends=[])
    write_json(folder / COUNTS, record.model_dump())
    write_json(folder / GROUPS, [None] * len(validation))


def tokenized(tokens: str) -> Tokenized:
    """Saved rows, as a finished stage."""
    return Tokenized(Stage("tokens", "", Path(tokens), cached=True, seconds=0.0))


def model_at(base: str) -> Base:
    """A saved model or config; its identity is the shape."""
    return Base("model", Path(base), Path(base).name, False, None)


def settings(overrides: Sequence[str]) -> tuple[Config, Machine]:
    """The configuration of a training, and its machine."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = validate(compose("config", overrides=[*COMMON, *overrides]))
    return cfg, instance.find(cfg.instance)


def resolved(cfg: Config, machine: Machine, base: str, tokens: str) -> Config:
    """The configuration with gradient checkpointing on or off instead of ``auto``, as sftlab decides it.

    The decision is stored beside the rows, so that both sides and the plan have the same.
    """
    store = Store(Path(tokens) / "store")
    return memory.with_checkpointing(cfg, model_at(base), tokenized(tokens), machine, store)[0]


def training(
    side: str, overrides: Sequence[str], base: str, tokens: str, out: str, *, save: bool = False
) -> dict[str, Any]:
    """Train in this process with ``sftlab`` or with ``bare`` TRL, and measure speed, memory and losses.

    ``base``, ``tokens`` and ``out`` are folders. ``save`` writes a checkpoint, as sftlab does after every epoch.
    """
    cfg, machine = settings(overrides)
    cfg = resolved(cfg, machine, base, tokens)
    counts = tokenized(tokens).counts.train
    Path(out).mkdir(parents=True)
    import torch
    import transformers.trainer

    ends: list[float] = []
    logged: list[dict[str, float]] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        """The same clock and the same log for both sides."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.on_step_end()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if machine.device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            logged.append(logs)

    release()
    begin = time.perf_counter()
    transformers.trainer.DEFAULT_CALLBACKS.append(Clock)
    try:
        if side == "bare":
            receipt = _bare(cfg, machine, base, tokens, out)
        else:
            receipt = _sftlab(cfg, machine, base, tokens, out, save=save)
    finally:
        transformers.trainer.DEFAULT_CALLBACKS.remove(Clock)
        # The signal handler that sftlab has set refers to the trainer, and so to the model.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    took = [end - start for start, end in itertools.pairwise(ends)]
    timed = took[2 if len(took) > 4 else 1 :] or took
    # With rows of equal length all steps are equal.
    step = (median if counts.tokens == counts.rows * counts.longest else mean)(timed)
    speed = counts.tokens / len(took) / step
    evaluations = [row for row in logged if "eval_loss" in row]
    result: dict[str, Any] = {
        "tokens_per_second": round(speed, 1),
        "step_seconds": round(step, 4),
        "steps": len(took),
        "first_step_seconds": round(took[0], 2),
        "other_seconds": round(time.perf_counter() - begin - sum(took), 2),  # loading, validation and so on
        "epoch_seconds": round(len(took) * step + sum(row.get("eval_runtime", 0) for row in evaluations), 2),
        **peaks(machine),
        "losses": [round(row["loss"], 5) for row in logged if "loss" in row],
        "eval_loss": round(evaluations[-1]["eval_loss"], 5) if evaluations else None,
        "gradient_checkpointing": cfg.train.gradient_checkpointing,
        "receipt": receipt,
    }
    # The receipt has the speed of the whole training, with its first steps.
    mfu, whole = receipt.get("mfu"), receipt.get("tokens_per_second")
    result["mfu"] = round(mfu * speed / whole, 4) if mfu and whole else None
    return result


def _sftlab(cfg: Config, machine: Machine, base: str, tokens: str, out: str, *, save: bool) -> dict[str, Any]:
    """Train in this process as sftlab's child process does; the receipt."""
    from sftlab.train import worker

    extra = cfg.train.extra if save else {**cfg.train.extra, "save_strategy": "no"}
    task = worker.TrainTask(
        checkpoints=Path(out),
        tokens=Path(tokens),
        counts=tokenized(tokens).counts,
        base=model_at(base),
        peft=cfg.peft,
        train=cfg.train.model_copy(update={"extra": extra}),
        machine=machine,
        seed=1,
    )
    worker.run(Path(out), task)
    return read_receipt(Path(out)).model_dump()


def _bare(cfg: Config, machine: Machine, base: str, tokens: str, out: str) -> dict[str, Any]:
    """The same training in a plain TRL script."""
    sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]  # as in sftlab's process
    import torch
    from datasets import load_from_disk
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    train, peft = cfg.train.model_dump(), cfg.peft.model_dump()
    shared = (
        "per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "optim", "max_length", "packing", "bf16",
        "gradient_checkpointing", "use_liger_kernel", "logging_steps", "max_grad_norm", "weight_decay",
    )  # fmt: skip
    arguments = SFTConfig(
        output_dir=out,
        use_cpu=machine.device == "cpu",
        num_train_epochs=1,
        seed=1,
        data_seed=1,
        report_to=[],
        save_strategy="no",
        completion_only_loss=True,
        disable_tqdm=True,
        dataloader_pin_memory=machine.device != "cpu",
        gradient_accumulation_steps=machine.accumulation(cfg.train),
        **{name: train[name] for name in shared},
    )
    set_seed(1)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, attn_implementation=machine.attn_implementation
    )
    names = ("r", "lora_alpha", "lora_dropout", "target_modules")
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=load_from_disk(f"{tokens}/bare"),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **{name: peft[name] for name in names}),
    )
    trainer.train()
    trainer.accelerator.end_training()
    return {}


def release() -> None:
    """Free the memory of an earlier training, and reset the peaks."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # resets the peak of the process on Linux
        Path("/proc/self/clear_refs").write_text("5", "utf-8")


def peaks(machine: Machine) -> dict[str, float]:
    """Peak memory in GiB: of tensors, and what the allocator reserved for them."""
    if machine.device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {"peak_memory_gib": round(peak, 2), "reserved_gib": round(peak, 2)}
    import torch

    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"peak_memory_gib": round(peaks[0] / 2**30, 2), "reserved_gib": round(peaks[1] / 2**30, 2)}


def apart(arguments: dict[str, Any], folder: Path, variables: dict[str, str]) -> dict[str, Any]:
    """``training`` with these arguments, in its own process."""
    file = folder / "arguments.json"
    file.write_text(json.dumps(arguments), "utf-8")
    command = [sys.executable, __file__, "--arguments", str(file)]
    environment = {**QUIET, **os.environ, **NEEDED, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit("".join(done.stderr.splitlines(keepends=True)[-20:]))
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print a line per combination, with the ratio of sftlab to bare TRL."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="of the model")
    parser.add_argument("--rows", choices=COMPLETION, default="full", help="all of the same length, or as in MedQA-CoT")
    parser.add_argument("--length", type=int, default=None, help="tokens per row, at most (full: 256, medqa: 2048)")
    parser.add_argument("--batch", type=int, default=2, help="rows per device")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each run")
    parser.add_argument("--attention", nargs="+", default=["sdpa"], help="attention implementations")
    parser.add_argument(
        "--liger", nargs="+", default=["false"], choices=["false", "true"], help="without Liger, with Liger"
    )
    parser.add_argument(
        "--packing", nargs="+", default=["false"], choices=["false", "true"], help="without packing, with packing"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more settings, for both sides")
    parser.add_argument("--arguments", type=Path, help=argparse.SUPPRESS)  # of `training` in its own process
    options = parser.parse_args()
    if options.arguments is not None:
        print("\n" + json.dumps(training(**json.loads(options.arguments.read_text("utf-8")))))
        return
    os.environ.update({**QUIET, **os.environ})
    longest = options.length or {"full": 256, "medqa": 2048}[options.rows]
    print(f"{options.shape}, {options.steps} steps of {options.batch} × {longest} tokens ({options.rows})")
    heads = f"{'attention':18} {'Liger':6} {'packing':8} {'tokens/s':>10} {'GiB':>6} {'MFU':>6}"
    print(f"{heads}   bare TRL: tokens/s, GiB; ratio")
    with tempfile.TemporaryDirectory(prefix="bench_train_") as place:
        folder = Path(place)
        model(folder / "model", options.shape)
        sizes = lengths(options.rows, options.batch * options.steps, longest)
        rows(folder / "rows", sizes, sizes[:1], COMPLETION[options.rows])
        for number, (attention, liger, packing) in enumerate(
            itertools.product(options.attention, options.liger, options.packing)
        ):
            overrides = [
                "peft=demo", f"instance.attn_implementation={attention}", f"train.use_liger_kernel={liger}",
                f"train.packing={packing}", f"train.per_device_train_batch_size={options.batch}",
                f"train.max_length={longest}", *options.set,
            ]  # fmt: skip
            arguments = {"overrides": overrides, "base": str(folder / "model"), "tokens": str(folder / "rows")}
            variables = settings(overrides)[1].training_environment()
            ours, bare = (
                apart({**arguments, "side": side, "out": str(folder / f"{side}{number}")}, folder, variables)
                for side in ("sftlab", "bare")
            )
            speed, other = ours["tokens_per_second"], bare["tokens_per_second"]
            share = "—" if ours["mfu"] is None else f"{100 * ours['mfu']:.1f} %"
            print(
                f"{attention:18} {liger:6} {packing:8} {speed:10,.0f} {ours['peak_memory_gib']:6.1f} {share:>6}   "
                f"{other:10,.0f} {bare['peak_memory_gib']:6.1f}; {speed / other:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
