"""The records of ``run.json``, ``job.json`` and the stages: frozen, typed and documented.

Every record is one JSON object. Readers ignore unknown fields, so that a file of a newer version can still be shown.
Intervals are ``[low, high]`` at the confidence ``level`` beside them. Accuracies, scores and differences are fractions.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, computed_field, model_validator

from sftlab.records import Candidate

SCHEMA_VERSION = 2

Scalar = str | int | float | bool | None
Status = Literal["running", "success", "failed"]
JobStatus = Literal["running", "success", "failed", "pruned"]
Outcome = Literal["better", "worse", "too_small", "inconclusive"]

LABELS = {"baseline": "Baseline", "finetuned": "Fine-tuned"}
"""What tables and figures call the two models, unless eval.labels or compared files name them."""


class Record(BaseModel):
    """A frozen record with a docstring per field."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True, protected_namespaces=())


# ------------------------------------------------------------------- stages


class SplitCounts(Record):
    """Rows and tokens of one tokenised split."""

    rows: int
    """Rows that are used."""
    tokens: int
    """Tokens of these rows, without padding."""
    supervised: int
    """Tokens with a loss."""
    truncated: int
    """Rows that were truncated to train.max_length."""
    left_out: int
    """Rows left out because their prompt alone fills train.max_length."""
    longest: int
    """Tokens of the longest row."""
    content: str = ""
    """Hash of the token ids and labels, in order."""


class TokenCounts(Record):
    """What tokenisation counted."""

    train: SplitCounts
    validation: SplitCounts
    prompt_bos: int
    """Beginning-of-sequence tokens in the first training prompt; 1 for most models, 2 means a doubled one."""
    turn_ends: list[int]
    """Tokens with which the chat template ends an assistant turn."""


class EarlyStop(Record):
    """A training that early stopping ended (train.early_stopping_patience)."""

    step: int
    """The last optimizer step."""
    planned_steps: int
    """Optimizer steps that the job would have had."""
    best_step: int
    """Step of the last validation with a gain beyond the noise; 0 is the untrained model."""
    validations: int
    """Validations without such a gain since then."""
    schedule: str
    """The config key train.lr_scheduler_type."""
    depends_on_length: bool
    """Whether the learning rate depends on the planned steps; then a training planned for ``step`` steps differs."""
    learning_rate: float
    """Learning rate of the last step."""
    peak_learning_rate: float
    """The config key train.learning_rate."""
    saved_seconds: float
    """Estimated seconds of the steps and validations that were not carried out."""

    @property
    def saved_steps(self) -> int:
        """Steps that were not trained."""
        return self.planned_steps - self.step


class Pruned(Record):
    """A job of a sweep that was stopped because its peers are better (sweep.prune)."""

    rule: str
    """The config key sweep.prune."""
    step: int
    """The last optimizer step."""
    planned_steps: int
    """Optimizer steps that the job would have had."""
    epoch: float
    """Its epoch."""
    eval_loss: float
    """Its lowest validation loss until then, nats per supervised token."""
    peers: int
    """Jobs that had reached this epoch."""
    peer: int
    """Number of the one in the middle, with which it was compared."""
    peer_eval_loss: float
    """Its lowest validation loss until the same epoch."""

    def __str__(self) -> str:
        return (
            f"pruned at step {self.step:,} of {self.planned_steps:,}: its validation loss {self.eval_loss:.4f} is "
            f"worse than {self.peer_eval_loss:.4f} of job {self.peer}, in the middle of {self.peers} peer"
            f"{'' if self.peers == 1 else 's'} at epoch {self.epoch:.3g}, by more than the noise "
            f"(sweep.prune={self.rule})"
        )


