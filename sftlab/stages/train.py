"""Token ids → a checkpoint and a validation loss for every epoch, trained in a child process."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sftlab.config import Lora, NoPeft, PeftConfig, Qlora, TrainConfig
from sftlab.errors import ConfigError, StageError
from sftlab.instance import Machine
from sftlab.launch import child, serve
from sftlab.models import Base
from sftlab.records import Candidate, read_jsonl, write_jsonl
from sftlab.stages.tokenize import Tokenized
from sftlab.store import Stage, Store, write_json

log = logging.getLogger(__name__)

COMPLETE = "checkpoint.json"
# What a checkpoint needs only to go on training.
OPTIMIZER_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt")


@dataclass(frozen=True)
class Trained:
    """The finished stage: ``checkpoint-*`` folders, ``metrics.jsonl`` and ``receipt.json``."""

    stage: Stage

    @property
    def receipt(self) -> dict[str, Any]:
        """What took effect in training."""
        receipt: dict[str, Any] = json.loads((self.stage.path / "receipt.json").read_text("utf-8"))
        return receipt

    def metrics(self) -> list[dict[str, Any]]:
        """Everything that the trainer logged, in order."""
        return list(read_jsonl(self.stage.path / "metrics.jsonl"))

    def candidates(self, job: int, overrides: list[str]) -> list[Candidate]:
        """The checkpoints that exist, in the order of their steps."""
        rows = [(json.loads((path / COMPLETE).read_text("utf-8")), path) for path in complete(self.stage.path)]
        return [Candidate(**row, checkpoint=str(path), job=job, overrides=overrides) for row, path in rows]


def inputs(
    tokens_key: str, base: Base, peft: PeftConfig, train: TrainConfig, machine: Machine, seed: int
) -> dict[str, Any]:
    """What the weights depend on: data, base, settings, precision, ranks, seed and library versions."""
    return {
        "version": 1,
        "tokens": tokens_key,
        "base": base.identity,
        "peft": peft.model_dump(),
        "train": train.model_dump(exclude={"allow_truncated_completion"}),
        "machine": machine.numerics(),
        "seed": seed,
        "libraries": {name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate")},
    }


def make(
    store: Store,
    tokens: Tokenized,
    base: Base,
    peft: PeftConfig,
    train: TrainConfig,
    machine: Machine,
    seed: int,
    environment: Mapping[str, str],
) -> Trained:
    """Train, or find what was trained; a run that was killed goes on from its last complete checkpoint."""
    key = inputs(tokens.stage.key, base, peft, train, machine, seed)

    def build(folder: Path) -> None:
        if _shared(store, key, folder, train):
            return
        for left in folder.glob("checkpoint-*"):
            if not (left / COMPLETE).is_file():  # cut off while it was written
                shutil.rmtree(left)
        if found := complete(folder):
            log.info("train: goes on from %s", found[-1].name)
        arguments = {
            "tokens": str(tokens.stage.path.resolve()),
            "base": str(base.path.resolve()),
            "trust_remote_code": base.trust_remote_code,
            "chat_template": base.chat_template,
            "peft": peft.model_dump(),
            "train": train.model_dump(),
            "machine": machine.as_dict(),
            "seed": seed,
            "counts": tokens.counts,
            "report_to": ["wandb"] if "WANDB_PROJECT" in environment else [],
        }
        child(
            "sftlab.stages.train",
            folder,
            arguments,
            processes=machine.num_processes,
            environment={**machine.environment(), **environment},
        )
        if not complete(folder):
            raise StageError("train: ended without a checkpoint; see its output above")
        # A longer job of the same constant schedule may go on from the last checkpoint; from others nothing will.
        for checkpoint in complete(folder)[: -1 if prefix_is_exact(train) else None]:
            for name in [*OPTIMIZER_FILES, *(file.name for file in checkpoint.glob("rng_state*.pth"))]:
                (checkpoint / name).unlink(missing_ok=True)

    return Trained(store.stage("train", key, build, resumable=True))


def prefix_is_exact(train: TrainConfig) -> bool:
    """Whether k epochs of a longer job are the k-epoch job, weight for weight.

    They are if the learning rate at a step does not depend on how many steps there will be: constant,
    after a warm-up of a set number of steps (not a share of all).
    """
    constant = train.lr_scheduler_type == "constant" or (
        train.lr_scheduler_type == "constant_with_warmup" and (train.warmup_steps >= 1 or train.warmup_steps == 0)
    )
    return constant and train.save_total_limit is None


def _shared(store: Store, key: Mapping[str, Any], folder: Path, train: TrainConfig) -> bool:
    """Fill ``folder`` from a job that differs in its number of epochs only, where that is exact.

    From a longer job everything is taken, and True returned: there is nothing left to train. Of the
    longest shorter one the last checkpoint is taken, for training to go on from.
    """
    if not prefix_is_exact(train):
        return False
    others = [
        (int(manifest["inputs"]["train"]["num_train_epochs"]), path)
        for path, manifest in store.finished("train")
        if _but_epochs(manifest["inputs"]) == _but_epochs(key)
    ]
    longer = sorted(other for other in others if other[0] > train.num_train_epochs)
    shorter = sorted(other for other in others if other[0] < train.num_train_epochs)
    if longer:
        epochs, source = longer[0]
        shutil.rmtree(folder)
        folder.mkdir()
        for checkpoint in complete(source):
            if json.loads((checkpoint / COMPLETE).read_text("utf-8"))["epoch"] <= train.num_train_epochs:
                shutil.copytree(checkpoint, folder / checkpoint.name, copy_function=os.link)
        history = read_jsonl(source / "metrics.jsonl")
        write_jsonl(folder / "metrics.jsonl", (row for row in history if row["epoch"] <= train.num_train_epochs))
        receipt = json.loads((source / "receipt.json").read_text("utf-8"))
        steps = json.loads((complete(folder)[-1] / COMPLETE).read_text("utf-8"))["step"]
        write_json(
            folder / "receipt.json",
            {**receipt, "optimizer_steps": steps, "train_seconds": 0.0, "prefix_of_epochs": epochs},
        )
        log.info("train: is a prefix of a finished job of %d epochs with the same constant schedule", epochs)
        return True
    if shorter and not complete(folder):
        epochs, source = shorter[-1]
        for checkpoint in complete(source):
            shutil.copytree(checkpoint, folder / checkpoint.name, dirs_exist_ok=True)
        log.info("train: goes on from a finished job of %d epochs with the same constant schedule", epochs)
    return False


def _but_epochs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {**inputs, "train": {**inputs["train"], "num_train_epochs": None}}


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, by step."""
    found = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


