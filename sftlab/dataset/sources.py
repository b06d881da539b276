"""Read files, folders and hub datasets: find the splits of a source, and the rows of each split."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sftlab.dataset.content import SUFFIXES, stem, suffix_of
from sftlab.dataset.formats import Chunk, FileRows
from sftlab.dataset.wording import listing
from sftlab.errors import ConfigError, Problem

log = logging.getLogger(__name__)

# Words by which the names of files and hub splits indicate a split.
NAMES = {
    "train": {"train", "training", "trainset", "traindata"},
    "validation": {
        *("validation", "valid", "val", "dev", "eval", "evaluation"),
        *("validationset", "validset", "valset", "devset", "evalset"),
        *("validationdata", "validdata", "valdata", "devdata", "evaldata"),
    },
    "test": {"test", "testing", "testset", "testdata"},
}
# Files next to data that describe it. Of those that match DOCUMENTS, a file is data if it has rows.
DESCRIPTIONS = re.compile(r"(dataset_infos?|dataset_dict|state|croissant)\.json", re.IGNORECASE)
DOCUMENTS = re.compile(
    r"(readme|licen[cs]e|notice|changelog|citation|authors|contributing|makefile|dockerfile|checksums?|sha256sums?"
    r"|md5sums?|requirements|metadata)\b.*"
    r"|.*\.(md|rst|html?|pdf|py|ipynb|sh|yaml|yml|toml|cfg|ini|lock|log|bib|sha256|md5"
    r"|png|jpe?g|svg|gif|webp|bmp|tiff?|wav|mp3|mp4|flac|ogg)",
    re.IGNORECASE,
)
# Files that hold data in some format, supported or not.
DATA = re.compile(
    r".*\.(jsonl?|ndjson|jl|csv|tsv|psv|txt|parquet|arrow|feather|orc|avro|xlsx?|ods|xml|zip|7z|tar|tgz|gz|bz2|xz|zst|lz4"
    r"|h5|hdf5|pkl|pickle|npy|npz|pt|db|sqlite3?|duckdb|tfrecord|lance|msgpack|sql|part|incomplete|crdownload|data|dat)"
    r"(\.(bak|old|orig|backup|tmp|[0-9]+)|~)?",
    re.IGNORECASE,
)


class _MissingShardError(ValueError):
    """A split lacks some of its shards."""


Source = Mapping[str, Iterable[Chunk]]
"""The chunks of rows by split, in any number of passes. The split of a source with a single one is called ``all``."""


class Files:
    """The rows of the files of a split."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [FileRows(file) for file in files]

    def __iter__(self) -> Iterator[Chunk]:
        return chain.from_iterable(self._files)


def is_data(name: str) -> bool:
    """Return whether a name has the suffix of a supported format."""
    return suffix_of(Path(name)) is not None


def files(path: Path) -> dict[str, list[Path]]:
    """Return the files of a source by split.

    A file is a single split. The splits of a folder are those that its files are named after. A split may have shards
    (``train-00000-of-00002.parquet``). A file without a split in its name is the whole source if it is the only file.

    Raises:
        ConfigError: a file would not be read, or its split is not clear.
    """
    if path.is_file():
        return {"all": [path]}

    def refused(message: str, remedy: str = "") -> ConfigError:
        return ConfigError(Problem(str(path), None, message, remedy))

    entries = {file.name: file for file in sorted(path.iterdir(), key=_natural) if not file.name.startswith(".")}
    broken = [name for name, file in entries.items() if not file.exists() and not _is_document(file)]
    if broken:
        link = entries[broken[0]].readlink()
        raise refused(
            f"{listing(broken, 5)} cannot be read: a link to {link}, which is not there",
            "fetch that file, or remove the link",
        )
    data = {name: stem(file) for name, file in entries.items() if file.is_file() and _is_readable(file)}
    left = [name for name, file in entries.items() if name not in data and (_may_be_data(file) or _has_data(file))]
    if not data and not left:
        raise refused(f"has no {', '.join(SUFFIXES)} file", "check the path")
    try:
        splits, other = _by_split(data, shards=True)
    except _MissingShardError as error:
        raise refused(str(error)) from error
    except ValueError as error:
        split = any(map(_splits, data.values()))
        named = "" if split else "name each after its split (train, validation or test), "
        remedy = f"{named}keep one of them in the folder, or name one file instead of the folder"
        raise refused(str(error), remedy) from error
    left = sorted([*left, *other])
    folders = [name for name in left if entries[name].is_dir()]
    if left and not splits and left == folders:
        raise refused(f"has data in folders only ({listing(folders, 5)})", "name one of them")
    if left:
        unsupported = any(entries[name].is_file() and not suffix_of(entries[name]) for name in left)
        raise refused(
            f"{listing(left, 5)} would not be read",
            "move what is not data out of the folder, and name the rest after a split (train, validation or test) "
            f"with one of {', '.join(SUFFIXES)} as suffix{', after converting it' if unsupported else ''}",
        )
    return {split: [entries[name] for name in names] for split, names in splits.items()}


