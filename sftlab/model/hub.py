"""The Hugging Face hub: the only network that a run may use, and only for what its config names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sftlab.dataset.formats import Rows, dense
from sftlab.errors import ConfigError, StageError

logging.getLogger("httpx2").setLevel(logging.WARNING)  # it tells every request

# What from_pretrained reads of a folder, besides code. Weights in other formats are not read.
READ = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".bpe", ".safetensors")
# What a model needs to be trained, merged and served; not its other formats.
MODEL_FILES = [*(f"*{suffix}" for suffix in READ), "tokenizer*"]


def model_snapshot(name: str, revision: str | None, *, code: bool) -> tuple[Path, str]:
    """The folder of a model's files (downloaded once, kept in the hub's cache) and its commit.

    Args:
        name: hub id.
        revision: branch, tag or commit; None is the default branch.
        code: whether Python files of the repository are fetched too.
    """
    from huggingface_hub import snapshot_download

    with explained(name, "model.name_or_path"):
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=[*MODEL_FILES, *(["*.py"] if code else [])])
        )
    return folder, folder.name


def check_model(name: str, revision: str | None, key: str) -> None:
    """Whether a model can be fetched, or is in the hub's cache: one small request, nothing is downloaded.

    Raises:
        ConfigError: it is gated, does not exist, is no saved model, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return  # nothing can be asked; what the cache lacks is told when it is needed
    with explained(name, key):
        try:
            snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES, local_files_only=True)
        except LocalEntryNotFoundError:
            api = HfApi()
            api.get_hf_file_metadata(url=hf_hub_url(name, "config.json", revision=revision))
            if not any(file.endswith(".safetensors") for file in api.list_repo_files(name, revision=revision)):
                raise ConfigError(
                    f"{key}={name!r}: has no weights as safetensors, and pickled ones may run code; "
                    "name a model that has them"
                ) from None


def check_dataset(name: str, revision: str | None, key: str) -> None:
    """Whether a dataset can be fetched.

    Raises:
        ConfigError: it is gated, does not exist, or the hub cannot be reached.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        dataset_commit(name, revision, key)


def dataset_commit(name: str, revision: str | None, key: str = "dataset.name_or_path") -> str:
    """The commit that a hub dataset's revision names now. A whole commit hash names itself, without the hub."""
    from huggingface_hub import HfApi

    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    with explained(name, key):
        info = HfApi().dataset_info(name, revision=revision)
        if info.gated:  # its description is public, its files may not be
            HfApi().auth_check(name, repo_type="dataset")
        return str(info.sha)


def dataset_rows(name: str, subset: str | None, revision: str | None) -> dict[str, Rows]:
    """All rows of a hub dataset by split."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    with explained(name, "dataset.name_or_path"):
        try:
            splits = load_dataset(name, subset, revision=revision)
        except DatasetsError as error:
            raise ValueError(error.__cause__ or error) from error
        return {
            str(split): dense(map(dict, rows), rows.features.arrow_schema if rows.features else None)
            for split, rows in splits.items()
        }


@contextmanager
def explained(name: str, key: str) -> Iterator[None]:
    """Turn the hub's errors into one sentence with the remedy."""
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
            f"{key}={name!r}: is gated and you have no permission yet; accept its terms at {page}, "
            "then log in with `hf auth login` (or set HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{key}={name!r}: has no such revision; see {page}") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{key}={name!r}: is neither a local path nor a repository that you can see at {page}; "
            "check the name, and log in with `hf auth login` if it is private"
        ) from error
    except RemoteEntryNotFoundError as error:
        raise ConfigError(f"{key}={name!r}: has no config.json; give a saved model, see {page}/tree/main") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, TransportError, ConnectionError) as error:
        raise ConfigError(
            f"{key}={name!r}: the hub ({constants.ENDPOINT}) cannot be reached and no copy is cached: "
            f"{_first_line(error)}; check the network, or give a local folder"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ConfigError(
                f"{key}={name!r}: the hub ({constants.ENDPOINT}) refuses your token ({error.response.status_code}); "
                f"log in with `hf auth login` (or set HF_TOKEN), and see {page} for who may read it"
            ) from error
        raise ConfigError(
            f"{key}={name!r}: the hub ({constants.ENDPOINT}) answered {error.response.status_code}: "
            f"{_first_line(error)}; see {page}, or try again later"
        ) from error
    except HFValidationError as error:
        raise ConfigError(f"{key}={name!r}: is neither a local path nor a hub id (owner/name); check it") from error
    except (ValueError, RuntimeError) as error:  # an unknown subset, a dataset that is a script, files that do not fit
        raise ConfigError(f"{key}={name!r}: {_first_line(error)}; see {page}") from error
    except OSError as error:
        raise StageError(
            f"{key}={name!r}: cannot be kept in the hub's cache ({constants.HF_HOME}): {error.strerror or error}; "
            "free some space, or set HF_HOME to another folder"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
