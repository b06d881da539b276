"""Every key of the configuration with its type. The files in ``conf/`` document the meaning and unit of each key.

Hugging Face field names are unchanged. Types are strict: a string is not converted to a number. The package
``validation`` reports what does not fit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A section of keys: unknown keys are refused, and values are read-only."""

    model_config = ConfigDict(
        hide_input_in_errors=True,
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def located(path: str) -> str:
    """Expand ``~`` and ``~user`` at the start of a path; a hub id or ``wheel:…`` stays as it is.

    Raises:
        PydanticCustomError: the user does not exist, or the path contains a shell variable (``$NAME``).
    """
    try:
        expanded = str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        remedy = "write the full path, or put ./ before a name that starts with ~"
        raise _path_error("there is no such user", remedy) from error
    if (variable := re.search(r"\$\{?(\w+)\}?", path)) and not Path(path).exists():
        in_full = path.replace(variable[0], f"${{oc.env:{variable[1]}}}")
        raise _path_error(f"{variable[0]} is not expanded", f"write {in_full}")
    return expanded


def _path_error(message: str, remedy: str) -> PydanticCustomError:
    return PydanticCustomError("path", "{message}; {remedy}", {"message": message, "remedy": remedy})


def automatic(value: object) -> object:
    """Accept true, false and ``auto``.

    Raises:
        PydanticCustomError: any other value. A union would report an error for each of its types instead.
    """
    if value is True or value is False or value == "auto":
        return value
    raise PydanticCustomError("automatic", "should be true, false or auto")


def interval(value: float) -> float:
    """Accept a whole number of steps, or a share of an epoch below 1.

    Raises:
        PydanticCustomError: a fraction of a step.
    """
    if value > 1 and value % 1:
        raise PydanticCustomError("interval", "should be a whole number of steps, or below 1 a share of an epoch")
    return value


def ends(values: list[float]) -> list[float]:
    """Accept two different ends of a range.

    Raises:
        PydanticCustomError: both are the same.
    """
    if values[0] == values[1]:
        raise PydanticCustomError("range", "should be two different numbers, the worst value and the best")
    return values


Automatic = Annotated[bool | Literal["auto"], BeforeValidator(automatic)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]
SourceName = Annotated[str, Field(pattern=r"^[\w-]+$")]
TrainOn = Literal["all", "last"]
Supervised = TrainOn | dict[str, TrainOn]
"""The supervised assistant turns, of all rows or by source."""
SHOTS = 5  # examples of a contender that is "auto"
Location = Annotated[str, Field(min_length=1), AfterValidator(located)]


class ModelConfig(Section):
    """The base model: a folder, a hub id, ``wheel:PACKAGE/FILE.gguf`` or ``random:ARCHITECTURE``."""

    name_or_path: Location
    revision: str | None
    trust_remote_code: bool
    chat_template: Location | None
    template_time: str | None


class RowSettings(Section):
    """How the rows of a source are converted to examples, by a format or by templates, and split."""

    subset: str | None
    revision: str | None
    format: Literal[
        "template", "auto", "chat", "sharegpt", "alpaca", "prompt_completion", "question_answer", "multiple_choice"
    ]
    columns: dict[str, str | None]
    answer_kind: Literal["auto", "label", "text", "index0", "index1"]
    split: dict[Literal["train", "validation", "test"], Annotated[float, Field(ge=0)]]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    max_rows: PositiveInt | None
    keep: str | None
    id: str | None
    system: str | None
    user: str | None
    assistant: str | None
    target: str | None
    choices: str | None
    options: str | None
    context: str | None = None
    group_by: str | None
    stratify_by: str | None
    train_on: TrainOn
    thinking: Literal["keep", "drop"]


class SourceConfig(RowSettings):
    """A source of rows, and how often its training rows are used per epoch."""

    name_or_path: Location
    weight: Annotated[float, Field(gt=0, le=100)]


class NamedSource(NamedTuple):
    """A source with its name, None for a dataset without ``sources``, and its section in the configuration."""

    name: str | None
    key: str
    cfg: SourceConfig


Task = Literal["choice", "exact", "function", "json", "judge", "labels", "match", "metric", "number", "rouge", "sql"]
"""How an answer is compared with its target: the name of a module in sftlab/eval/scorers/."""


class ToleranceConfig(Section):
    """How far a number may differ from its target."""

    absolute: Annotated[float, Field(ge=0)] = 0.0
    relative: Annotated[float, Field(ge=0)] = 0.0


Dialect = Literal[
    "sqlite", "bigquery", "clickhouse", "databricks", "duckdb", "hive", "mysql", "oracle", "postgres", "presto",
    "redshift", "snowflake", "spark", "trino", "tsql",
]  # fmt: skip


class SqlConfig(Section):
    """How the statements of eval.task=sql are executed."""

    dialect: Dialect = "sqlite"
    seconds: PositiveFloat = 5.0
    rows: PositiveInt = 10_000


class Scoring(Section):
    """How answers to the rows of a guard are generated and scored; null: the default of guards."""

    task: Task | None = None
    pattern: str | None = None
    reading: Literal["strict", "last", "lenient"] | None = None
    extract: str | None = None
    rouge: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] | None = None
    tolerance: ToleranceConfig | None = None
    sql: SqlConfig | None = None
    group_by: str | None = None
    max_tokens: PositiveInt | None = None
    max_rows: PositiveInt | None = None
    margin: Annotated[float, Field(gt=0, lt=1)] | None = None