def read(path: Path) -> Source:
    """Return the rows of a file or folder.

    Raises:
        ConfigError: a file would not be read, or its split is not clear.
    """
    return {split: Files(shards) for split, shards in files(path).items()}


def without_rows(path: Path, split: str) -> Problem:
    """Return the problem of a split of a folder whose files have no rows."""
    cut = "" if split == "train" else ", or remove it to have them cut from train"
    names = listing(file.name for file in files(path)[split])
    return Problem(str(path), None, f"{names} has no rows", f"write the {split} rows into it{cut}")


def read_hub(name: str, splits: Mapping[str, Iterable[Chunk]], sizes: Mapping[str, int]) -> Source:
    """Assign the splits of a hub dataset to train, validation and test.

    Args:
        name: the dataset.
        splits: the chunks of each of its splits.
        sizes: the number of rows of each.

    Raises:
        ConfigError: several of its splits could be the same split, or a split has no rows.
    """

    def refused(message: str, which: str) -> ConfigError:
        remedy = (
            f"write {which} to files with datasets.load_dataset({name!r}, split=…).to_json('train.jsonl'), and set "
            "name_or_path to their folder"
        )
        return ConfigError(Problem(name, None, message, remedy))

    try:
        known, other = _by_split({split: split for split in splits}, shards=False)
    except ValueError as error:
        raise refused(str(error), "the splits to use") from error
    if empty := [split for names in known.values() for split in names if not sizes[split] and len(known) > 1]:
        raise refused(f"the split {empty[0]} has no rows", "the others")
    if other:
        log.warning("%s: the splits %s are not used; %s are", name, listing(other), listing(known))
    return {split: splits[names[0]] for split, names in known.items()}


def _is_readable(file: Path) -> bool:
    return suffix_of(file) is not None and not _is_document(file)


def _is_document(file: Path) -> bool:
    """Return whether a file describes the data. A table has rows whatever its name; a JSON file may hold settings."""
    if DESCRIPTIONS.fullmatch(file.name):
        return True
    if not DOCUMENTS.fullmatch(file.name) or suffix_of(file) not in (None, ".json"):
        return False
    if suffix_of(file) is None:
        return not any(suffix.lower() in SUFFIXES for suffix in file.suffixes)
    try:
        return sum(len(chunk.table().rows) for chunk in islice(FileRows(file), 2)) < 2
    except (ConfigError, OSError):
        return True


def _may_be_data(file: Path) -> bool:
    """Return whether an unsupported file may be data: its suffix is not that of a document, or it names a split."""
    return file.is_file() and not _is_document(file) and bool(file.suffix or _splits(file.name))


def _has_data(folder: Path) -> bool:
    """Return whether a folder has data at any depth."""
    if not folder.is_dir():
        return False
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = [Path(top, name) for name in names if not name.startswith(".")]
        if any(_is_readable(file) or (_may_be_data(file) and _is_named_as_data(file)) for file in files):
            return True
    return False


def _is_named_as_data(file: Path) -> bool:
    """Return whether the name of an unsupported file is that of data. Folders next to data hold files of many kinds."""
    return bool(DATA.fullmatch(file.name)) or bool(_splits(file.name))


