"""Weights & Biases: curves while training, tables and figures at the end."""

from __future__ import annotations

import logging
import netrc
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from sftlab.config import TrackingConfig

log = logging.getLogger(__name__)


def environment(cfg: TrackingConfig, folder: Path, name: str, run_id: str) -> dict[str, str]:
    """Variables with which a training process logs to wandb; empty without tracking.

    Without an API key wandb goes offline. No key is read here: wandb finds it by itself.
    """
    if cfg.backend == "none":
        return {}
    variables = {
        "WANDB_PROJECT": cfg.project,
        "WANDB_DIR": str(folder),
        "WANDB_RUN_ID": run_id,
        "WANDB_NAME": name,
        "WANDB_RESUME": "allow",
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_DISABLE_CODE": "true",
        "WANDB_DISABLE_GIT": "true",
        # Or wandb tells its server how it fares itself, and waits for it at the end of each process.
        "WANDB_ERROR_REPORTING": "false",
        # Seconds that a server which does not answer may cost at the beginning and at the end.
        "WANDB_INIT_TIMEOUT": os.environ.get("WANDB_INIT_TIMEOUT", "15"),
        "WANDB_FINISH_TIMEOUT": os.environ.get("WANDB_FINISH_TIMEOUT", "20"),
        # Not WANDB_MODE, of which transformers prints that it was read; the training process sets it later.
        "SFTLAB_WANDB_MODE": mode(),
    }
    return variables | ({"WANDB_ENTITY": cfg.entity} if cfg.entity else {})


def mode() -> str:
    """``online`` where wandb has a key, else ``offline``; WANDB_MODE has the last word."""
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    return "online" if _has_key() else "offline"


def announce(cfg: TrackingConfig, folder: Path) -> None:
    """Say in one line where the curves go."""
    if cfg.backend == "wandb" and mode() == "offline":
        reason = "WANDB_MODE" if "WANDB_MODE" in os.environ else "no API key; `wandb login` makes one known"
        log.info("wandb: offline (%s); `wandb sync %s/wandb/offline-run-*` sends it later", reason, folder)


def begin(mode: str) -> None:
    """Start wandb's run in a training process; offline if the server cannot be reached, for training goes on."""
    import wandb

    os.environ["WANDB_MODE"] = mode
    try:
        wandb.init()
    except Exception as error:  # servers and proxies find many ways to fail, and none is a reason not to train
        os.environ["WANDB_MODE"] = "offline"
        _give_up()  # it would go on trying, and hold the run's name
        log.warning(
            "wandb: cannot be reached (%s); goes on offline, and `wandb sync %s/wandb/offline-run-*` sends it later",
            _first_line(error),
            os.environ["WANDB_DIR"],
        )


def begin_again(error: Exception) -> bool:
    """After wandb failed in mid-run: an offline run of the same id, where one can be started."""
    import wandb

    where = os.environ["WANDB_DIR"]
    os.environ["WANDB_MODE"] = "offline"
    try:
        _give_up()
        wandb.init()
    except Exception as again:
        log.warning(
            "wandb: failed (%s) and cannot be started again (%s); the curves are in metrics.jsonl",
            _first_line(error),
            _first_line(again),
        )
        return False
    log.warning(
        "wandb: failed (%s); goes on offline, and `wandb sync %s/wandb/*run-*` sends it later",
        _first_line(error),
        where,
    )
    return True


def log_result(
    variables: dict[str, str],
    summary: dict[str, Any],
    table: list[list[Any]],
    figure: Path,
    history: list[dict[str, Any]],
) -> None:
    """Add the final table, the figure and the summary to the run that training began; offline if need be.

    ``history`` is what an earlier run's training logged, where this one found it finished and trained nothing.
    """
    if not variables:
        return
    before = {name: os.environ.get(name) for name in (*variables, "WANDB_MODE")}
    os.environ.update(variables)
    try:
        for attempt in (variables["SFTLAB_WANDB_MODE"], "offline"):
            os.environ["WANDB_MODE"] = attempt
            try:
                _send(summary, table, figure, history)
            except Exception as error:
                where = f"`wandb sync {variables['WANDB_DIR']}/wandb/*run-*` sends it later"
                log.warning("wandb: the final table could not be sent (%s); %s", _first_line(error), where)
                _give_up()
            else:
                break
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _send(summary: dict[str, Any], table: list[list[Any]], figure: Path, history: list[dict[str, Any]]) -> None:
    import wandb

    run = wandb.init(
        id=os.environ["WANDB_RUN_ID"],
        resume="allow",
        settings=wandb.Settings(silent=True, finish_timeout=float(os.environ["WANDB_FINISH_TIMEOUT"])),
    )
    try:
        for row in history:
            named = {
                f"{'eval' if name.startswith('eval_') else 'train'}/{name.removeprefix('eval_')}": value
                for name, value in row.items()
                if isinstance(value, int | float)
            }
            run.log({"train/global_step": row["step"], **named})
        header, *rows = table
        result: dict[str, Any] = {"result": wandb.Table(columns=header, data=[list(map(str, row)) for row in rows])}
        if figure.is_file():
            result["bias_variance"] = wandb.Image(str(figure))
        run.log(result)
        run.summary.update(summary)
    finally:
        run.finish()


def _give_up() -> None:
    """End wandb's own process, which may be what failed."""
    import wandb

    with suppress(Exception):
        wandb.teardown()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
