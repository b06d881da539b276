"""Weights & Biases: loss curves while training, a table and a figure at the end."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from sftlab.config import TrackingConfig
from sftlab.tracking.base import Result, first_line, named

log = logging.getLogger(__name__)


def environment(cfg: TrackingConfig, folder: Path, name: str, run_id: str) -> dict[str, str]:
    """Environment variables with which a training process logs to wandb.

    Without an API key the run is offline. No key is read here: wandb finds it by itself.
    """
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
        # Otherwise wandb reports its own errors to its server, and waits for it at the end of each process.
        "WANDB_ERROR_REPORTING": "false",
        # Seconds to wait for a server that does not answer, at the start and at the end.
        "WANDB_INIT_TIMEOUT": os.environ.get("WANDB_INIT_TIMEOUT", "15"),
        "WANDB_FINISH_TIMEOUT": os.environ.get("WANDB_FINISH_TIMEOUT", "20"),
        # Not WANDB_MODE, since transformers prints that it has read it; the training process sets it later.
        "SFTLAB_WANDB_MODE": mode(),
    }
    return variables | ({"WANDB_ENTITY": cfg.entity} if cfg.entity else {})


def mode() -> str:
    """WANDB_MODE if it is set, else ``online`` if wandb has a key, else ``offline``."""
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    return "online" if _has_key() else "offline"


def announce(cfg: TrackingConfig, folder: Path) -> None:
    """Log how to upload the curves of an offline run."""
    if mode() == "offline":
        reason = "WANDB_MODE" if "WANDB_MODE" in os.environ else "no API key; `wandb login` stores one"
        log.info("wandb: offline (%s); `wandb sync %s/wandb/offline-run-*` uploads it later", reason, folder)


def begin(mode: str) -> None:
    """Start wandb's run in a training process; offline if the server cannot be reached."""
    import wandb

    os.environ["WANDB_MODE"] = mode
    try:
        wandb.init()
    except Exception as error:  # servers and proxies fail in many ways, and training continues
        os.environ["WANDB_MODE"] = "offline"
        _stop()  # otherwise it retries, and holds the run's name
        log.warning(
            "wandb: cannot be reached (%s); continues offline. `wandb sync %s/wandb/offline-run-*` uploads it later",
            first_line(error),
            os.environ["WANDB_DIR"],
        )


def begin_again(error: Exception) -> bool:
    """Start an offline run with the same id after wandb failed during training. Returns whether it started."""
    import wandb

    where = os.environ["WANDB_DIR"]
    os.environ["WANDB_MODE"] = "offline"
    try:
        _stop()
        wandb.init()
    except Exception as again:
        log.warning(
            "wandb: failed (%s) and cannot be restarted (%s); the curves are in metrics.jsonl",
            first_line(error),
            first_line(again),
        )
        return False
    log.warning(
        "wandb: failed (%s); continues offline. `wandb sync %s/wandb/*run-*` uploads it later",
        first_line(error),
        where,
    )
    return True


def log_result(variables: Mapping[str, str], result: Result) -> None:
    """Add table, figure and summary to the tracking run that training started; offline if the server fails."""
    before = {name: os.environ.get(name) for name in (*variables, "WANDB_MODE")}
    os.environ.update(variables)
    try:
        for attempt in (variables["SFTLAB_WANDB_MODE"], "offline"):
            os.environ["WANDB_MODE"] = attempt
            try:
                _send(result)
            except Exception as error:
                where = f"`wandb sync {variables['WANDB_DIR']}/wandb/*run-*` uploads it later"
                log.warning("wandb: the final table could not be sent (%s); %s", first_line(error), where)
                _stop()
            else:
                break
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _send(result: Result) -> None:
    import wandb

    run = wandb.init(
        id=os.environ["WANDB_RUN_ID"],
        resume="allow",
        settings=wandb.Settings(silent=True, finish_timeout=float(os.environ["WANDB_FINISH_TIMEOUT"])),
    )
    try:
        for row in result.history:
            run.log({"train/global_step": row["step"], **named(row)})
        media: dict[str, object] = {}
        if result.rows:
            media["result"] = wandb.Table(columns=list(result.header), data=[list(row) for row in result.rows])
        if result.figure.is_file():
            media["bias_variance"] = wandb.Image(str(result.figure))
        run.log(media)
        run.summary.update(dict(result.summary))
    finally:
        run.finish()


def _stop() -> None:
    """Stop wandb's own process, which may have failed."""
    import wandb

    with suppress(Exception):
        wandb.teardown()


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