class Receipt(Record):
    """What took effect in training, read from the model and the trainer."""

    parameters: int
    """Weights of the model, quantised ones included."""
    trainable_parameters: int
    """Weights that were trained."""
    quantized_layers: int
    """Linear layers that bitsandbytes quantised."""
    attn_implementation: str
    """Attention implementation of the model."""
    padding_mask: bool | None = None
    """Whether the model was given a mask of padding tokens."""
    gradient_checkpointing: bool | None = None
    """Whether activations were recomputed in the backward pass."""
    liger_modules: int
    """Modules that run a Liger kernel."""
    fused_lora_layers: int = 0
    """Adapters that are computed in one fused operation (peft.fused)."""
    compiled_graphs: int = 0
    """Graphs that torch.compile compiled (train.torch_compile)."""
    optimizer: str | None = None
    """Class of the optimizer, with "fused" if one kernel updates all weights."""
    loss: str
    """Loss function, and how log-probabilities are computed."""
    optimizer_state: list[str]
    """Number formats of the optimizer's state."""
    base_dtype: str
    """Number format of the frozen weights, or of all weights if none is frozen."""
    autocast: str | None
    """Number format of autocast; null without it."""
    effective_batch: int
    """Rows per optimizer step over all devices."""
    optimizer_steps: int
    """Optimizer steps that were trained."""
    planned_steps: int | None = None
    """Optimizer steps of the learning rate schedule; more than ``optimizer_steps`` if training stopped before."""
    steps_per_epoch: int | None = None
    """Optimizer steps per epoch."""
    supervised_tokens: int
    """Training tokens with a loss, per epoch."""
    supervised_share: float
    """Share of the training tokens that have a loss."""
    truncated_rows: dict[str, int]
    """Truncated rows by split."""
    left_out_rows: dict[str, int]
    """Rows left out by split, because their prompt fills train.max_length."""
    prompt_bos: int
    """Beginning-of-sequence tokens in the first training prompt."""
    device: str
    """cpu or cuda."""
    num_processes: int
    """Ranks that trained."""
    strategy: str
    """ddp or fsdp."""
    find_unused_parameters: bool | None = None
    """DDP's setting of this name; null without DDP."""
    train_seconds: float
    """Seconds of training in the last process; 0 if the training was taken from another job."""
    tokens_per_second: float | None
    """Training tokens per second over all devices, without padding."""
    tokens_per_second_per_device: float | None
    """The same per device."""
    flops_per_token: int | None = None
    """Floating-point operations of the model per training token, forward and backward."""
    mfu: float | None
    """Model FLOPs utilisation, a fraction of the GPUs' peak; null on a CPU."""
    peak_memory_gib: float
    """Peak memory in GiB: of the process on a CPU, of the allocator on a GPU."""
    step_seconds: float | None
    """Median seconds per optimizer step."""
    rank_checksums: list[float]
    """For each rank a sum over its trained weights."""
    earlier_machines: list[str | dict[str, Scalar]]
    """Machines on which earlier steps were trained."""
    diverged_at_step: int | None
    """Step after which the validation loss was not finite; null if it always was."""
    early_stop: EarlyStop | None = None
    """What early stopping did; null if the training has all its steps."""


class MergeCheck(Record):
    """The merged model compared with the adapter on its base."""

    adapter_loss: float
    """Validation loss with the adapter, nats per token."""
    merged_loss: float
    """Validation loss of the merged model, nats per token."""
    rows: int
    """Validation rows compared."""
    agreeing_tokens: int
    """Positions at which both models have the same most likely token."""
    compared_tokens: int
    """Positions compared."""
    changed_tensors: int
    """Weight tensors that differ from the base."""
    tensors: int
    """Weight tensors of the model."""


class PlanCell(Record):
    """Memory and time of a configuration on its machine. Memory is GiB per device, time seconds per epoch."""

    memory: dict[str, float]
    """GiB by part: weights, optimizer, activations and so on."""
    training_gib: float
    """Peak in training."""
    generation_gib: float
    """Peak in generation."""
    capacity_gib: float | None
    """Memory of a device; null if unknown."""
    seconds_per_epoch: float | None
    """Seconds of one epoch with its validations; null if unknown."""
    epochs: float | None = None
    """Epochs of the job, with a fraction if train.max_steps ends within one."""
    timed_by: str
    """What the time was estimated from."""
    gradient_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass."""
    trouble: str | None = None
    """Why the configuration cannot run at all."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fits(self) -> bool | None:
        """Whether both phases, which follow each other, fit into a device's memory; None if that is unknown."""
        if self.trouble is not None:
            return False
        return None if self.capacity_gib is None else max(self.training_gib, self.generation_gib) <= self.capacity_gib


class LayerSeconds(Record):
    """Seconds of one pass through one layer by number format: ``float32`` and ``bfloat16``."""

    cpu: str
    """Model of the CPU."""
    adapters: dict[str, float]
    """A training step of adapters, with frozen weights in the named format."""
    all_weights: dict[str, float]
    """A training step of all weights: float32 weights, with and without bfloat16 autocast."""
    generation: dict[str, float]
    """A forward pass over single tokens."""


class Precision(Record):
    """The number formats of training and generation."""

    bf16: bool
    """train.bf16 after ``auto`` was resolved."""
    dtype: str
    """eval.dtype after ``auto`` was resolved."""
    measured: LayerSeconds | None
    """The measurement that decided; null if nothing was ``auto``."""


# ------------------------------------------------------------------- selection


class Selection(Record):
    """The selected checkpoint over all jobs, and every candidate."""

    @model_validator(mode="before")
    @classmethod
    def _named_before(cls, values: object) -> object:
        """Read the field ``exact_match`` of files of earlier versions as the score."""
        if isinstance(values, dict) and "exact_match" in values:
            rows = [row | {"score": row.get("exact_match")} for row in values.get("candidates", [])]
            return values | {"score": values["exact_match"], "candidates": rows}
        return values

    metric: str
    """What the checkpoints are ranked by: eval_loss, or the metric of eval.task on validation, such as accuracy."""
    checkpoint: str
    """Folder of the selected checkpoint."""
    step: int
    """Its optimizer step; 0 is the untrained model (train.eval_on_start)."""
    epoch: float
    """Its epoch, with a fraction within an epoch."""
    eval_loss: float
    """Its validation loss, nats per supervised token."""
    train_loss: float | None
    """Mean training loss over the steps since the validation before; null at step 0."""
    score: float | None = None
    """Its mean score on the validation rows, if checkpoints are ranked by it."""
    average_of: tuple[str, ...] = ()
    """Folders of the checkpoints that it is the average of (select.average)."""
    scored_rows: int | None = None
    """Validation rows that were answered for this (select.max_rows)."""
    job: int
    """Number of its job."""
    overrides: list[str]
    """Overrides of its job."""
    seconds: float
    """Training seconds from the job's start to the checkpoint."""
    lowest_eval_loss: float
    """The lowest validation loss of all candidates."""
    best: str
    """Folder of the best checkpoint; another one than ``checkpoint`` if select.tie=earliest took an earlier one."""
    ties: list[str]
    """Folders of the checkpoints within the noise of the best one."""
    candidates: list[Candidate]
    """Every checkpoint, those that cannot be ranked with the others at the end."""
    by_source: list[SourceLoss] = []
    """The validation loss of the selected checkpoint by source; empty without dataset.sources."""
    recipes: list[Recipe] = []
    """Recipes by their mean over seeds, the best first; empty if no recipe was trained with several seeds."""


