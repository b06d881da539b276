"""Token ids → a checkpoint and a validation loss for every epoch, trained in a child process."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import ceil, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import RootModel, TypeAdapter

from sftlab.config import NoPeft, PeftConfig, Qlora, TrainConfig
from sftlab.dataset.tokenize import Tokenized
from sftlab.errors import ConfigError, StageError
from sftlab.instance import meeting
from sftlab.instance.machine import Machine, optimizer_package, peak_flops
from sftlab.model.adapters import keep_inputs, lora_config
from sftlab.model.base import Base, beside_text, decoder_layers
from sftlab.records import Candidate, read_jsonl, write_jsonl
from sftlab.runtime.processes import INPUTS, child, leave_out, serve
from sftlab.runtime.store import Stage, Store, key_of, sync, use, versions, write_json
from sftlab.tracking import wandb as tracking

log = logging.getLogger(__name__)

COMPLETE = "checkpoint.json"
MACHINES = "machines.json"
RECEIPT = "receipt.json"
# What a checkpoint needs only to go on training.
OPTIMIZER_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "optimizer.bin", "pytorch_model_fsdp.bin")


class TrainTask(RootModel[dict[str, Any]]):
    """The task of the training process."""


@dataclass(frozen=True)
class Trained:
    """The finished stage: ``checkpoint-*`` folders, ``metrics.jsonl`` and ``receipt.json``."""

    stage: Stage

    @property
    def receipt(self) -> dict[str, Any]:
        """What took effect in training."""
        receipt: dict[str, Any] = json.loads((self.stage.path / RECEIPT).read_text("utf-8"))
        return receipt

    def metrics(self) -> list[dict[str, Any]]:
        """Everything that the trainer logged, in order."""
        return list(read_jsonl(self.stage.path / "metrics.jsonl"))

    def candidates(self, job: int, overrides: list[str]) -> list[Candidate]:
        """The checkpoints that exist and were evaluated, in the order of their steps."""
        rows = [(json.loads((path / COMPLETE).read_text("utf-8")), path) for path in complete(self.stage.path)]
        return [
            Candidate(**row, checkpoint=str(path), job=job, overrides=overrides)
            for row, path in rows
            if row["eval_loss"] is not None and isfinite(row["eval_loss"])
        ]


def inputs(
    tokens_key: str, base: Base, peft: PeftConfig, train: TrainConfig, machine: Machine, seed: int
) -> dict[str, Any]:
    """What the weights depend on: data, base, settings, precision, ranks, seed and library versions.

    They do not depend on gradient checkpointing, which computes the same numbers twice.
    """
    assert train.bf16 != "auto"  # a choice that was made is part of the key
    return {
        "version": 4,
        "tokens": tokens_key,
        "base": base.identity,
        "peft": peft.model_dump(),
        "train": train.model_dump(exclude={"allow_truncated_completion", "gradient_checkpointing"}),
        "machine": machine.numerics(),
        "seed": seed,
        "libraries": versions("torch", "transformers", "trl", "accelerate", *_optional(peft, train, machine)),
    }


def _optional(peft: PeftConfig, train: TrainConfig, machine: Machine) -> list[str]:
    """The packages that decide the weights with these settings and not with others."""
    used = {
        "peft": not isinstance(peft, NoPeft),
        "bitsandbytes": isinstance(peft, Qlora),
        "liger-kernel": train.use_liger_kernel,
        "flash-attn": machine.attn_implementation == "flash_attention_2",
        "datasets": train.packing,  # TRL packs by its tables
    }
    package = optimizer_package(train.optim)
    return sorted({name for name, is_used in used.items() if is_used} | ({package} if package else set()))


def make(
    store: Store,
    tokens: Tokenized,
    base: Base,
    peft: PeftConfig,
    train: TrainConfig,
    machine: Machine,
    seed: int,
    environment: Mapping[str, str],
) -> Trained | None:
    """Train, or find what was trained; a run that was killed goes on from its last complete checkpoint.

    None on a machine that is not the first of several: what its ranks trained is on the first.
    """
    key = inputs(tokens.stage.key, base, peft, train, machine, seed)

    def ranks(folder: Path, checkpoints: Path) -> None:
        arguments = {
            "stage": key,
            "checkpoints": str(checkpoints),
            "tokens": str(tokens.stage.path.resolve()),
            "base": str(base.path.resolve()),
            "trust_remote_code": base.trust_remote_code,
            "chat_template": base.chat_template,
            "peft": peft.model_dump(),
            "train": train.model_dump(),
            "machine": asdict(machine),
            "seed": seed,
            "counts": tokens.counts,
            "report_to": ["wandb"] if "WANDB_PROJECT" in environment else [],
        }
        child(
            "sftlab.train.stage",
            folder,
            TrainTask(arguments),
            launcher=machine.launcher(),
            environment={**machine.training_environment(), **environment},
            grace_seconds=machine.grace_seconds,
        )

    def tell_others(*, to_train: bool) -> None:
        if machine.nnodes > 1:
            meeting.tell(machine, key_of(key), train=to_train)

    def build(folder: Path) -> None:
        for left in folder.glob("checkpoint-*"):
            if not (left / COMPLETE).is_file():  # interrupted while it was written, so no training has ended here
                shutil.rmtree(left)
                (folder / RECEIPT).unlink(missing_ok=True)
        if not (folder / RECEIPT).is_file():  # which is written last
            if _shared(store, key, folder, train):
                tell_others(to_train=False)
                return
            if not complete(folder):
                _take_over(store, key, folder, train, machine)
            if found := [checkpoint for checkpoint in complete(folder) if _resumable(checkpoint)]:
                log.info("train: resumes from %s", found[-1].name)
            tell_others(to_train=True)
            ranks(folder, folder)
        else:
            tell_others(to_train=False)
        receipt = json.loads((folder / RECEIPT).read_text("utf-8"))
        kept = any(map(_evaluated, complete(folder)))
        if not kept:
            (folder / RECEIPT).unlink()  # what ended without a checkpoint may be trained again
        if (step := receipt.get("diverged_at_step")) is not None:
            _diverged(step, train, kept=kept)
        if not kept:
            raise StageError("train: ended without a checkpoint; see its output above")
        # Another job may go on from where the schedule does not yet depend on the number of epochs, until the sweep
        # is decided. From the other checkpoints nothing will.
        forks = set() if decay_steps(train) is None else set(_forks(folder, train))
        for checkpoint in complete(folder):
            if _step(checkpoint) in forks:
                continue
            if _evaluated(checkpoint):
                _forget_optimizer(checkpoint)
            else:  # where SIGTERM came
                shutil.rmtree(checkpoint)

    if machine.node_rank > 0:
        final = store.path("train", key)
        if meeting.ask(machine, final.name):
            with TemporaryDirectory(prefix="sftlab-") as name:
                ranks(Path(name), final.with_name(final.name + ".partial"))
        else:
            log.info("train: there is nothing to train; machine 0 has it already")
        return None
    stage = store.stage("train", key, build, resumable=True)
    if stage.cached:
        tell_others(to_train=False)
    return Trained(stage)


def _diverged(step: int, train: TrainConfig, *, kept: bool) -> None:
    """Say that a training was ended because its loss was no number any more.

    Raises:
        StageError: there is no checkpoint from before.
    """
    message = (
        f"train: diverged: the validation loss after step {step} is not a finite number; set a lower "
        f"train.learning_rate (it is {train.learning_rate:g}) or more train.warmup_steps"
    )
    if not kept:
        raise StageError(message)
    log.warning("%s. What comes later was not trained; the checkpoints before may still be kept", message)


def steps(tokens: Tokenized, train: TrainConfig, machine: Machine) -> int | None:
    """Optimizer steps of a job; None where packing decides how many sequences there are."""
    if train.packing:
        return None
    rows = int(tokens.counts["train"]["rows"])
    batches = ceil(rows / (train.per_device_train_batch_size * machine.world_size))
    return train.num_train_epochs * ceil(batches / machine.accumulation(train))


def check_schedule(tokens: Tokenized, train: TrainConfig, machine: Machine) -> None:
    """Refuse a schedule whose warm-up and decay are longer than the job.

    Raises:
        ConfigError: they are; transformers would leave out a part of them without a word.
    """
    total = steps(tokens, train, machine)
    if train.lr_scheduler_type != "warmup_stable_decay" or total is None:
        return
    decay = int(train.lr_scheduler_kwargs["num_decay_steps"])
    warmup = train.warmup_steps if train.warmup_steps >= 1 else train.warmup_steps * total
    if warmup + decay > total:
        raise ConfigError(
            f"train.lr_scheduler_kwargs.num_decay_steps={decay}: with {warmup:g} steps of warm-up this is longer than "
            f"the job, which has {total} steps; "
            + (f"set it to at most {int(total - warmup)}" if total - warmup >= 1 else "lower train.warmup_steps")
            + ", or train longer"
        )


def decay_steps(train: TrainConfig) -> int | None:
    """Optimizer steps at a job's end on which its learning rate depends on how long the job is.

    Before them two jobs that differ in ``num_train_epochs`` only are the same job, weight for weight:
    the shorter one can be taken from the longer, or the longer go on from the shorter. 0 for a constant
    schedule; the decay of ``warmup_stable_decay``; None where all steps depend on it (cosine, linear, a
    warm-up that is a share of the steps), and where checkpoints are deleted.
    """
    if train.save_total_limit is not None:
        return None
    warmup_is_share = 0 < train.warmup_steps < 1
    match train.lr_scheduler_type:
        case "constant":  # without a warm-up, whatever is set for one
            return 0
        case "constant_with_warmup" if not warmup_is_share:
            return 0
        case "warmup_stable_decay" if not warmup_is_share:
            return int(train.lr_scheduler_kwargs["num_decay_steps"])
    return None


def family(inputs: Mapping[str, Any], train: TrainConfig) -> str | None:
    """The same text for all jobs that share their steps; None for a job that shares none."""
    return None if decay_steps(train) is None else key_of(_but_epochs(inputs))


def release(store: Store, path: Path) -> None:
    """Delete what a finished training kept for others to go on from.

    These are its optimizer states, and the checkpoints that have no validation loss.
    """
    with store.lock("train", path.name):
        for checkpoint in complete(path):
            if _evaluated(checkpoint):
                _forget_optimizer(checkpoint)
            else:
                shutil.rmtree(checkpoint)


def _shared(store: Store, key: Mapping[str, Any], folder: Path, train: TrainConfig) -> bool:
    """Take from a finished job that differs in its number of epochs all that this one has in common with it.

    True if nothing is left to train. Otherwise the folder has the checkpoints up to the last common
    one, for training to go on from.
    """
    decay = decay_steps(train)
    if decay is None:
        return False
    offers = []
    for path, manifest in store.finished("train"):
        if _but_epochs(manifest["inputs"]) != _but_epochs(key):
            continue
        epochs = int(manifest["inputs"]["train"]["num_train_epochs"])
        an_epoch = _an_epoch(path)
        last = min(epochs, train.num_train_epochs) * an_epoch - decay
        common = [checkpoint for checkpoint in complete(path) if _step(checkpoint) <= last]
        whole = bool(common) and _step(common[-1]) == train.num_train_epochs * an_epoch
        while common and not whole and not _resumable(common[-1]):
            common.pop()
        if common:
            offers.append((whole, _step(common[-1]), epochs, path, common))
    if not offers:
        return False
    whole, step, epochs, source, common = max(offers, key=lambda offer: (offer[:2], -offer[2]))
    if not whole and (mine := complete(folder)) and _step(mine[-1]) >= step:
        return False  # it was killed beyond that
    use(store.root, source.name)
    with store.lock("train", source.name):
        if not common[-1].is_dir() or (not whole and not _resumable(common[-1])):
            return False  # deleted, or released by another sweep that is done with it
        shutil.rmtree(folder)
        folder.mkdir()
        for checkpoint in common:
            # Under its own name only when it is whole. A prefix stays as it is; what is trained on may be written to.
            copied = folder / "copy.partial"
            shutil.copytree(checkpoint, copied, copy_function=os.link if whole else shutil.copy2)
            if whole:
                _forget_optimizer(copied)
            copied.rename(folder / checkpoint.name)
    log.info("train: has its first %d steps in common with a finished job of %d epochs", step, epochs)
    if whole:
        history = read_jsonl(source / "metrics.jsonl")
        write_jsonl(folder / "metrics.jsonl", (row for row in history if row["epoch"] <= train.num_train_epochs))
        receipt = json.loads((source / RECEIPT).read_text("utf-8"))
        new = {"optimizer_steps": step, "train_seconds": 0.0, "diverged_at_step": None}
        write_json(folder / RECEIPT, {**receipt, **new})
    return whole


def _take_over(store: Store, key: dict[str, Any], folder: Path, train: TrainConfig, machine: Machine) -> None:
    """Go on with what a killed run left that is the same experiment on another machine.

    That is one with the same effective batch, and hence the same steps. ``machines.json`` tells which
    steps were trained elsewhere.
    """
    for path in store.abandoned("train"):
        if not (path / INPUTS).is_file() or not (found := [one for one in complete(path) if _resumable(one)]):
            continue
        given = json.loads((path / INPUTS).read_text("utf-8"))
        if _but_machine(given["stage"]) != _but_machine(key):
            continue
        other, settings = Machine(**given["machine"]), TrainConfig.model_validate(given["train"])
        same_steps = other.effective_batch(settings) == machine.effective_batch(train)
        if not same_steps or other.strategy != machine.strategy:
            continue
        log.info("train: takes over a run that was killed on another machine (%s)", other.name)
        earlier = json.loads((path / MACHINES).read_text("utf-8")) if (path / MACHINES).is_file() else []
        write_json(folder / MACHINES, [*earlier, {"until_step": _step(found[-1]), **other.numerics()}])
        for checkpoint in complete(path):
            checkpoint.rename(folder / checkpoint.name)
        shutil.rmtree(path)
        return


def _but_machine(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A training's inputs without what may differ between machines that make the same steps."""
    free = {
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
        "global_batch_size", "use_liger_kernel",
    }  # fmt: skip
    train = {name: value for name, value in inputs["train"].items() if name not in free}
    return {**inputs, "train": train, "machine": None}


