"""The optimizer and the learning-rate schedule: their names, and arguments that transformers would refuse."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from sftlab.config import TrainConfig
from sftlab.errors import Problem, shown
from sftlab.validation.libraries import OPTIMIZERS, SCHEDULES

KWARGS = "train.lr_scheduler_kwargs"
# Schedules that transformers refuses to create without one of two arguments.
NEED_A_MINIMUM = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")


def schedule_problems(train: TrainConfig) -> Iterator[Problem]:
    """Yield the problems of the optimizer's name, the schedule's name and the schedule's arguments."""
    if train.optim not in OPTIMIZERS:
        yield Problem("train.optim", shown(train.optim), f"should be one of {', '.join(OPTIMIZERS)}")
    name, arguments = train.lr_scheduler_type, train.lr_scheduler_kwargs
    if name not in SCHEDULES:
        yield Problem("train.lr_scheduler_type", shown(name), f"should be one of {', '.join(SCHEDULES)}")
    elif name == "warmup_stable_decay":
        problems = list(_decay(train))
        yield from problems
        if not problems and arguments.keys() != {"num_decay_steps"}:
            yield from _arguments(train)
    elif name in NEED_A_MINIMUM and not {"min_lr", "min_lr_rate"} & arguments.keys():
        yield Problem(
            "train.lr_scheduler_type",
            name,
            "needs the learning rate of the last step",
            f"write +{KWARGS}.min_lr_rate=0.1 (a share of train.learning_rate)",
            (KWARGS,),
        )
    elif arguments:
        yield from _arguments(train)


def _decay(train: TrainConfig) -> Iterator[Problem]:
    """Check the arguments of get_wsd_schedule: the decay is required, other phases follow from the epochs."""
    steps, key = train.lr_scheduler_kwargs.get("num_decay_steps"), f"{KWARGS}.num_decay_steps"
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        yield Problem(
            key,
            shown(steps) if "num_decay_steps" in train.lr_scheduler_kwargs else None,
            "warmup_stable_decay needs the number of steps at its end in which the learning rate decreases",
            f"write ++{key}=10",
            ("train.lr_scheduler_type",),
        )
    for name in ("num_stable_steps", "num_training_steps", "num_warmup_steps"):
        if name in train.lr_scheduler_kwargs:
            yield Problem(
                f"{KWARGS}.{name}",
                None,
                "follows from train.num_train_epochs, train.warmup_steps and num_decay_steps",
                "leave it out",
                ("train.lr_scheduler_type",),
            )


def _arguments(train: TrainConfig) -> Iterator[Problem]:
    """Check the arguments of a schedule by name, then by creating the schedule."""
    name, known = train.lr_scheduler_type, SCHEDULES[train.lr_scheduler_type]
    unknown = [argument for argument in train.lr_scheduler_kwargs if known is not None and argument not in known]
    for argument in unknown:
        yield Problem(
            f"{KWARGS}.{argument}",
            None,
            f"the schedule {name} takes {', '.join(known or ()) or 'no arguments'}",
            f"{'rename it' if known else 'leave it out'}, or set another train.lr_scheduler_type",
            ("train.lr_scheduler_type",),
        )
    if not unknown and (reason := _refusal(train)):
        yield Problem(
            KWARGS,
            shown(train.lr_scheduler_kwargs),
            f"the schedule {name} refuses it: {reason}",
            "change it, or set another train.lr_scheduler_type",
            ("train.lr_scheduler_type", "train.learning_rate"),
        )


def _refusal(train: TrainConfig) -> str | None:
    """Return why a schedule with these arguments cannot be created or stepped; None if it can."""
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # transformers imports it if it is installed
    import torch
    from transformers.optimization import GreedyLR, get_scheduler

    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]  # as many as the trainer creates
    optimizer = torch.optim.SGD(groups, lr=train.learning_rate)
    schedule: Any
    try:
        schedule = get_scheduler(train.lr_scheduler_type, optimizer, 1, 4, train.lr_scheduler_kwargs)
        by_loss = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau | GreedyLR)
        for step in range(4):
            optimizer.step()
            schedule.step(*([float(step)] if by_loss else []))
    except Exception as error:  # of any type: the arguments are not checked before they are used
        return f"{type(error).__name__}: {error}"
    return None