def _natural(file: Path) -> list[Any]:
    """Return a sort key that orders numbers in a name by value."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", file.name)]


def _splits(stem: str) -> set[str]:
    """Return the splits that occur in a name as words: ``X_train``, ``train-00000-of-00002``, ``test2``."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", stem)  # trainData, medqaTest
    words = [word.rstrip("0123456789") for word in re.split(r"[^a-z0-9]+", spaced.lower())]
    return {split for split, names in NAMES.items() if not names.isdisjoint(words)}


def _by_split(stems: Mapping[str, str], *, shards: bool) -> tuple[dict[str, list[str]], list[str]]:
    """Group names by split; return the groups, and the names without a split.

    Args:
        stems: for each name, the part that may indicate a split.
        shards: whether several names of a split may be its shards.

    Raises:
        ValueError: a name has two splits, or a split has several names that are not its shards.
    """
    known: dict[str, list[str]] = {}
    other: list[str] = []
    for name, words in stems.items():
        splits = sorted(_splits(words))
        if len(splits) > 1:
            raise ValueError(f"{name} may be {' or '.join(splits)}")
        (known.setdefault(splits[0], []) if splits else other).append(name)
    if not known and other:
        known, other = {"all": other}, []
    for split, names in known.items():
        if not shards or not _are_shards(names):
            if shards and (missing := _missing(names)):
                raise _MissingShardError(
                    f"{listing(names, 5)}: only {len(names)} of {len(names) + len(missing)} shards are there; fetch "
                    f"{listing(missing, 5)} too"
                )
            if len(names) > 1:
                of = "a single source" if split == "all" else split
                raise ValueError(f"{listing(names, 8)} would be merged into {of}")
    if set(known) == {"train"}:
        known = {"all": known["train"]}
    return known, other


HASH = re.compile(r"([0-9]+-of-[0-9]+)-[0-9a-f]{6,}", re.IGNORECASE)  # older versions of the hub appended it to shards


def _missing(names: Sequence[str]) -> list[str]:
    """Return the shards that are missing, if names differ only in their number out of a total."""
    numbered = [re.search(r"([0-9]+)(-of-0*([0-9]+))", name := HASH.sub(r"\1", full)) and name for full in names]
    matches = [re.fullmatch(r"(.*?)([0-9]+)(-of-0*([0-9]+).*)", name) for name in numbered if name]
    parts = [match for match in matches if match]
    if len(parts) < len(names) or len({(match[1], match[3]) for match in parts}) > 1:
        return []
    there, total = [int(match[2]) for match in parts], int(parts[0][4])
    first = int(0 not in there and total in there)
    lost = set(range(first, total + first)).difference(there)
    if len(set(there)) < len(there) or len(lost) + len(there) != total:
        return []
    return [f"{parts[0][1]}{number:0{len(parts[0][2])}}{parts[0][3]}" for number in sorted(lost)]


def _are_shards(names: Sequence[str]) -> bool:
    """Return whether names differ only in a running number that starts at 0 or 1 and has no gap.

    The number of a version, a fold or a year is not the number of a shard.
    """
    total = re.search(r"[0-9]+-of-0*([0-9]+)", names[0])
    if total and len(names) != int(total[1]):
        return False
    if len(names) == 1:
        return True
    parts = [re.findall(r"[a-z]+|[0-9]+|[^a-z0-9]+", HASH.sub(r"\1", name.lower())) for name in names]
    if len({len(part) for part in parts}) > 1:
        return False
    varied = [at for at, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    if len(varied) != 1 or not all(part[varied[0]].isdecimal() for part in parts):
        return False
    before = [part for part in parts[0][: varied[0]] if part.isalpha()][-1:]
    counted = {"part", "shard", "chunk", "file", "data", "rows"}.union(*NAMES.values())
    numbers = sorted(int(part[varied[0]]) for part in parts)
    running = numbers in (list(range(len(names))), list(range(1, len(names) + 1)))
    return running and (total is not None or counted.issuperset(before))