class Recipe(Record):
    """The jobs of a sweep that differ in ``seed`` only: replicates of one recipe."""

    overrides: list[str]
    """Overrides of its jobs, without the seed."""
    jobs: list[int]
    """Numbers of its jobs, one per seed."""
    seeds: list[int]
    """Their seeds."""
    checkpoints: list[str]
    """Folder of the checkpoint selected in each of its trainings."""
    steps: list[int]
    """Optimizer steps of these checkpoints."""
    values: list[float]
    """What they are ranked by, each (selection.metric)."""
    mean: float
    """Mean of ``values``, by which recipes are ranked."""
    sd: float | None
    """Standard deviation of ``values``; null with one seed."""


class SourceLoss(Record):
    """The validation loss of a checkpoint on the rows of one source (dataset.sources)."""

    source: str
    """Its name."""
    rows: int
    """Its validation rows."""
    tokens: int
    """Supervised tokens of these rows."""
    eval_loss: float
    """Nats per supervised token."""


class JobSummary(Record):
    """A job of a sweep in ``run.json``."""

    job: int
    """Its number."""
    overrides: list[str]
    """Overrides of the job, as on a command line."""
    status: JobStatus
    """How it ended."""
    error: str | None
    """Why it failed; null otherwise."""
    ranked: bool
    """Whether its checkpoints were ranked with those of the selected job."""
    trained_as: str
    """Whether it was trained separately, or shares steps with another job."""
    early_stop: EarlyStop | None = None
    """What early stopping did; null if the training has all its steps."""
    pruned: Pruned | None = None
    """Why it was stopped by sweep.prune; null otherwise."""


class CurvePoint(Record):
    """One training of a learning curve."""

    job: int
    """Number of its job."""
    share: float
    """The config key train.data_share."""
    rows: int
    """Its training rows."""
    eval_loss: float
    """Validation loss of its selected checkpoint, nats per supervised token."""
    loss_interval: tuple[float, float] | None
    """Confidence interval of ``eval_loss`` for other validation rows; null from fewer than two."""
    score: float | None
    """Mean score of this checkpoint on validation; null if checkpoints are ranked by the loss."""
    score_interval: tuple[float, float] | None
    """Confidence interval of ``score`` for other validation rows."""


class CurvePrediction(Record):
    """What one training on more rows would give, by power laws that fit the curve."""

    rows: int
    """Training rows: twice those of the largest training."""
    value: float
    """Median of the predicted value."""
    interval: tuple[float, float]
    """Prediction interval of one training: from how far the points lie from a curve, and of a score also from the noise
    of so few answers."""
    exponent: float
    """Mean exponent b of the laws c + a·rows^(−b)."""


class Curve(Record):
    """A learning curve: trainings that differ in train.data_share."""

    metric: str
    """The score, such as accuracy; eval_loss without scores."""
    level: float
    """Confidence level of the intervals."""
    points: list[CurvePoint]
    """The trainings, by rows."""
    loss: CurvePrediction | None
    """Prediction of the validation loss; null from fewer than three different numbers of rows."""
    score: CurvePrediction | None
    """Prediction of the score; null without scores."""


# ------------------------------------------------------------------- evaluation


class Verdict(Record):
    """What the comparison of two models says."""

    outcome: Outcome
    """better or worse: of the second model, at the level of the test; too_small: it is not better by eval.smallest_gain
    or more; inconclusive otherwise."""
    reason: str
    """The numbers behind it, in one sentence."""
    judged: bool = True
    """Whether the models can be judged; false if no answer of a model can be extracted."""
    notes: list[str] = []
    """What limits the verdict: other readings that disagree, truncated answers."""

    def __str__(self) -> str:
        return "; ".join([f"{self.outcome.replace('_', ' ')}: {self.reason}", *self.notes])


class ReadingCounts(Record):
    """Answers of one model by one way of reading them."""

    correct: int
    """Right answers."""
    unparsed: int
    """Completions with no answer extracted."""


class Repeats(Record):
    """How much a model's answers differ between generations of one test set."""

    values: list[float]
    """The metric in each generation."""
    changed: int
    """Questions judged differently in two generations."""
    noise: float
    """Largest difference between two values."""
    forced_noise: float
    """The same with forced choices."""
    pass_at: dict[int, float] = {}
    """pass@k by k: the probability that one of k answers to a question is right, estimated without bias."""
    majority: float | None = None
    """Accuracy of the most frequent answer of all repeats; null for scores."""


