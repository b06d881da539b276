"""The training process, with accelerate patched to shard a model on CPUs, where it would use DDP.

If the variable LOSS_AS_ON_GPU is set, the loss is TRL's own, which must be in float32.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState

from sftlab.runtime.processes import INPUTS, serve
from sftlab.train import trainer
from sftlab.train.worker import TrainTask, run

begin = AcceleratorState.__init__


def as_gpus(self: Any, *args: Any, **options: Any) -> None:
    if not AcceleratorState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    begin(self, *args, **options)


def fused_losses(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    mask = inputs["labels"][:, 1:] != -100
    log_probs = model(**inputs, fused_lm_head=True).log_probs
    assert log_probs.dtype == torch.float32, log_probs.dtype
    inputs.pop("labels")
    return -log_probs[mask], mask.nonzero()[:, 0]


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1], INPUTS).read_text("utf-8"))
    if task["machine"]["strategy"] == "fsdp":
        AcceleratorState.__init__ = as_gpus
    if "LOSS_AS_ON_GPU" in os.environ:
        trainer.token_losses = fused_losses
    serve(TrainTask, run)