# ------------------------------------------------------------------- in the child process


def run(folder: Path, given: dict[str, Any]) -> None:
    """Train in this process, which may be one of several ranks."""
    from datasets import load_from_disk
    from transformers import PrinterCallback, ProgressCallback, set_seed
    from trl import SFTConfig

    from sftlab.trainer import Checkpoints, Metrics, Progress, Trainer

    if given["report_to"]:
        os.environ["WANDB_MODE"] = os.environ["SFTLAB_WANDB_MODE"]
    machine = Machine(**given["machine"])
    train = TrainConfig.model_validate(given["train"])
    peft = _peft(given["peft"])
    base = Base("base", Path(given["base"]), "", given["trust_remote_code"], given["chat_template"])
    set_seed(given["seed"])
    try:
        arguments = SFTConfig(**_arguments(folder, train, machine, given["seed"], given["report_to"]))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train: SFTConfig refuses these settings: {error}") from error
    model = _model(base, peft, train, machine)
    resumed = complete(folder)
    earlier = json.loads((resumed[-1] / COMPLETE).read_text("utf-8"))["seconds"] if resumed else 0.0
    checkpoints = Checkpoints(earlier)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=load_from_disk(str(Path(given["tokens"]) / "train")),
        eval_dataset=load_from_disk(str(Path(given["tokens"]) / "validation")),
        processing_class=base.tokenizer(),
        peft_config=lora_config(peft),
        callbacks=[checkpoints, Metrics(folder / "metrics.jsonl")],
    )
    checkpoints.trainer = trainer
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    trainer.add_callback(Progress())
    result = trainer.train(resume_from_checkpoint=str(resumed[-1]) if resumed else None)
    checksums = _checksums(trainer)
    if len(set(checksums)) > 1:
        raise StageError(
            f"train: the ranks' weights differ after training (checksums {checksums}): gradients were not shared, and "
            "no checkpoint of this run can be trusted; please report it with the versions in run.json"
        )
    if trainer.is_world_process_zero():
        receipt = _receipt(trainer, train, machine, given["counts"], result.metrics)
        write_json(folder / "receipt.json", receipt | {"rank_checksums": checksums})


def _checksums(trainer: Any) -> list[float]:
    """For each rank a sum over its trained weights: equal, to the last bit, where they are the same."""
    import torch

    weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    total = torch.stack([weight.detach().double().abs().sum() for weight in weights]).sum()
    checksums: list[float] = trainer.accelerator.gather(total.reshape(1)).tolist()
    return checksums