class Knowledge(Record):
    """What the letters of one model have in common with the questions; every question has a letter for it."""

    value: float
    """Share of questions that the model knows, if it guesses the others without regard to the question."""
    interval: tuple[float, float]
    """Confidence interval of ``value``."""
    level: float
    """Confidence level of ``interval``."""
    forced: dict[str, int] = {}
    """How often each letter was the forced choice."""
    prior: dict[str, float] = {}
    """The prior probability of each letter that was divided out of forced choices; with repeats of the first
    generation. Empty if none was."""


class Part(Record):
    """A part of a difference."""

    value: float
    """The part, a fraction."""
    interval: tuple[float, float]
    """Its confidence interval."""


class Split(Record):
    """A difference in right answers as the sum of three parts."""

    knowledge: Part
    """Questions that one model knows and the other does not, forced choices included."""
    guessing: Part
    """Right answers by luck."""
    form: Part
    """Known answers that are stated in a form that is extracted."""
    level: float
    """Confidence level of the intervals."""
    p_value: float
    """Two-sided p-value of no difference in knowledge."""
    p_adjusted: float | None = None
    """Adjusted for the models judged earlier on the test set; null without ``eval.correct_for_reuse``."""
    outcome: Outcome
    """Of the second model in knowledge: better or worse if p (adjusted, if it is) is below 1 − ``level``."""


class Constant(Record):
    """The best constant answer: that of a model which ignores the question."""

    answer: str
    """The letter that is right most often."""
    correct: int
    """Questions in which it is right."""


class Cost(Record):
    """What the answers of one model cost."""

    answers: int
    """Answers over all repeats, to which the counts below refer."""
    prompt_tokens: int | None
    """Tokens of the prompts; null if an endpoint does not count them."""
    completion_tokens: int
    """Tokens of the answers."""
    seconds_per_answer: float | None
    """Seconds of generation per answer, in batches or concurrent requests, without the start of an engine; null if
    unknown."""
    price: float | None = None
    """Price of 1,000 answers by eval.price, in its currency; null without a price."""


class ModelResult(Record):
    """One model on the test set."""

    metric: str
    """What is judged: accuracy, or the name of a score."""
    value: float
    """The metric, a fraction."""
    interval: tuple[float, float]
    """Confidence interval of ``value``: Wilson's for an accuracy, Gaffke's for a mean score."""
    level: float
    """Confidence level of ``interval``, such as 0.95."""
    n: int
    """Questions."""
    answers: int = 0
    """Answers over all repeats, which the counts below refer to; 0 in files of earlier versions."""
    groups: int | None = None
    """Groups of rows that the interval treats as units; null if rows are independent."""
    correct: int | None = None
    """Right answers; null for scores."""
    unparsed: int
    """Completions with no answer extracted."""
    truncated: int | None
    """Completions that reached the token limit; null if unknown for all."""
    finish_reasons: int
    """Completions whose finish reason is known."""
    reading: str | None = None
    """How answers are read (eval.reading); null for tasks without several ways."""
    readings: dict[str, ReadingCounts] = {}
    """The result by each way of reading answers."""
    letters: dict[str, int] = {}
    """How often each answer was given; "none" where none was extracted."""
    scores: dict[str, float] = {}
    """The other metrics of the task, by name, and the judged one if it is a kind of ROUGE."""
    score_intervals: dict[str, tuple[float, float]] = {}
    """Confidence intervals of other metrics: Wilson's for a share, a bootstrap's for macro-F1."""
    executed: int | None = None
    """Answers to questions whose target has a result that decides (eval.task=sql); null for other tasks."""
    items: dict[str, ItemCounts] = {}
    """Results by label (eval.task=labels) or by field (eval.task=json)."""
    repeats: Repeats | None = None
    """Differences between repeated generations (eval.repeats)."""
    knowledge: Knowledge | None = None
    """What the model knows; null if a question has neither an answer nor a forced choice."""
    cost: Cost | None = None
    """What the answers cost; null for compared files."""


class Estimate(Record):
    """A value with its confidence interval."""

    value: float
    """The value, a fraction."""
    interval: tuple[float, float]
    """Its confidence interval."""


class ItemCounts(Record):
    """A label (eval.task=labels) or a field (eval.task=json) in the answers of one model, over all repeats."""

    expected: int
    """How often it is in a target."""
    given: int
    """How often it is in an answer."""
    right: int
    """How often both are the same."""

    @property
    def f1(self) -> float:
        """F-measure of precision and recall."""
        return 2 * self.right / (self.given + self.expected)


class Calibration(Record):
    """A judge compared with people on the same pairs of answers."""

    file: str
    """The config key eval.judge.preferences."""
    n: int
    """Pairs that people have judged."""
    agreement: Estimate
    """Share of the pairs on which judge and people agree: first, second or tie."""
    kappa: Estimate
    """Cohen's kappa: agreement beyond that of chance."""


