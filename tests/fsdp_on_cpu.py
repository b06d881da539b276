"""The training child, with accelerate made to shard a model on CPUs as on GPUs. It would train by DDP.

With ``as_on_gpu`` among its inputs the loss is TRL's own, as on a GPU, and must be in float32.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState

from sftlab.runtime.processes import INPUTS, serve
from sftlab.train import trainer
from sftlab.train.stage import TrainTask, run

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
    given = json.loads(Path(sys.argv[1], INPUTS).read_text("utf-8"))
    if given["machine"]["strategy"] == "fsdp":
        AcceleratorState.__init__ = as_gpus
    if given.get("as_on_gpu"):
        trainer._token_losses = fused_losses
    serve(TrainTask, run)