def _forks(folder: Path, train: TrainConfig) -> list[int]:
    """The steps at which a job of each smaller or equal number of epochs leaves what it has in common with others."""
    an_epoch = _an_epoch(folder)
    decay = decay_steps(train) or 0
    # From a constant job a shorter one is a copy: only a longer one goes on, from the end.
    first = 1 if decay else train.num_train_epochs
    return [epochs * an_epoch - decay for epochs in range(first, train.num_train_epochs + 1)]


def _an_epoch(folder: Path) -> int:
    """Steps of an epoch, by the last checkpoint that ended one: a training that diverged has not all of them."""
    last = [checkpoint for checkpoint in complete(folder) if _evaluated(checkpoint)][-1]
    epoch: float = json.loads((last / COMPLETE).read_text("utf-8"))["epoch"]
    return _step(last) // round(epoch)


def _but_epochs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {**inputs, "train": {**inputs["train"], "num_train_epochs": None}}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _evaluated(checkpoint: Path) -> bool:
    return bool(json.loads((checkpoint / COMPLETE).read_text("utf-8"))["eval_loss"] is not None)


def _resumable(checkpoint: Path) -> bool:
    return any((checkpoint / name).is_file() for name in ("optimizer.pt", "optimizer.bin"))  # the latter is FSDP's