class DatasetConfig(RowSettings):
    """A source of rows, or several (``sources``), each of which has the keys of this section that it does not set."""

    name_or_path: Location | None
    sources: dict[SourceName, SourceConfig] | None
    max_overlap: Fraction
    allow_overlap: bool
    scoring: Scoring | None = None

    @model_validator(mode="before")
    @classmethod
    def _inherited(cls, values: Any) -> Any:
        """Give each source the keys of the section that it does not set."""
        sources = values.get("sources") if isinstance(values, dict) else None
        if not isinstance(sources, dict):
            return values
        own = {name: values[name] for name in RowSettings.model_fields if name in values} | {"weight": 1.0}
        filled = {str(name): own | one if isinstance(one, dict) else one for name, one in sources.items()}
        return values | {"sources": filled}

    def parts(self, key: str = "dataset") -> list[NamedSource]:
        """Return the sources in their order; ``key`` is the section of the dataset."""
        if self.sources is not None:
            return [NamedSource(name, f"{key}.sources.{name}", cfg) for name, cfg in self.sources.items()]
        assert self.name_or_path is not None  # validation refuses a dataset without any source
        values = {name: getattr(self, name) for name in SourceConfig.model_fields if name != "weight"}
        return [NamedSource(None, key, SourceConfig.model_construct(**values, weight=1.0))]

    def supervised(self) -> Supervised:
        """Return ``train_on``; by the name of the source if there are several."""
        return self.train_on if self.sources is None else {name: one.train_on for name, one in self.sources.items()}


class NoPeft(Section):
    """Full fine-tuning: all weights are trained."""

    method: Literal["none"]


class LoraFields(Section):
    """Fields of PEFT's LoraConfig that all low-rank methods share."""

    r: PositiveInt
    lora_alpha: PositiveFloat
    lora_dropout: Fraction
    target_modules: Name | Annotated[list[Name], Field(min_length=1)]
    top_layers: Annotated[float, Field(gt=0, le=1)]
    use_rslora: bool
    use_dora: bool
    fused: bool


class Lora(LoraFields):
    """Low-rank adapters on a base model in its own precision."""

    method: Literal["lora"]


class Qlora(LoraFields):
    """Low-rank adapters on a base model that bitsandbytes quantises to 4 bits."""

    method: Literal["qlora"]
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: bool


PeftConfig = Annotated[NoPeft | Lora | Qlora, Field(discriminator="method")]


class TrainConfig(Section):
    """TRL's SFTConfig: the fields that most studies set, and ``extra`` for all others."""

    data_share: Annotated[float, Field(gt=0, le=1)]
    num_train_epochs: PositiveInt
    max_steps: PositiveInt | None
    eval_steps: Annotated[float, Field(gt=0), AfterValidator(interval)] | None
    eval_on_start: bool
    early_stopping_patience: PositiveInt | None
    per_device_train_batch_size: PositiveInt
    per_device_eval_batch_size: PositiveInt
    gradient_accumulation_steps: PositiveInt
    global_batch_size: PositiveInt | None
    learning_rate: PositiveFloat
    lr_scheduler_type: str
    lr_scheduler_kwargs: dict[str, Any]
    warmup_steps: Annotated[float, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(ge=0)]
    optim: str
    max_length: PositiveInt
    allow_truncated_completion: bool
    packing: bool
    bf16: Automatic
    gradient_checkpointing: Automatic
    use_liger_kernel: bool
    torch_compile: bool
    logging_steps: PositiveInt
    save_total_limit: PositiveInt | None
    extra: dict[str, Any]