class JudgeRecord(Record):
    """What a judge decided in a comparison, and how it tends to decide."""

    name: str
    """Its name."""
    pairs: int
    """Pairs of answers; with repeats, of all."""
    asked: int
    """Pairs that the judge was asked about, in both orders: not those with an empty answer, or equal ones."""
    consistent: int
    """Of these, pairs with the same verdict in both orders."""
    no_verdict: int
    """Texts of the judge without a verdict, of two per pair."""
    prefers_first: float | None
    """Share of the verdicts for the answer that was shown first, ties counted half; 0.5 without a preference for it."""
    prefers_longer: float | None
    """Share of the decided pairs in which the answer with more words is preferred."""
    words: tuple[float, float]
    """Mean number of words of both models' answers."""
    at_equal_length: Estimate | None
    """The difference in preference where both answers are equally long, by a regression on the ratio of lengths; null
    for fewer than 20 questions."""
    calibration: Calibration | None = None
    """Agreement with people; null without eval.judge.preferences."""


class ScorerSource(Record):
    """Code that scored the answers: a metric of the evaluate library, or a function of the user."""

    name: str
    """The config key eval.metric or eval.scorer."""
    sha256: str
    """SHA-256 of its file."""


class Changes(Record):
    """How many answers differ between two models, and how many independent questions they are worth."""

    share: float
    """Share of the answers that are right by one model only."""
    rows: float
    """Independent questions with one answer each from which the difference would be as uncertain."""
    freedom: int | None
    """Degrees of freedom of Student's t; null if questions are independent and have one answer each."""


class NonInferiority(Record):
    """Whether the second model loses less than the largest acceptable loss: a one-sided test."""

    margin: float
    """The largest acceptable loss (eval.margin)."""
    p_value: float
    """One-sided p-value of a loss of ``margin`` or more; small if the loss is smaller."""
    p_worse: float
    """One-sided p-value of a loss of at most ``margin``; small if the loss is larger."""
    bound: float
    """Lower end of the one-sided interval of the difference."""
    level: float
    """Confidence level of ``bound`` and of the test."""
    outcome: Literal["no_worse", "worse", "inconclusive"]
    """no_worse: the loss is shown to be smaller than ``margin``; worse: it is shown to be larger."""
    needed: int | None = None
    """About how many questions would decide with a probability of 80 %, if the difference stays as it is; null if it is
    decided, or if the difference is the margin."""


class Comparison(Record):
    """Two models on the same questions; differences are second minus first."""

    metric: str
    """What is compared."""
    n: int
    """Questions."""
    baseline: float
    """The metric of the first model."""
    finetuned: float
    """The metric of the second model."""
    delta: float
    """The difference."""
    interval: tuple[float, float]
    """Confidence interval of ``delta``."""
    level: float
    """Confidence level of ``interval``."""
    p_value: float
    """Two-sided p-value of no difference."""
    p_adjusted: float | None = None
    """Adjusted for the models judged earlier on the test set; null without eval.correct_for_reuse."""
    gained: int
    """Questions on which the second model is better; with repeats, more often right."""
    lost: int
    """Questions on which the second model is worse; with repeats, less often right."""
    judge: JudgeRecord | None = None
    """The judge; null for other tasks."""
    scores: dict[str, Estimate] = {}
    """Differences of the other metrics, by name; the verdict does not depend on them."""
    both_right: int | None = None
    """Questions that both answer rightly; null for scores and with repeats."""
    both_wrong: int | None = None
    """Questions that both answer wrongly; null for scores and with repeats."""
    groups: int | None = None
    """Groups of rows that the statistics treat as units; null if rows are independent."""
    smallest_visible_difference: float | None = None
    """The difference that this test set shows with 80 % power; null if none can be shown."""
    smallest_visible_assumes: str = ""
    """What this difference assumes, in words."""
    changes: Changes | None = None
    """Changed answers; null for scores."""
    smallest_gain: float = 0.0
    """The smallest gain that matters (eval.smallest_gain); 0: any gain."""
    p_gain: float | None = None
    """Two-sided p-value of a gain of ``smallest_gain``; null if this is 0."""
    needed: int | None = None
    """About how many questions would decide with a probability of 80 %, if the difference stays as it is; null if the
    verdict is not inconclusive, or if the difference is the smallest gain."""
    noninferiority: NonInferiority | None = None
    """Whether a loss is acceptable; null without a margin."""
    verdict: Verdict
    """The conclusion."""
    forced: Comparison | None = None
    """The same with a forced choice where no answer was extracted; null if a row without an answer has none."""
    split: Split | None = None
    """The difference as knowledge, guessing and form."""
    unsplit: str | None = None
    """Why the difference is not split; null if it is, and for tasks other than choice."""


class SubgroupSide(Record):
    """One model on one subgroup."""

    value: float
    """The metric."""
    interval: tuple[float, float] | None
    """Its confidence interval; null if there are too few rows."""
    correct: int | None = None
    """Right answers; null for scores."""


class SubgroupDifference(Record):
    """The difference of two models on one subgroup."""

    delta: float
    """Second minus first."""
    interval: tuple[float, float]
    """Its confidence interval."""
    p_value: float
    """Two-sided p-value."""
    p_adjusted: float
    """Adjusted by Holm's method for the compared subgroups."""
    gained: int
    """Questions on which the second model is better."""
    lost: int
    """Questions on which the second model is worse."""


class Subgroup(Record):
    """The questions with one value in the column eval.group_by, or of one source."""

    name: str
    """The value."""
    n: int
    """Questions."""
    baseline: SubgroupSide | None = None
    """The first model."""
    finetuned: SubgroupSide | None = None
    """The second model."""
    difference: SubgroupDifference | None = None
    """Their difference; null if they were not compared."""
    reason: str | None = None
    """Why they were not compared."""


