"""Results outside of the run's folder: the model card beside the merged model, the hub, and experiment tracking."""

from __future__ import annotations

import logging
from pathlib import Path

from sftlab.config import Config
from sftlab.errors import ConfigError, Problem, StageError, shown
from sftlab.model.hub import MODEL_FILES, explained
from sftlab.records import read_jsonl
from sftlab.report import tables
from sftlab.report.card import card
from sftlab.runtime.job import Job
from sftlab.runtime.run import Run
from sftlab.tracking import tracker
from sftlab.tracking.base import Result

log = logging.getLogger(__name__)

PUSH_KEY = "hub.repo_id"
# Files of sftlab in a merged model's folder: they have paths of this machine and are of no use elsewhere.
OWN_FILES = ["manifest.json", "inputs.json", "check.json", "error.json"]


def publish(run: Run, cfg: Config) -> None:
    """Write the model card of an evaluated run, and push model and card to the hub if hub.push is true."""
    if run.record.evaluation is None:
        return
    text = write_card(run, cfg)
    made = run.record.evaluation.decision
    if cfg.hub.push and cfg.eval.gate and (made is None or made.outcome != "ship"):
        log.warning("hub.push: nothing is pushed, because eval.gate=true and the decision is not to ship")
    elif cfg.hub.push:
        assert cfg.hub.repo_id is not None
        url = push(run.folder / "merged", cfg.hub.repo_id, private=cfg.hub.private, readme=text)
        log.info("hub: pushed to %s", url)


def write_card(run: Run, cfg: Config) -> str:
    """Write the model card of a run into its folder; ``cfg`` is of the job whose checkpoint was selected."""
    text = card(run.record, cfg)
    (run.folder / "model_card.md").write_text(text, encoding="utf-8")
    return text


def push(folder: Path, repo_id: str, *, private: bool, readme: str | None = None) -> str:
    """Upload a saved model to the hub, into a repository that is created if it does not exist. Returns its address.

    Files of sftlab in the model's folder are left out. ``readme`` is the model card, which need not be in the
    folder. With ``private``, an existing public repository is refused.

    Raises:
        ConfigError: The hub refuses it, or cannot be reached.
        StageError: The folder has no model.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if not (folder / "config.json").is_file():
        raise StageError(f"{folder}: has no saved model (no config.json); name the folder of a saved model")
    api = HfApi()
    with explained(repo_id, PUSH_KEY):
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            name = url.repo_id
            if private and not api.model_info(name).private:
                raise ConfigError(
                    Problem(PUSH_KEY, shown(name), "is public", f"make it private at {url}/settings, or name another")
                )
            allowed = [*MODEL_FILES, "*.py", "README.md"]
            api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=allowed, ignore_patterns=[*OWN_FILES])
            if readme is not None:
                api.upload_file(path_or_fileobj=readme.encode(), path_in_repo="README.md", repo_id=name)
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            raise ConfigError(
                Problem(
                    PUSH_KEY,
                    shown(repo_id),
                    f"the hub ({constants.ENDPOINT}) does not let you write there",
                    "log in by `hf auth login` with a token that may write, and check the owner's name",
                )
            ) from error
    return str(url)


def track(run: Run, cfg: Config, job: Job) -> None:
    """Log the results to the tracking run of the selected job, with its history if it trained in an earlier run."""
    selection, evaluation = run.record.selection, run.record.evaluation
    assert selection is not None
    summary = {"best_eval_loss": selection.eval_loss, "best_epoch": selection.epoch, "best_step": selection.step}
    table = tables.Table([], [])
    if evaluation is not None:
        summary |= {f"{key}_{result.metric}": result.value for key, _, result in tables.models(evaluation)}
        table = tables.results(evaluation)
    history = [] if job.times["train"] > 0 else list(read_jsonl(Path(job.stages["train"]) / "metrics.jsonl"))
    result = Result(summary, table.header, table.rows, run.folder / "loss.png", history)
    tracker.log_result(tracker.of_job(cfg, job, job.folder), result)