class InstanceConfig(Section):
    """The machine: devices, processes and precision. Another machine does not change the experiment's meaning."""

    name: str
    device: Literal["auto", "cpu", "cuda"]
    num_processes: PositiveInt | None
    memory_gib: PositiveFloat | None
    bf16: Automatic
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"]
    use_liger_kernel: bool
    strategy: Literal["ddp", "fsdp"]
    nnodes: PositiveInt
    node_rank: Count
    rdzv_endpoint: Annotated[str, Field(pattern=r"^\S+:\d+$")] | None
    rdzv_timeout_min: PositiveFloat
    grace_seconds: PositiveInt
    partition: str | None
    timeout_min: PositiveInt
    cpus: PositiveInt | None


class PriceConfig(Section):
    """The price of a million tokens."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]


class EndpointConfig(Section):
    """An OpenAI-compatible endpoint: its URL, the model behind it, and how requests are sent."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s/@]+(/\S*)?$")] | None = None
    model: Name | None = None
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] | None = None
    concurrency: PositiveInt = 8
    timeout_s: PositiveFloat = 120.0
    retries: Count = 5


class ContenderConfig(EndpointConfig):
    """A model beside the base and the fine-tuned model: whose weights, and what stands in its prompt."""

    name_or_path: Location | None = None
    revision: str | None = None
    weights: Literal["base", "adapter", "finetuned"] = "base"
    quantization: Literal["nf4"] | None = None
    shots: Count = 0
    system: str | None = None
    user: str | None = None
    price: PriceConfig | None = None


class JudgeConfig(EndpointConfig):
    """The judge of eval.task=judge and its prompt: a model on this machine, or behind an OpenAI-compatible endpoint."""

    name_or_path: Location | None = None
    revision: str | None = None
    system: str = ""
    user: str = ""
    pattern: str = r"\[\[(A|B|tie)\]\]"
    max_tokens: PositiveInt = 256
    preferences: Location | None = None


class EvalConfig(Section):
    """How answers are generated, extracted and scored, and on which test set."""

    engine: Literal["vllm", "transformers"]
    dtype: Literal["auto", "bfloat16", "float32"]
    name_or_path: Location | None
    dataset: DatasetConfig | None
    predictions: list[Location]
    baseline: bool
    contenders: dict[SourceName, ContenderConfig | None] | None = None
    price: PriceConfig | None = None
    chain: list[Name] = []
    max_rows: PositiveInt | None
    max_tokens: PositiveInt
    temperature: Annotated[float, Field(ge=0)]
    repeats: PositiveInt
    task: Literal["auto", Task]
    pattern: str
    reading: Literal["strict", "last", "lenient"]
    extract: str | None
    rouge: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"]
    tolerance: ToleranceConfig = ToleranceConfig()
    sql: SqlConfig = SqlConfig()
    metric: Location | None = None
    metric_value: str | None = None
    metric_range: Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(ends)] = [0.0, 1.0]
    scorer: Location | None = None
    judge: JudgeConfig = JudgeConfig()
    group_by: str | None
    batch_size: PositiveInt
    tensor_parallel_size: PositiveInt
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)]
    kv_cache_gib: PositiveFloat
    stall_min: PositiveFloat
    alpha: Annotated[float, Field(gt=0, lt=1)]
    correct_for_reuse: bool
    hoped_difference: Fraction
    smallest_gain: Annotated[float, Field(ge=0, lt=1)] = 0.0
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.05
    guards: dict[SourceName, DatasetConfig] = {}
    guard_tasks: dict[SourceName, Annotated[str, Field(pattern=r"^lm_eval:.+")]] = {}
    gate: bool = False
    forced: bool
    logprobs: bool
    labels: list[str]

    @model_validator(mode="before")
    @classmethod
    def _tasks(cls, values: Any) -> Any:
        """Separate the guards that are tasks of lm-evaluation-harness (``lm_eval:TASK``) from those with rows."""
        guards = values.get("guards") if isinstance(values, dict) else None
        if not isinstance(guards, dict):
            return values
        tasks = {name: one for name, one in guards.items() if isinstance(one, str) and one.startswith("lm_eval:")}
        if not tasks:
            return values
        known = values.get("guard_tasks") or {}
        rows = {name: one for name, one in guards.items() if name not in tasks}
        return values | {"guards": rows, "guard_tasks": {**known, **tasks}}