def _forget_optimizer(checkpoint: Path) -> None:
    for name in [*OPTIMIZER_FILES, *(file.name for file in checkpoint.glob("rng_state*.pth"))]:
        (checkpoint / name).unlink(missing_ok=True)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, by step."""
    return sorted((path for path in folder.glob("checkpoint-*") if (path / COMPLETE).is_file()), key=_step)


# ------------------------------------------------------------------- in the child process


def run(folder: Path, task: TrainTask) -> None:
    """Train in this process, which may be one of several ranks."""
    given = task.root
    optim = given["train"]["optim"]
    quantised = given["peft"]["method"] == "qlora" or any(word in optim for word in ("bit", "bnb", "paged", "ademamix"))
    leave_out(*([] if quantised else ["bitsandbytes"]), *([] if given["report_to"] else ["wandb"]))

    from datasets import load_from_disk
    from transformers import PrinterCallback, ProgressCallback, set_seed
    from trl import SFTConfig

    from sftlab.train.trainer import Checkpoints, Curves, DivergedError, Metrics, Progress, StepTimes, Trainer

    if given["report_to"] and os.environ.get("RANK", "0") == "0":
        tracking.begin(os.environ["SFTLAB_WANDB_MODE"])
    machine = Machine(**given["machine"])
    train = TrainConfig.model_validate(given["train"])
    peft: PeftConfig = TypeAdapter(PeftConfig).validate_python(given["peft"])
    base = Base("base", Path(given["base"]), "", given["trust_remote_code"], given["chat_template"])
    set_seed(given["seed"])
    try:
        arguments = SFTConfig(**_arguments(folder, train, machine, given["seed"]))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train: SFTConfig refuses these settings: {error}") from error
    resumed = [checkpoint for checkpoint in complete(Path(given["checkpoints"])) if _resumable(checkpoint)]
    if train.use_liger_kernel:
        _check_liger(base)
    if machine.nnodes > 1:
        _agree(given, _step(resumed[-1]) if resumed else 0)
    model = _model(base, peft, train, machine)
    _distribute(arguments, model, base, train)
    earlier = json.loads((resumed[-1] / COMPLETE).read_text("utf-8"))["seconds"] if resumed else 0.0
    checkpoints = Checkpoints(earlier, decay_steps(train), train.save_total_limit)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=load_from_disk(str(Path(given["tokens"]) / "train")),
        eval_dataset=load_from_disk(str(Path(given["tokens"]) / "validation")),
        processing_class=base.tokenizer(),
        peft_config=lora_config(peft, model),
        callbacks=[checkpoints, step_times := StepTimes(), Metrics(folder / "metrics.jsonl")],
    )
    if train.bf16:
        keep_inputs(trainer.model)
    checkpoints.trainer, trainer.checkpoints = trainer, checkpoints
    signal.signal(signal.SIGTERM, checkpoints.terminate)
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    trainer.add_callback(Progress())
    if given["report_to"]:
        trainer.add_callback(Curves())
    seconds = 0.0
    with suppress(DivergedError):  # shown by diverged_at_step too
        result = trainer.train(resume_from_checkpoint=str(resumed[-1]) if resumed else None)
        seconds = result.metrics["train_runtime"]
    diverged = checkpoints.diverged_at_step
    checksums = _checksums(trainer) if diverged is None else []
    if len(set(checksums)) > 1:
        raise StageError(
            f"train: the ranks' weights differ after training (checksums {checksums}): gradients were not shared, and "
            "no checkpoint of this run can be trusted; please report it with the versions in run.json"
        )
    if trainer.is_world_process_zero():
        share = (trainer.state.global_step - (_step(resumed[-1]) if resumed else 0)) / trainer.state.max_steps
        receipt = _receipt(trainer, train, machine, given["counts"], seconds, share)
        elsewhere = json.loads((folder / MACHINES).read_text("utf-8")) if (folder / MACHINES).is_file() else []
        ending = {
            "step_seconds": step_times.median,
            "rank_checksums": checksums,
            "earlier_machines": elsewhere,
            "diverged_at_step": diverged,
        }
        sync(folder)  # with the receipt on the disk, all of the training is
        write_json(folder / RECEIPT, receipt | ending)
    # A rank that ends with its connections open is sometimes ended by SIGABRT on its way out.
    trainer.accelerator.end_training()


def _check_liger(base: Base) -> None:
    """Raise a ConfigError for a model that Liger has no kernels for: transformers would train without a word."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(base.path, trust_remote_code=base.trust_remote_code).model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(
            f"train.use_liger_kernel=true: Liger has no kernels for {kind} models; set train.use_liger_kernel=false"
        )