class Subgroups(Record):
    """Results by subgroup, the largest first."""

    column: str
    """The config key eval.group_by; "source" for the sources of the dataset, if that key is null."""
    level: float
    """Confidence level of the intervals."""
    without: int
    """Questions without a value in the column."""
    compared: int
    """Subgroups that were compared."""
    note: str | None
    """How to read the p-values."""
    groups: list[Subgroup]
    """One entry per subgroup."""


class Contender(Record):
    """A model of eval.contenders, and the fine-tuned model compared with it."""

    name: str
    """Its name in eval.contenders."""
    about: str
    """What it is, in words."""
    prompting: bool
    """Whether it is the base model with another prompt."""
    shots: list[str] = []
    """Ids of the training rows that are examples in its prompt, in their order."""
    left_out: str | None = None
    """Why it was not evaluated; null if it was."""
    result: ModelResult | None = None
    """The model on the test set; null if it was left out."""
    comparison: Comparison | None = None
    """The fine-tuned model minus this one; null if it was left out, or is in eval.chain, where its loss is tested."""
    p_adjusted: float | None = None
    """p of the comparison, adjusted by Holm's method for the number of contenders, the base model included."""
    verdict: Verdict | None = None
    """The verdict by the adjusted p."""


class ChainStep(Record):
    """Two models that follow each other in eval.chain: the later one may not lose more than eval.margin."""

    first: str
    """Name of the earlier model."""
    second: str
    """Name of the later model."""
    comparison: Comparison | None = None
    """The later model minus the earlier one, with the test in ``noninferiority``; null if one was left out."""


class Reuse(Record):
    """How often the test set was used: the place of a model in the store's ledger."""

    test_set: str
    """Hash of the test set: user messages and right answers, in any order."""
    number: int
    """Number of this model among the models judged on this test set, in the order in which they were first judged."""
    models: int
    """Models judged on this test set so far. The base model does not count, and other models count once."""
    rows: int
    """Rows of the test set."""
    alpha: float
    """The config key eval.alpha."""
    chance: float
    """Probability that at least one of ``models`` that change nothing is called better, if p is not adjusted."""
    corrected: bool
    """Whether p-values and verdicts are adjusted (eval.correct_for_reuse)."""


class Evaluation(Record):
    """Base and fine-tuned model on the test set."""

    task: str
    """The config key eval.task."""
    finetuned: ModelResult
    """The fine-tuned model, or the second file of mode=compare."""
    baseline: ModelResult | None = None
    """The base model, or the first file; null with eval.baseline=false."""
    comparison: Comparison | None = None
    """Their comparison; null without a baseline."""
    contenders: list[Contender] = []
    """Further models on the same questions (eval.contenders)."""
    p_adjusted: float | None = None
    """p of ``comparison``, adjusted by Holm's method for all contenders; null without contenders."""
    chain: list[ChainStep] = []
    """The steps of eval.chain; of three models or more, also the last one against the first."""
    subgroups: Subgroups | None = None
    """Results by eval.group_by, or by source."""
    constant: Constant | None = None
    """The best constant answer in multiple choice."""
    scorer: ScorerSource | None = None
    """The code that scored the answers; null for tasks of sftlab."""
    labels: dict[str, str] = LABELS
    """What the models are called: those names, or those of the compared files (eval.labels)."""
    reuse: Reuse | None = None
    """How often the test set was used; null in mode=compare, and for a model compared with itself."""
    guards: list[Guard] = []
    """Results on other test sets (eval.guards)."""
    decision: Decision | None = None
    """What follows from the test set and the guards together; null without a baseline."""


class Condition(Record):
    """A condition of the decision: a gain on the test set, or an acceptable loss on a guard."""

    name: str
    """"test set", or the name of the guard."""
    outcome: Literal["holds", "fails", "undecided"]
    """Whether the condition is shown to hold, or shown not to hold."""
    p_fails: float
    """p-value of the claim that it does not hold: two-sided for the test set, one-sided for guards."""
    p_fails_adjusted: float | None = None
    """Adjusted for the number of conditions by Holm's method."""
    needed: int | None = None
    """About how many questions would decide it with a probability of 80 %; null if it is decided, or unknown."""


class Decision(Record):
    """Whether to ship the fine-tuned model, from the test set and the guards together."""

    outcome: Literal["ship", "keep_base", "undecided"]
    """ship: every condition holds; keep_base: one is shown not to hold; undecided otherwise."""
    alpha: float
    """Largest probability of ship if a condition does not hold, and of keep_base if all hold (eval.alpha)."""
    conditions: list[Condition]
    """The conditions, that of the test set first."""
    notes: list[str] = []
    """What limits the decision."""


class Guard(Record):
    """Both models on another test set, on which the fine-tuned model may not lose more than the margin."""

    name: str
    """Its name in eval.guards."""
    data: str
    """Its dataset."""
    evaluation: Evaluation
    """Its result; whether a loss is acceptable is in ``comparison.noninferiority``."""