class SelectConfig(Section):
    """Which checkpoint is selected."""

    metric: Literal["eval_loss", "score"]
    max_rows: PositiveInt | None
    average: Literal["ties"] | None
    tie: Literal["earliest", "lowest"]


class SweepConfig(Section):
    """Which jobs of a sweep are stopped before their end."""

    prune: Literal["median", "halving"] | None
    prune_after: Annotated[float, Field(gt=0, lt=1)]


class MergeConfig(Section):
    """How far the loss of the merged model may differ from that of the base model with its adapter."""

    max_loss_gap: PositiveFloat


class TrackingConfig(Section):
    """Where curves and tables are logged, besides the run's folder."""

    backend: Literal["wandb", "trackio", "tensorboard", "mlflow", "none"]
    project: str
    entity: str | None


class CleanConfig(Section):
    """What ``mode=clean`` does with stages that no run uses."""

    delete: bool
    outputs: Location


class RunsConfig(Section):
    """Which runs ``mode=runs`` prints, in which order."""

    outputs: Location
    name: Name | None
    data: Name | None
    model: Name | None
    status: Literal["success", "running", "killed", "failed", "damaged"] | None
    verdict: Literal["better", "worse", "too_small", "inconclusive"] | None
    decision: Literal["ship", "keep_base", "undecided"] | None = None
    since: Name | None
    sort: Literal["started", "gain", "cost", "name"]
    limit: PositiveInt | None


class ServeConfig(Section):
    """How ``mode=serve`` serves the models of a run."""

    port: Annotated[int, Field(ge=1, le=65534)] = 8000
    adapter: bool = True
    page_port: Annotated[int, Field(ge=1, le=65534)] = 7860


class ExportConfig(Section):
    """The format in which ``mode=export`` writes the merged model of a run."""

    format: Literal["gguf", "awq", "fp8", "bnb4"] = "gguf"
    gguf: Literal["q4_0", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "bf16"] = "q8_0"
    rows: PositiveInt = 128


class PlanConfig(Section):
    """How ``mode=plan`` determines memory and time."""

    probe: bool


class HubConfig(Section):
    """Whether the merged model and its model card are pushed to the hub."""

    push: bool
    repo_id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None
    private: bool


class Config(Section):
    """The configuration of one experiment."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    mode: Literal[
        "all",
        "train",
        "evaluate",
        "report",
        "compare",
        "preview",
        "plan",
        "clean",
        "runs",
        "serve",
        "chat",
        "page",
        "export",
    ]
    dry_run: bool
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    store: Location
    run: Location | None = None
    model: ModelConfig
    dataset: DatasetConfig
    peft: PeftConfig
    train: TrainConfig
    instance: InstanceConfig
    eval: EvalConfig
    select: SelectConfig
    sweep: SweepConfig
    merge: MergeConfig
    tracking: TrackingConfig
    hub: HubConfig
    clean: CleanConfig
    runs: RunsConfig
    serve: ServeConfig = ServeConfig()
    export: ExportConfig = ExportConfig()
    plan: PlanConfig

    @model_validator(mode="before")
    @classmethod
    def _examples(cls, values: Any) -> Any:
        """Replace ``auto`` in eval.contenders: five examples, and no contender if the demo's rows are the test set."""
        if not isinstance(values, dict) or not isinstance(evaluation := values.get("eval"), dict):
            return values
        contenders, tested = evaluation.get("contenders"), evaluation.get("dataset") or values.get("dataset")
        if not isinstance(contenders, dict) or "auto" not in contenders.values():
            return values
        demo = isinstance(tested, dict) and tested.get("name_or_path") == "generate:vignettes"
        chosen = None if demo else {"shots": SHOTS}
        changed = {name: chosen if one == "auto" else one for name, one in contenders.items()}
        return {**values, "eval": {**evaluation, "contenders": changed}}