def _agree(given: dict[str, Any], step: int) -> None:
    """Make sure that all machines train the same rows in the same way, from the same step.

    Raises:
        ConfigError: they do not.
    """
    from accelerate.utils import gather_object

    mine = key_of({name: given[name] for name in ("peft", "train", "seed", "counts")})
    found = gather_object([(mine, step)])
    if len({key for key, _ in found}) > 1:
        raise ConfigError(
            "instance.nnodes: the machines were given different rows or settings; start the same command on each, "
            "with the same data, and only instance.node_rank different"
        )
    if len({step for _, step in found}) > 1:
        raise ConfigError(
            f"instance.nnodes: not every machine sees the checkpoints to go on from ({given['checkpoints']}); set "
            "store= to a folder that all machines share, or delete this one to begin anew"
        )


def _checksums(trainer: Any) -> list[float]:
    """For each rank a sum over its trained weights: equal, to the last bit, where they are the same."""
    import torch

    weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    total = torch.stack([weight.detach().double().abs().sum() for weight in weights]).sum()
    if isinstance(total, torch.distributed.tensor.DTensor):  # of FSDP, which shares the weights out
        total = total.full_tensor()
    checksums: list[float] = trainer.accelerator.gather(total.reshape(1)).tolist()
    return checksums


def _arguments(folder: Path, train: TrainConfig, machine: Machine, seed: int) -> dict[str, Any]:
    own = train.model_dump(exclude={"extra", "allow_truncated_completion", "global_batch_size", "save_total_limit"})
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
        # What a schedule that follows the validation loss looks at. (Checkpoints keeps to save_total_limit.)
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "report_to": [],
        "completion_only_loss": None,
        # The rows have their labels. Only packing is left for TRL to do.
        "dataset_kwargs": None if train.packing else {"skip_prepare_dataset": True},
        "eval_packing": False,
        "dataloader_pin_memory": machine.device != "cpu",
        # TRL does not enforce it on rows that are joined without packing; they were truncated before.
        **({"max_length": None} if train.extra.get("padding_free") and not train.packing else {}),
        **(_fsdp(train) if machine.strategy == "fsdp" else {}),
        **train.extra,
    }


