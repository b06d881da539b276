"""Access to the Hugging Face hub, for the models and datasets that a configuration names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftlab.dataset.arrow_rows import BATCH
from sftlab.dataset.formats import Batch, Chunk
from sftlab.errors import ConfigError, Problem, StageError, shown

logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs every request

# Suffixes of the files that from_pretrained reads, besides code. Weights in other formats are not read.
READ = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".bpe", ".safetensors")
# Files that are needed to train, merge and serve a model, without its other formats.
MODEL_FILES = [*(f"*{suffix}" for suffix in READ), "tokenizer*"]


def model_snapshot(name: str, revision: str | None, *, code: bool) -> tuple[Path, str]:
    """Download a model into the hub's cache, if it is not there; return its folder and commit.

    Args:
        name: hub id.
        revision: branch, tag or commit; None for the default branch.
        code: whether to download the Python files of the repository too.

    Raises:
        ConfigError: the model is gated, does not exist, or the hub cannot be reached.
        StageError: the cache cannot be written.
    """
    from huggingface_hub import snapshot_download

    with explained(name, "model.name_or_path"):
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=[*MODEL_FILES, *(["*.py"] if code else [])])
        )
    return folder, folder.name


def check_model(name: str, revision: str | None, key: str) -> None:
    """Check by a small request, without downloading it, that a model can be downloaded or is in the hub's cache.

    Raises:
        ConfigError: the model is gated, does not exist, has no weights as safetensors, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return  # resolving the model reports what the cache lacks
    with explained(name, key):
        try:
            snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES, local_files_only=True)
        except LocalEntryNotFoundError:
            api = HfApi()
            api.get_hf_file_metadata(url=hf_hub_url(name, "config.json", revision=revision))
            if not any(file.endswith(".safetensors") for file in api.list_repo_files(name, revision=revision)):
                raise ConfigError(
                    Problem(
                        key,
                        shown(name),
                        "has no weights as safetensors, and pickled weights can run code",
                        "name a model with safetensors",
                    )
                ) from None


def check_dataset(name: str, revision: str | None, key: str) -> None:
    """Check that a dataset can be downloaded.

    Raises:
        ConfigError: the dataset is gated, does not exist, or the hub cannot be reached.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        dataset_commit(name, revision, key)


def dataset_commit(name: str, revision: str | None, key: str = "dataset.name_or_path") -> str:
    """Return the commit that a revision of a hub dataset names now. A full commit hash needs no request."""
    from huggingface_hub import HfApi

    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    with explained(name, key):
        info = HfApi().dataset_info(name, revision=revision)
        if info.gated:  # its description is public even if its files are not
            HfApi().auth_check(name, repo_type="dataset")
        return str(info.sha)


def dataset_rows(
    name: str, subset: str | None, revision: str | None, key: str = "dataset.name_or_path"
) -> tuple[dict[str, HubRows], dict[str, int]]:
    """Return the rows of a hub dataset by split, and their numbers."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    with explained(name, key):
        try:
            splits = load_dataset(name, subset, revision=revision)
        except DatasetsError as error:
            raise ValueError(error.__cause__ or error) from error
    rows = {str(split): HubRows(rows) for split, rows in splits.items()}
    return rows, {split: len(hub.rows) for split, hub in rows.items()}


@dataclass(frozen=True)
class HubRows:
    """The rows of a split of a hub dataset, a ``datasets.Dataset``."""

    rows: Any

    def __iter__(self) -> Iterator[Chunk]:
        return map(Batch, self.rows.with_format("arrow").iter(BATCH))


@contextmanager
def explained(name: str, key: str) -> Iterator[None]:
    """Convert errors of the hub to a ``ConfigError``, or to a ``StageError`` if its cache cannot be written."""
    from httpx2 import TransportError
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{'datasets/' if 'dataset' in key else ''}{name}"
    try:
        yield
    except GatedRepoError as error:
        raise ConfigError(
            Problem(
                key,
                shown(name),
                "is gated and you have no access yet",
                f"accept its terms at {page}, then log in with `hf auth login` (or set HF_TOKEN)",
            )
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(Problem(key, shown(name), "has no such revision", f"see {page}")) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            Problem(
                key,
                shown(name),
                f"is neither a local path nor a repository that you can see at {page}",
                "check the name, and log in with `hf auth login` if it is private",
            )
        ) from error
    except RemoteEntryNotFoundError as error:
        raise ConfigError(
            Problem(key, shown(name), "has no config.json", f"name a saved model, see {page}/tree/main")
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, TransportError, ConnectionError) as error:
        raise ConfigError(
            Problem(
                key,
                shown(name),
                f"the hub ({constants.ENDPOINT}) cannot be reached and no copy is cached: {_first_line(error)}",
                "check the network, or name a local folder",
            )
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ConfigError(
                Problem(
                    key,
                    shown(name),
                    f"the hub ({constants.ENDPOINT}) refuses your token ({error.response.status_code})",
                    f"log in with `hf auth login` (or set HF_TOKEN), and see {page} for who may read it",
                )
            ) from error
        raise ConfigError(
            Problem(
                key,
                shown(name),
                f"the hub ({constants.ENDPOINT}) answered {error.response.status_code}: {_first_line(error)}",
                f"see {page}, or try again later",
            )
        ) from error
    except HFValidationError as error:
        raise ConfigError(
            Problem(key, shown(name), "is neither a local path nor a hub id (owner/name)", "check it")
        ) from error
    except (ValueError, RuntimeError) as error:  # an unknown subset, a dataset script, files with different columns
        raise ConfigError(Problem(key, shown(name), _first_line(error), f"see {page}")) from error
    except OSError as error:
        raise StageError(
            f"{key}={name!r}: cannot be written to the hub's cache ({constants.HF_HOME}): {error.strerror or error}; "
            "free some space, or set HF_HOME to another folder"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