def _arguments(folder: Path, train: TrainConfig, machine: Machine, seed: int, report_to: list[str]) -> dict[str, Any]:
    own = train.model_dump(exclude={"extra", "allow_truncated_completion", "global_batch_size"})
    steps = own.pop("warmup_steps")
    return {
        **own,
        "warmup_steps": steps if steps < 1 else int(steps),
        "gradient_accumulation_steps": machine.accumulation(train),
        "output_dir": str(folder),
        "seed": seed,
        "data_seed": seed,
        "use_cpu": machine.device == "cpu",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        # Keeps the best checkpoint among those that save_total_limit leaves.
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "report_to": report_to,
        "completion_only_loss": None,
        # The rows have their labels. Only packing is left for TRL to do.
        "dataset_kwargs": None if train.packing else {"skip_prepare_dataset": True},
        "eval_packing": False,
        "dataloader_pin_memory": machine.device != "cpu",
        **train.extra,
    }


def _peft(values: dict[str, Any]) -> PeftConfig:
    from pydantic import TypeAdapter

    made: PeftConfig = TypeAdapter(PeftConfig).validate_python(values)
    return made


def lora_config(peft: PeftConfig) -> Any:
    """Peft's LoraConfig for a method, or None for full fine-tuning."""
    from peft import LoraConfig

    match peft:
        case NoPeft():
            return None
        case Lora() | Qlora():
            return LoraConfig(
                task_type="CAUSAL_LM",
                r=peft.r,
                lora_alpha=peft.lora_alpha,
                lora_dropout=peft.lora_dropout,
                target_modules=peft.target_modules,
                use_rslora=peft.use_rslora,
                use_dora=peft.use_dora,
            )


def _model(base: Base, peft: PeftConfig, train: TrainConfig, machine: Machine) -> Any:
    import torch

    from sftlab.models import load

    options: dict[str, Any] = {"attn_implementation": machine.attn_implementation}
    # Frozen weights may be rounded; weights that are trained need all of their digits.
    frozen = not isinstance(peft, NoPeft)
    if isinstance(peft, Qlora):
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=peft.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=peft.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16 if train.bf16 else torch.float32,
        )
    model = load(
        base.path,
        dtype="bfloat16" if frozen and train.bf16 else "float32",
        trust_remote_code=base.trust_remote_code,
        **options,
    )
    model.config.use_cache = False
    return model


def _receipt(
    trainer: Any, train: TrainConfig, machine: Machine, counts: dict[str, Any], metrics: dict[str, float]
) -> dict[str, Any]:
    """What took effect, read off the model and the trainer and not off the settings."""
    import resource

    parameters = list(trainer.model.parameters())
    modules = [type(module).__module__ for module in trainer.model.modules()]
    config = trainer.model.config.get_text_config()
    seconds = metrics.get("train_runtime", 0.0)
    return {
        "parameters": sum(_size(parameter) for parameter in parameters),
        "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        # By their library: peft's wrapper around each of them has the same name.
        "quantized_layers": sum(module.startswith("bitsandbytes") for module in modules),
        "attn_implementation": config._attn_implementation,
        "liger_modules": sum("liger" in module for module in modules),
        "loss": "nll of completion tokens" + (", head on target positions" if machine.device == "cpu" else ", chunked"),
        # Of frozen weights where there are any: adapters are trained in fp32 whatever the base is in.
        "base_dtype": str(min(parameters, key=lambda parameter: parameter.requires_grad).dtype),
        "autocast": "bfloat16" if train.bf16 else None,
        "effective_batch": trainer.args.per_device_train_batch_size
        * trainer.args.gradient_accumulation_steps
        * trainer.args.world_size,
        "optimizer_steps": trainer.state.global_step,
        "supervised_tokens": counts["train"]["supervised"],
        "supervised_share": round(counts["train"]["supervised"] / counts["train"]["tokens"], 4),
        "truncated_rows": {split: counts[split]["truncated"] for split in ("train", "validation")},
        "left_out_rows": {split: counts[split]["left_out"] for split in ("train", "validation")},
        "prompt_bos": counts["prompt_bos"],
        "device": machine.device,
        "num_processes": trainer.args.world_size,
        "train_seconds": round(seconds, 1),
        "tokens_per_second": round(counts["train"]["tokens"] * train.num_train_epochs / seconds, 1)
        if seconds
        else None,
        "peak_memory_gib": round(_peak_memory(machine, resource), 2),
    }


def _size(parameter: Any) -> int:
    # A 4-bit parameter holds two weights in each of its bytes.
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else int(parameter.numel())


def _peak_memory(machine: Machine, resource: Any) -> float:
    if machine.device == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated()) / 2**30
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20


if __name__ == "__main__":
    serve(run)
