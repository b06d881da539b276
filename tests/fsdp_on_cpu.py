"""The training child, with accelerate told that CPUs may share a model out as GPUs do. It would train by DDP."""

from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState

from sftlab.launch import serve
from sftlab.stages.train import run

begin = AcceleratorState.__init__


def as_gpus(self: Any, *args: Any, **options: Any) -> None:
    if not AcceleratorState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    begin(self, *args, **options)


if __name__ == "__main__":
    AcceleratorState.__init__ = as_gpus
    serve(run)