def _fsdp(train: TrainConfig) -> dict[str, Any]:
    """FSDP2. Its checkpoints are whole, as without it: selection and merging need not know of it."""
    config = {
        "version": 2,
        "state_dict_type": "FULL_STATE_DICT",
        "activation_checkpointing": bool(train.gradient_checkpointing),
    }
    return {"fsdp": True, "fsdp_config": config, "gradient_checkpointing": False}


def _distribute(arguments: Any, model: Any, base: Base, train: TrainConfig) -> None:
    """Set what DDP and FSDP need to know of the loaded model, unless train.extra sets it.

    FSDP shards the layers of the text decoder one by one; by default it asks for classes that a model does not have
    (Gemma 3's vision tower). It leaves outputs as they are: cast to bfloat16, log-probabilities would be rounded.
    Gradients are summed in float32, as DDP does. DDP need not search for parameters without a gradient, except in
    mixtures of experts, of which a step may leave one out, and in models with code of their own.
    """
    if arguments.fsdp:
        import torch
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin = arguments.fsdp_plugin_args
        layers = {type(layer).__name__ for layer in decoder_layers(model)}
        plugin.setdefault("transformer_cls_names_to_wrap", ",".join(sorted(layers)))
        if train.bf16 and plugin["fsdp_version"] == 2:
            plugin["mixed_precision_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
    if arguments.ddp_find_unused_parameters is None:
        experts = any(".experts." in name for name, _ in model.named_parameters())
        arguments.ddp_find_unused_parameters = experts or base.trust_remote_code


def _model(base: Base, peft: PeftConfig, train: TrainConfig, machine: Machine) -> Any:
    import torch

    from sftlab.model.base import load

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
    try:
        model = load(
            base.path,
            dtype="bfloat16" if frozen and train.bf16 else "float32",
            trust_remote_code=base.trust_remote_code,
            **options,
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"model: cannot be loaded with instance.attn_implementation={machine.attn_implementation} and "
            f"peft.method={peft.method}: {error}; change one of them"
        ) from error
    model.config.use_cache = False
    for name in beside_text(model):
        model.base_model.get_submodule(name).requires_grad_(False)
    return model


def _receipt(
    trainer: Any, train: TrainConfig, machine: Machine, counts: dict[str, Any], seconds: float, share: float
) -> dict[str, Any]:
    """What took effect, read off the model and the trainer and not off the settings.

    ``seconds`` is the time of this process, which took ``share`` of the job's steps.
    """
    import resource

    parameters = list(trainer.model.parameters())
    modules = list(trainer.model.modules())
    config = trainer.model.config.get_text_config()
    head = output_head(trainer)
    supervised = counts["train"]["supervised"] / counts["train"]["tokens"]
    flops = flops_per_token(trainer.model, 1.0 if head == "whole logits" else supervised)
    size = sum(_size(parameter) for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    tokens = counts["train"]["tokens"] * train.num_train_epochs * share
    speed = tokens / seconds if seconds and share else None
    return {
        "parameters": size,
        "trainable_parameters": trained,
        # By their library: peft's wrapper around each of them has the same name.
        "quantized_layers": sum(type(module).__module__.startswith("bitsandbytes") for module in modules),
        "attn_implementation": config._attn_implementation,
        "padding_mask": trainer.padding_mask,
        "gradient_checkpointing": checkpointed(trainer.model),
        "liger_modules": liger_modules(trainer.model),
        "loss": f"{trainer.args.loss_type} of completion tokens, {head}",
        "optimizer_state": _state_types(trainer.optimizer),
        # Of frozen weights where there are any: adapters are trained in fp32 whatever the base is in.
        "base_dtype": str(min(parameters, key=lambda parameter: parameter.requires_grad).dtype),
        "autocast": "bfloat16" if train.bf16 else None,
        "effective_batch": trainer.args.per_device_train_batch_size
        * trainer.args.gradient_accumulation_steps
        * trainer.args.world_size,
        "optimizer_steps": trainer.state.global_step,
        "supervised_tokens": counts["train"]["supervised"],
        "supervised_share": round(supervised, 4),
        "truncated_rows": {split: counts[split]["truncated"] for split in ("train", "validation")},
        "left_out_rows": {split: counts[split]["left_out"] for split in ("train", "validation")},
        "prompt_bos": counts["prompt_bos"],
        "device": machine.device,
        "num_processes": trainer.args.world_size,
        "strategy": "fsdp" if trainer.is_fsdp_enabled else "ddp",
        "find_unused_parameters": getattr(trainer.model_wrapped, "find_unused_parameters", None),
        "train_seconds": round(seconds, 1),
        "tokens_per_second": None if speed is None else round(speed, 1),
        "tokens_per_second_per_device": None if speed is None else round(speed / trainer.args.world_size, 1),
        "flops_per_token": round(flops),
        "mfu": _utilization(flops, speed, trainer.args.world_size, machine),
        "peak_memory_gib": round(_peak_memory(machine, resource), 2),
    }


def _state_types(optimizer: Any) -> list[str]:
    """The number formats of what the optimizer keeps for each weight, such as ``uint8`` of an 8-bit one."""
    states = (state for kept in optimizer.state.values() for state in kept.values())
    return sorted({str(state.dtype).removeprefix("torch.") for state in states if getattr(state, "ndim", 0)})


def checkpointed(model: Any) -> bool:
    """Whether layers keep their inputs only, and are computed again in the backward pass."""
    return any(
        getattr(module, "gradient_checkpointing", False) or type(module).__name__ == "CheckpointWrapper"
        for module in model.modules()
    )


def liger_modules(model: Any) -> int:
    """How many modules of a model run Liger's code."""
    return sum(_from("liger_kernel", module.forward) for module in model.modules())


def output_head(trainer: Any) -> str:
    """What makes log-probabilities of the last hidden states, by the functions that the model has now."""
    if trainer.own_head:
        return "head on target positions"
    if trainer.label_smoother is not None:
        return "whole logits"
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    if _from("trl", model.forward):
        return "chunked"
    return "Liger's kernel" if _from("liger_kernel", model.forward) else "whole logits"


def _from(package: str, function: Any) -> bool:
    """Whether a method, or what it wraps, is a package's code. Liger and TRL replace methods of modules, not modules.

    ``__module__`` does not show it: a wrapper has that of what it wraps.
    """
    while function is not None:
        function = getattr(function, "__func__", function)
        if getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0] == package:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def flops_per_token(model: Any, supervised: float) -> float:
    """Floating-point operations of the model's own arithmetic for a token of training, forward and backward.

    2 for each weight forward, 2 backward for the gradient of its input, and 2 for its own gradient where it is trained
    (6 in full fine-tuning, as in PaLM's appendix B; 4 for weights that adapters are trained beside, and without
    checkpointing 2 below the lowest layer in which anything is trained). The output head is applied to the
    ``supervised`` share of the tokens. Not counted: embeddings, which are looked up; the parts of a model that text
    does not pass through; of a mixture of experts those that a token is not sent to; normalisations, attention scores,
    and what checkpointing computes again.
    """
    from torch import nn

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings().weight
    left_out = {id(weight) for name in beside_text(base) for weight in base.base_model.get_submodule(name).parameters()}
    left_out |= {
        id(part.weight) for part in base.modules() if isinstance(part, nn.Embedding) and part.weight is not head
    }
    config = base.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((size for name in names if (size := getattr(config, name, None))), None)
    routed = (getattr(config, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
    forward_only = set[int]()
    for layer in decoder_layers(base):
        # Checkpointing makes the embeddings' output require a gradient.
        if base.is_gradient_checkpointing or any(weight.requires_grad for weight in layer.parameters()):
            break
        forward_only |= {id(weight) for weight in layer.parameters()}
    total = 0.0
    for name, weight in base.named_parameters():
        if id(weight) in left_out or weight.ndim < 2:
            continue
        share = supervised if weight is head else routed if ".experts." in name else 1.0
        operations = 6 if weight.requires_grad else 2 if id(weight) in forward_only else 4
        total += operations * share * _size(weight)
    return total


def _utilization(flops: float, speed: float | None, devices: int, machine: Machine) -> float | None:
    """Model FLOPs utilisation: the share of the GPUs' peak that the model's own arithmetic took; None where unknown.

    A lower bound, because attention scores are not counted.
    """
    if machine.device != "cuda" or speed is None:
        return None
    import torch

    peak = peak_flops(torch.cuda.get_device_name())
    return None if peak is None else round(speed * flops / (devices * peak), 4)


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
    serve(TrainTask, run)
