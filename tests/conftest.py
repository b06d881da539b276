from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from commands import compose_once, parse_yaml_once

# No test may use a network; the hub's library reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

Row = dict[str, Any]

# As Gemma's: the template writes the BOS itself. Turns end in the EOS.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def pytest_collection_finish() -> None:
    """Prepare a process that runs tests: what is imported by now is not looked through in each garbage collection."""
    parse_yaml_once()
    compose_once()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, for the others to run beside them and not before them."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


LONGEST = ("test_vllm.py", "test_evaluate.py", "test_disk.py", "test_faults.py", "test_launchers.py", "test_ranks.py",
           "test_pipeline.py", "test_modes.py", "test_plan.py")  # fmt: skip


PLUGINS = {
    "hydra/launcher=joblib": "hydra_joblib_launcher",
    "hydra/launcher=ray": "hydra_ray_launcher",
    "hydra/launcher=submitit": "hydra_submitit_launcher",
    "hydra/sweeper=optuna": "hydra_optuna_sweeper",
    "demo_optuna": "hydra_optuna_sweeper",
}


def skip_without_plugins(arguments: Iterable[str]) -> None:
    """Skip a test whose command line names a launcher or sweeper that is not installed: each is an extra."""
    for argument in arguments:
        for words, plugin in PLUGINS.items():
            if words in argument:
                pytest.importorskip(f"hydra_plugins.{plugin}", exc_type=ImportError)


def composed(*overrides: str) -> Any:
    """conf/ with these overrides, validated."""
    from sftlab.validation.validate import validate

    return validate(compose(*overrides))


def compose(*overrides: str) -> Any:
    """conf/ with these overrides, without Hydra's own part."""
    from hydra import compose, initialize_config_dir

    from sftlab.hydra_app.compose import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@pytest.fixture
def config() -> Callable[..., Any]:
    """Compose conf/ with these overrides, and validate."""
    return composed


def problem(arguments: list[str]) -> str | None:
    """The message for a command line that is refused before anything runs; None if it is accepted."""
    from hydra.errors import HydraException

    from sftlab.errors import ConfigError
    from sftlab.hydra_app.arguments import options_first, parse_options
    from sftlab.hydra_app.compose import Composer
    from sftlab.hydra_app.wording import explain
    from sftlab.instance import preflight
    from sftlab.validation.validate import validate

    try:
        arguments = options_first(arguments)
        options = parse_options(arguments)
        composer = Composer(options, [])
        overrides = [first(text) if options.multirun else text for text in options.overrides]
        cfg = validate(composer.compose(overrides) if options.config_dir else compose(*overrides))
        preflight.check_mode(cfg)
    except ConfigError as error:
        return str(error)
    except (HydraException, TypeError, ValueError) as error:
        return str(explain(error, arguments))
    return None


def first(argument: str) -> str:
    """An override with the first of its values."""
    from sftlab.validation.overrides import parsed

    read = parsed(argument)
    return argument.partition(",")[0] if read and read.is_sweep_override() else argument


def interruptible() -> None:
    """Let Ctrl-C end a process also where the tests run in the background of a shell, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def vignette(number: int, **changed: Any) -> Row:
    """A row with the columns that conf/dataset/vignettes.yaml reads."""
    return {
        "id": f"row-{number}",
        "question": f"Question {number}: what is it?",
        "options": {"A": "this", "B": "that"},
        "rationale": f"Reason {number}. Therefore, the answer is (A) this.",
        "answer_idx": "A",
        **changed,
    }


def vignettes(count: int) -> list[Row]:
    return [vignette(number) for number in range(count)]


@cache
def training(max_length: int, *, allowed: bool = False, train_on: str = "all") -> Any:
    """A configuration with these settings of tokenising."""
    lengths = [f"train.max_length={max_length}", f"train.allow_truncated_completion={str(allowed).lower()}"]
    return composed("model=tiny_random", *lengths, f"dataset.train_on={train_on}")


class Rendered(NamedTuple):
    """The examples of each split, and by column the subgroups of the test rows."""

    splits: dict[str, list[Any]]
    subgroups: dict[str, Any]


def rendered(cfg: Any, **options: Any) -> Rendered:
    """Render a dataset that is on this machine."""
    from sftlab.dataset.examples import render_examples

    with TemporaryDirectory() as folder:
        result = render_examples(cfg, None, Path(folder), **options)
        return Rendered({name: list(rows) for name, rows in result.splits.items()}, dict(result.subgroups))


def write_rows(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_model(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A folder that looks like a saved model: a real tokenizer, and a file in the place of weights.

    Like Gemma's, the tokenizer adds a BOS to every text that it is asked to complete with special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<system>", "<user>", "<assistant>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Question: what is it? Therefore, the answer is (A) this."], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 2048}), "utf-8")
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return folder