class TrainingResult(Record):
    """One training of the selected recipe on the test set."""

    job: int
    """Number of its job."""
    seed: int
    """Its seed."""
    step: int
    """Optimizer step of the selected checkpoint; 0 is the untrained model."""
    value: float
    """The metric of the fine-tuned model."""
    delta: float | None
    """The difference to its base model; null with eval.baseline=false."""


class Replication(Record):
    """The selected recipe, judged by all of its trainings."""

    metric: str
    """What is compared."""
    n: int
    """Questions."""
    trainings: list[TrainingResult]
    """One entry per seed."""
    mean: float
    """Mean of the metric over the trainings."""
    sd: float
    """Standard deviation of the metric between the trainings."""
    better: int | None
    """Trainings with a higher metric than the base model; null with eval.baseline=false."""
    delta: float | None
    """Mean difference to the base model."""
    delta_sd: float | None
    """Standard deviation of the difference between the trainings."""
    interval: tuple[float, float] | None
    """Confidence interval of ``delta`` for other seeds and other questions."""
    level: float
    """Confidence level of ``interval``."""
    p_value: float | None
    """Two-sided p-value of no mean difference."""
    p_adjusted: float | None = None
    """Adjusted for the models judged earlier on the test set; null without eval.correct_for_reuse."""
    verdict: Verdict | None
    """The conclusion about the recipe; null with eval.baseline=false."""
    models: int
    """Models that were merged and evaluated besides the selected one."""
    seconds: float
    """Seconds that this took; less if answers were in the store."""


class EvaluationRow(Record):
    """One job of a sweep with mode=evaluate."""

    job: int
    """Its number."""
    overrides: list[str]
    """Overrides of the job, as on a command line."""
    status: Status
    """How it ended."""
    error: str | None = None
    """Why it failed; null otherwise."""
    model: str | None = None
    """The evaluated model."""
    base: str | None = None
    """The base model."""
    evaluation: Evaluation | None = None
    """Its result."""
    precision: Precision | None = None
    """Number formats."""
    revisions: dict[str, str] = {}
    """Commits of hub models and datasets by config key."""
    template_time: str | None = None
    """The time that the chat template was given, if it prints one."""
    stages: dict[str, str] = {}
    """Folders of its stages."""
    times: dict[str, float] = {}
    """Seconds of its stages."""
    p_adjusted: float | None = None
    """Adjusted by Holm's method for the number of comparisons."""
    verdict: Verdict | None = None
    """The verdict by the adjusted p-value."""


class PlanRow(PlanCell):
    """One job of mode=plan."""

    job: int
    """Its number."""
    overrides: list[str]
    """Overrides of the job, as on a command line."""


# ------------------------------------------------------------------- format


class RowFormat(Record):
    """The recognised format of a dataset's rows, and one row as a model is trained on it."""

    format: str
    """Name of the format, as in the config key dataset.format."""
    columns: dict[str, str]
    """Column of each role."""
    option_columns: list[str]
    """Columns of the options, if each has its own."""
    answer: str | None
    """What names the right option: label, text, index0, index1, correct or stated."""
    facts: list[str]
    """What else was found in the first rows."""
    summary: str
    """The line of the log."""
    messages: list[dict[str, JsonValue]]
    """The turns of the first row."""
    target: str
    """Its right answer."""


class SourceRecord(Record):
    """A source of a dataset that mixes several (dataset.sources)."""

    name: str
    """Its name."""
    weight: float
    """How often its training rows are used per epoch."""
    rows: dict[str, int]
    """Rows by split; a training row that is used twice counts twice."""
    row_format: RowFormat | None
    """Format of its rows; null if templates convert them."""


# ------------------------------------------------------------------- overlap


class OverlapRow(Record):
    """A question, and the row of an earlier split that holds the largest share of its distinct word n-grams."""

    left_split: str
    """Split of the question."""
    left_id: str
    """Id of the question."""
    right_split: str
    """The earlier split."""
    right_id: str
    """Id of the row in the earlier split."""
    share: float
    """Share of the question's n-grams, 0 to 1; 1 for an exact duplicate."""
    exact: bool
    """Whether both are the same text after normalisation, or conversations with the same first user turn."""
    left_text: str
    """Text of the question: all user turns."""
    right_text: str
    """Text of the row: all user turns."""


class OverlapPair(Record):
    """The questions of ``left_split`` found in ``right_split``."""

    left_split: str
    """The examined split."""
    right_split: str
    """The earlier split."""
    examined: int
    """Questions of the left split."""
    exact: int
    """Exact duplicates."""
    near: int
    """Others whose share is over the limit."""
    mean: float
    """Mean share of a question's n-grams in one row of the right split."""
    p50: float
    """Median of this share."""
    p95: float
    """Its 95th percentile."""
    max: float
    """The largest share."""


