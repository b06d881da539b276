"""The Hugging Face hub: the only network that a run may use, and only for what its config names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sftlab.errors import ConfigError

# What a model needs to be trained, merged and served; not its other formats.
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*"]


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


def dataset_commit(name: str, revision: str | None) -> str:
    """The commit that a hub dataset's revision names now."""
    from huggingface_hub import HfApi

    with explained(name, "dataset.name_or_path"):
        return str(HfApi().dataset_info(name, revision=revision).sha)


def dataset_rows(name: str, subset: str | None, revision: str | None) -> dict[str, list[dict[str, Any]]]:
    """All rows of a hub dataset by split."""
    from datasets import load_dataset

    with explained(name, "dataset.name_or_path"):
        splits = load_dataset(name, subset, revision=revision)
    return {str(split): [dict(row) for row in rows] for split, rows in splits.items()}


@contextmanager
def explained(name: str, key: str) -> Iterator[None]:
    """Turn the hub's errors into one sentence with the remedy."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{'datasets/' if key.startswith('dataset') else ''}{name}"
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
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, OSError) as error:
        raise ConfigError(
            f"{key}={name!r}: the hub ({constants.ENDPOINT}) cannot be reached and no copy is cached: "
            f"{str(error).splitlines()[0]}; check the network, or give a local folder"
        ) from error
    except ValueError as error:  # an unknown subset
        raise ConfigError(f"{key}={name!r}: {error}; see {page}") from error
