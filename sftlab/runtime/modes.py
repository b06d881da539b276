"""The table of modes: what each value of the key ``mode`` needs, what it writes, and what a sweep may vary.

The functions that carry out a mode are bound in ``sftlab.work``, which has one entry per row of this table.
"""

from __future__ import annotations

from dataclasses import dataclass

TRAINING = ("model", "dataset", "peft", "train", "instance", "seed")
GENERATION = tuple(
    f"eval.{key}"
    for key in ("engine", "max_tokens", "batch_size", "tensor_parallel_size", "gpu_memory_utilization", "kv_cache_gib")
)
# How machines are reserved, find each other and wait. No result depends on these keys.
RESERVATION = tuple(
    f"instance.{key}"
    for key in (
        "name",
        "partition",
        "timeout_min",
        "cpus",
        "node_rank",
        "rdzv_endpoint",
        "rdzv_timeout_min",
        "grace_seconds",
    )
)
# These keys change the memory and time of training, but not the trained weights.
SAME_WEIGHTS = ("train.gradient_checkpointing",)


@dataclass(frozen=True)
class Mode:
    """One value of ``mode``.

    A mode with ``varies`` runs as jobs, which a launcher may start on other machines, and can be swept over the
    sections and keys in ``varies`` except those in ``ignores``. A mode without ``varies`` runs once in the process of
    the command; ``instead`` explains why it cannot be swept.
    """

    name: str

    # What it needs.
    reads_training_rows: bool = False  # training and validation rows, and a model to tokenize them
    reads_test: bool = False  # rows that answers are compared with, and a model to tokenize them
    trains: bool = False
    evaluates: bool = False  # loads a generation engine
    serves: bool = False  # starts vLLM's server
    estimates: bool = False  # memory and time of training and generation
    works_on: str = ""  # key that names existing files or folders

    # What it writes into the run's folder, besides the logs. Nothing for a mode that only prints.
    writes: tuple[str, ...] = ()

    # What a sweep may vary.
    varies: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    result: str = ""  # what a job computes, for messages
    instead: str = ""

    @property
    def reads_data(self) -> bool:
        """Whether it reads a dataset and loads a tokenizer, as opposed to the files of finished runs."""
        return self.reads_training_rows or self.reads_test

    @property
    def evaluates_after_jobs(self) -> bool:
        """Whether the command generates answers itself when its jobs are done."""
        return self.trains and self.evaluates

    @property
    def has_jobs(self) -> bool:
        """Whether it runs as jobs."""
        return bool(self.varies)

    @property
    def has_record(self) -> bool:
        """Whether the run has a ``run.json``."""
        return "run.json" in self.writes

    @property
    def has_page(self) -> bool:
        """Whether the run has a ``report.html``."""
        return "report.html" in self.writes

    def depends_on(self, key: str) -> bool:
        """Whether the result of a job depends on a config key."""

        def within(sections: tuple[str, ...]) -> bool:
            return any(key == section or key.startswith(f"{section}.") for section in sections)

        return within(self.varies) and not within(self.ignores)


TRAINED = ("run.json", "job.json", "best", "loss.png", "metrics.jsonl", "sweep.csv", "report.html")

MODES = {
    mode.name: mode
    for mode in (
        Mode(
            "all",
            reads_training_rows=True,
            reads_test=True,
            trains=True,
            evaluates=True,
            writes=(*TRAINED, "merged", "predictions", "model_card.md"),
            varies=TRAINING,
            ignores=(*RESERVATION, *SAME_WEIGHTS),
            result="the trained weights",
        ),
        Mode(
            "train",
            reads_training_rows=True,
            trains=True,
            writes=TRAINED,
            varies=TRAINING,
            ignores=(*RESERVATION, *SAME_WEIGHTS),
            result="the trained weights",
        ),
        Mode(
            "evaluate",
            reads_test=True,
            evaluates=True,
            works_on="eval.name_or_path",
            writes=("run.json", "job.json", "predictions", "report.html"),
            varies=("model", "dataset", "eval", "instance", "seed"),
            ignores=("eval.predictions", "eval.hoped_difference", "eval.stall_min", *RESERVATION),
            result="the answers",
        ),
        Mode(
            "plan",
            reads_training_rows=True,
            estimates=True,
            writes=("run.json", "job.json"),
            varies=(*TRAINING, *GENERATION, "plan"),
            ignores=RESERVATION,
            result="memory and time",
        ),
        Mode(
            "preview",
            reads_training_rows=True,
            reads_test=True,
            writes=("run.json", "preview.html"),
            instead="it shows the rows of one dataset",
        ),
        Mode(
            "compare",
            works_on="eval.predictions",
            writes=("run.json", "predictions", "report.html"),
            instead="it compares the two files of eval.predictions",
        ),
        Mode(
            "report",
            works_on="hydra.run.dir",
            writes=("report.html",),
            instead="it renders the run in hydra.run.dir, which may be a sweep",
        ),
        Mode("clean", instead="it examines one store"),
        Mode("runs", instead="it lists all runs"),
        Mode("serve", evaluates=True, serves=True, works_on="run", instead="it serves the models of one run"),
        Mode("chat", evaluates=True, serves=True, works_on="run", instead="it is a conversation"),
        Mode("page", evaluates=True, serves=True, works_on="run", instead="it is a conversation"),
        Mode("export", evaluates=True, works_on="run", instead="it exports the model of one run"),
    )
}