class OverlapReport(Record):
    """The overlap of every pair of splits."""

    max_overlap: float
    """The config key dataset.max_overlap."""
    n: int
    """Words per n-gram."""
    pairs: list[OverlapPair]
    """Every pair of splits."""
    worst: list[OverlapRow]
    """The largest shares, at most ten."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def leaking(self) -> int:
        """Exact duplicates and near duplicates together; a question in two other splits counts twice."""
        return sum(pair.exact + pair.near for pair in self.pairs)


class OverlapRecord(OverlapReport):
    """Leakage between splits, and whether it was allowed."""

    allow_overlap: bool
    """The config key dataset.allow_overlap."""


# ------------------------------------------------------------------- export


class Export(Record):
    """A merged model that was written in another format (mode=export), and its test."""

    format: str
    """The config key export.format."""
    gguf: str | None
    """The config key export.gguf; null for other formats."""
    folder: str
    """Folder of the exported model."""
    weight_bytes: int
    """Bytes of the files with its weights."""
    merged_bytes: int
    """Bytes of the files with the weights of the merged model."""
    engine: str
    """Engine that answered the test questions with both models."""
    comparison: Comparison
    """The merged model and the exported one on the test set."""

    @property
    def name(self) -> str:
        """The format, of a GGUF file with the type of its weights."""
        return self.format if self.gguf is None else f"{self.format} {self.gguf}"


# ------------------------------------------------------------------- run


class RunRecord(Record):
    """``run.json``: the settings, state and results of a run."""

    schema_version: int = SCHEMA_VERSION
    """Version of this schema."""
    id: str
    """Unique id of the run."""
    status: Status
    """State of the run."""
    error: str | None = None
    """Why it failed; null otherwise."""
    experiment: str
    """The config key ``name``."""
    mode: str
    """The config key ``mode``."""
    command: str
    """The command line."""
    started: str
    """ISO time in UTC."""
    finished: str | None = None
    """ISO time in UTC."""
    git: str | None = None
    """Commit of sftlab's checkout, with a + if it has changes; null if installed otherwise."""
    versions: dict[str, str] = {}
    """Installed versions of the libraries."""
    seed: int
    """The config key ``seed``."""
    revisions: dict[str, str] = {}
    """Commits of hub models and datasets, by the config key that pins them."""
    template_time: str | None = None
    """The time that the chat template was given, if it prints one."""
    precision: Precision | None = None
    """Number formats of training and generation."""
    receipt: Receipt | None = None
    """What took effect in the training of the selected checkpoint."""
    row_format: RowFormat | None = None
    """Format of the dataset's rows; null if templates convert them, or if the dataset has several sources."""
    data_sources: list[SourceRecord] = []
    """The sources of the dataset; empty without dataset.sources."""
    overlap: OverlapRecord | None = None
    """Leakage between splits."""
    stages: dict[str, str] = {}
    """Folders of the stages."""
    times: dict[str, float] = {}
    """Seconds of the stages; 0 if a stage was cached."""
    jobs: list[JobSummary] = []
    """The jobs of the run."""
    selection: Selection | None = None
    """The selected checkpoint."""
    skipped: str | None = None
    """Why nothing was merged and evaluated, if the untrained model is selected; null otherwise."""
    merge: MergeCheck | None = None
    """The merged model compared with the adapter."""
    evaluation: Evaluation | None = None
    """Base and fine-tuned model on the test set."""
    curve: Curve | None = None
    """The learning curve; null unless jobs differ in train.data_share."""
    replication: Replication | None = None
    """The selected recipe, judged by all of its trainings; null if it was trained with one seed."""
    evaluations: list[EvaluationRow] = []
    """The results of a sweep with mode=evaluate."""
    plan: list[PlanRow] = []
    """The results of mode=plan."""
    sources: dict[str, str] = {}
    """The compared files of mode=compare."""
    exports: list[Export] = []
    """The merged model in other formats (mode=export)."""


# ------------------------------------------------------------------- job


class JobRecord(Record):
    """``job.json``: one job of a run. Every job writes it; after the jobs, the run is decided from these files."""

    schema_version: int = SCHEMA_VERSION
    """Version of this schema."""
    number: int
    """Number of the job in its sweep; 0 for a single run."""
    overrides: list[str]
    """Overrides of the job, as on a command line."""
    config: dict[str, JsonValue]
    """Its configuration, with resolved number formats and pinned commits once they are known."""
    status: JobStatus = "running"
    """State of the job."""
    error: str | None = None
    """Why it failed; null otherwise."""
    exit_code: int = 0
    """Exit code of a single run that fails like this job."""
    run: str | None = None
    """Id of the run that the job belongs to: a run's folder may contain other runs."""
    stages: dict[str, str] = {}
    """Folders of its completed stages."""
    times: dict[str, float] = {}
    """Seconds of the stages; 0 if a stage was cached."""
    comparable: dict[str, Scalar] = {}
    """What must be equal in two jobs for their checkpoints to be ranked together."""
    family: str | None = None
    """Equal in jobs that share their first steps; null if the job shares none."""
    candidates: list[Candidate] = []
    """Its checkpoints."""
    row_format: RowFormat | None = None
    """Format of the dataset's rows; null if templates convert them, or if the dataset has several sources."""
    data_sources: list[SourceRecord] = []
    """The sources of the dataset; empty without dataset.sources."""
    overlap: OverlapRecord | None = None
    """Leakage between splits."""
    precision: Precision | None = None
    """Number formats of training and generation."""
    receipt: Receipt | None = None
    """What took effect in training."""
    pruned: Pruned | None = None
    """Why it was stopped by sweep.prune; null otherwise."""
    plan: PlanCell | None = None
    """The result of mode=plan."""
    evaluation: Evaluation | None = None
    """The result of mode=evaluate."""
