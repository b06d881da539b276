"""The modes of a run: what each of them works on, what it writes, and what a sweep of it may vary."""

from __future__ import annotations

from dataclasses import dataclass

TRAINING = ("model", "dataset", "peft", "train", "instance", "seed")
GENERATION = tuple(
    f"eval.{key}"
    for key in ("engine", "max_tokens", "batch_size", "tensor_parallel_size", "gpu_memory_utilization", "kv_cache_gib")
)
# How machines find each other, wait and are reserved: no result depends on it.
RESERVED = tuple(
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
# What training takes, and not what comes of it.
SAME_WEIGHTS = ("train.gradient_checkpointing",)


@dataclass(frozen=True)
class Mode:
    """One value of ``mode``.

    ``varies`` names the sections and keys that a job's result depends on, without those in ``ignores``: a sweep may
    vary these and no others. A mode without any cannot be swept, and ``instead`` says what to do.
    """

    name: str
    varies: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    instead: str = ""
    trains: bool = False
    evaluates: bool = False  # loads a generation engine
    reads_data: bool = False  # a dataset and a model, and not only the files of finished runs
    reads_test: bool = False  # and the targets of its test rows
    records: bool = True  # writes run.json

    @property
    def has_jobs(self) -> bool:
        """Whether the work is done in jobs, which a launcher may start elsewhere."""
        return bool(self.varies)

    def depends_on(self, key: str) -> bool:
        """Whether the result of a job depends on a key of the configuration."""

        def within(sections: tuple[str, ...]) -> bool:
            return any(key == section or key.startswith(f"{section}.") for section in sections)

        return within(self.varies) and not within(self.ignores)


MODES = {
    mode.name: mode
    for mode in (
        Mode(
            "all",
            TRAINING,
            ignores=(*RESERVED, *SAME_WEIGHTS),
            trains=True,
            evaluates=True,
            reads_data=True,
            reads_test=True,
        ),
        Mode("train", TRAINING, ignores=(*RESERVED, *SAME_WEIGHTS), trains=True, reads_data=True),
        Mode(
            "evaluate",
            ("model", "dataset", "eval", "instance", "seed"),
            ignores=("eval.predictions", "eval.hoped_difference", "eval.stall_min", *RESERVED),
            evaluates=True,
            reads_data=True,
            reads_test=True,
        ),
        Mode("plan", (*TRAINING, *GENERATION, "plan"), ignores=RESERVED, reads_data=True),
        Mode(
            "preview",
            instead="it shows the rows of one dataset",
            reads_data=True,
            reads_test=True,
        ),
        Mode("compare", instead="it compares the two files of eval.predictions"),
        Mode("report", instead="it renders the run in hydra.run.dir, a sweep's folder too", records=False),
        Mode("clean", instead="it looks at one store", records=False),
    )
}
