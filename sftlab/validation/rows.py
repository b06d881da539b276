"""The datasets of a run: their splits, every row that is on this machine, and access to the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sftlab.config import Config, DatasetConfig, RowSettings
from sftlab.dataset import stage as dataset
from sftlab.errors import ConfigError, Problem, shown, with_keys
from sftlab.eval import guards
from sftlab.eval.checks import check_answers
from sftlab.eval.predictions import load_others, load_pair
from sftlab.eval.scorers import scorer
from sftlab.eval.task import fitted
from sftlab.model import hub
from sftlab.records import Example
from sftlab.runtime.modes import MODES
from sftlab.runtime.store import Store, key_of
from sftlab.validation.combinations import evaluation_problems
from sftlab.validation.files import is_local

# Keys of the datasets whose rows this process has checked: the jobs of a sweep share them.
CHECKED: set[str] = set()

GENERATORS = ("generate:vignettes", "generate:basics")
MOST_GENERATED = 100_000  # rows; there are few more different questions
# Keys outside the dataset's section that decide whether its rows can be used.
JUDGED_BY = ("eval", "select.metric", "mode")


def dataset_problems(cfg: Config) -> Iterator[Problem]:
    """Yield the problems of the dataset, unless a mounted test set replaces it, and of the mounted test set."""
    if MODES[cfg.mode].reads_training_rows or cfg.eval.dataset is None:
        yield from _dataset(cfg, cfg.dataset)
    if cfg.eval.dataset is not None:
        yield from _dataset(cfg, cfg.eval.dataset, mounted="eval.dataset")
    for name, data in cfg.eval.guards.items() if MODES[cfg.mode].evaluates else ():
        own = guards.settings(cfg, name)
        yield from guards.relocated(name, [*evaluation_problems(own), *_dataset(own, data, mounted=guards.key(name))])


def prediction_problems(cfg: Config) -> Iterator[Problem]:
    """Yield the problems of the prediction files of ``mode=compare``."""
    files = cfg.eval.predictions
    if len(files) < 2:
        yield Problem(
            "eval.predictions",
            None,
            f"mode=compare needs two files or more, and there {'is 1' if len(files) == 1 else f'are {len(files)}'}",
            "write 'eval.predictions=[a.jsonl,b.jsonl]' with the base model's file first",
            ("mode",),
        )
        return
    try:
        (rows, *_), _ = load_pair(Path(files[0]), Path(files[1]), cfg.eval)
        load_others(cfg.eval, rows)
    except ConfigError as error:
        yield from with_keys(error, "eval")


def _dataset(cfg: Config, data: DatasetConfig, *, mounted: str | None = None) -> Iterator[Problem]:
    """Check the settings of a dataset, then its rows if they are local, unless a completed stage contains them."""
    section = mounted or "dataset"
    if problems := list(_sources(section, data)):
        yield from problems
        return
    parts = data.parts(section)
    for part in parts:
        name, several = part.cfg.name_or_path, part.name is not None
        own = [*_split(part.key, part.cfg, name, partial=mounted is not None or several), *_format(part.key, part.cfg)]
        if is_local(name) and not name.startswith("generate:") and not Path(name).exists():
            message = f"no such file or folder (seen from {Path.cwd()})"
            own.append(Problem(f"{part.key}.name_or_path", shown(name), message, "check the path"))
        problems += own
        yield from own
    hubs = [part for part in parts if not is_local(part.cfg.name_or_path)]
    if problems:
        return
    try:
        for part in hubs:
            hub.check_dataset(part.cfg.name_or_path, part.cfg.revision, f"{part.key}.name_or_path")
        if not hubs:
            yield from _rows(cfg, data, section, mounted=mounted)
    except ConfigError as error:
        yield from with_keys(error, section, *JUDGED_BY)
    except OSError as error:
        message = f"{error.filename} cannot be read: {error.strerror}"
        values = shown(data.name_or_path) if data.name_or_path else None
        yield Problem(f"{section}.name_or_path" if values else section, values, message, "check its permissions")


def _sources(section: str, data: DatasetConfig) -> Iterator[Problem]:
    """Check that a dataset has a source, and either one or several."""
    key, name = f"{section}.name_or_path", data.name_or_path
    if data.sources is None and name is None:
        message, remedy = "names no rows", f"set it to a file, a folder or a hub id, or set {section}.sources"
        yield Problem(key, "null", message, remedy, (f"{section}.sources",))
    elif data.sources is not None and not data.sources:
        remedy = "name at least one, as in {a: {name_or_path: a.jsonl}, b: {name_or_path: b.csv}}, or set it to null"
        yield Problem(f"{section}.sources", "{}", "has no source", remedy)
    elif data.sources is not None and name is not None:
        message = f"has no effect with {section}.sources, each of which has its own"
        yield Problem(key, shown(name), message, "set it to null", (f"{section}.sources",))


def _rows(cfg: Config, data: DatasetConfig, section: str, *, mounted: str | None) -> Iterator[Problem]:
    """Check every row of a local dataset once per process."""
    tested = MODES[cfg.mode].reads_test and (mounted is not None or cfg.eval.dataset is None)
    column = cfg.eval.group_by if tested else None
    store, inputs = Store(cfg.store), dataset.inputs(data, mounted=mounted)
    judged = {"eval": cfg.eval.model_dump(), "select": cfg.select.metric, "mode": cfg.mode}
    known = key_of({"rows": inputs, "column": column, **judged})
    if known in CHECKED:
        return
    splits = dataset.load(store, data, mounted=mounted, column=column)
    yield from _answers(cfg, data, splits, mounted=mounted, tested=tested)
    if not splits["test"] and MODES[cfg.mode].reads_test and cfg.eval.dataset is None:
        yield Problem(
            f"{section}.split",
            shown(data.split),
            f"the test split{f' of {data.name_or_path}' if data.name_or_path else ''} has no rows",
            f"set {section}.split.test to a number of rows or a share, mount a test set with dataset@eval.dataset=…, "
            "or set mode=train",
            (section, *JUDGED_BY),
        )
    else:
        CHECKED.add(known)


def _answers(
    cfg: Config, data: DatasetConfig, splits: Mapping[str, Sequence[Example]], *, mounted: str | None, tested: bool
) -> Iterator[Problem]:
    """Check that answers to the rows can be judged; yield the problems of a task that the rows decide."""
    if cfg.eval.task == "auto" and cfg.eval.dataset is not None and not mounted:
        return  # the rows of eval.dataset decide
    known = fitted(cfg, splits["test"] if tested else (), splits["train"])
    if (mounted or "").startswith("eval.guards."):
        known = guards.fitted(known)
    problems = list(evaluation_problems(known))
    if known is not cfg:  # otherwise they are reported already
        yield from problems
    has_choices = not scorer(known.eval).lettered or all(
        part.cfg.choices is not None or part.cfg.format != "template" for part in data.parts()
    )
    if has_choices and not problems:
        used = {"train": not mounted, "validation": not mounted, "test": tested}
        check_answers(known, {name: rows for name, rows in splits.items() if used[name]})


def _format(section: str, data: RowSettings) -> Iterator[Problem]:
    """Check that a source has the templates that it needs, and none that would have no effect."""
    texts = {name: getattr(data, name) for name in ("user", "assistant")}
    keys = (f"{section}.format",)
    if data.format == "template":
        for name, template in {**texts, "target": data.target}.items():
            if template is None:
                remedy = f"set it to a template, or set {section}.format=auto to recognise the format of the rows"
                yield Problem(f"{section}.{name}", "null", f"{section}.format=template needs it", remedy, keys)
        for name, default in {"columns": {}, "answer_kind": "auto"}.items():
            if (value := getattr(data, name)) != default:
                message = f"has no effect with {section}.format=template"
                yield Problem(f"{section}.{name}", shown(value), message, f"set {section}.format=auto", keys)
        return
    for name, template in texts.items():
        if template is not None:
            message = f"has no effect with {section}.format={data.format}, which supplies the text"
            remedy = f"set it to null, or set {section}.format=template"
            yield Problem(f"{section}.{name}", shown(template), message, remedy, keys)


def _split(section: str, data: RowSettings, name: str, *, partial: bool) -> Iterator[Problem]:
    """Check the sizes of the splits; generated rows have no end of which a share could be taken.

    A ``partial`` source may lack training and validation rows.
    """
    key, split, keys = f"{section}.split", data.split, (f"{section}.name_or_path",)
    if not partial and (not split.get("train") or not split.get("validation")):
        message = "train and validation need rows: selection compares validation losses"
        yield Problem(key, shown(split), message, "give both a number of rows, or a share")
    sizes = [size for size in split.values() if size]
    if any(size < 1 for size in sizes) and sum(size for size in sizes if size <= 1) > 1 + 1e-9:
        remedy = "give shares that add up to 1 or less, or numbers of rows"
        yield Problem(key, shown(split), f"the shares add up to {sum(sizes):g}", remedy)
    if any(size > 1 and size != int(size) for size in sizes):
        message = "a number of rows must be whole"
        yield Problem(key, shown(split), message, "give shares below 1, or whole numbers of rows")
    if name.startswith("generate:"):
        if name not in GENERATORS:
            yield Problem(keys[0], shown(name), "no such generator", f"set it to {' or '.join(GENERATORS)}")
        if sum(sizes) > MOST_GENERATED:
            message = f"asks for too many rows: at most {MOST_GENERATED:,} are generated"
            yield Problem(key, shown(split), message, "ask for fewer", keys)
        if any(size < 1 for size in sizes):
            message = "generated rows have no total of which a share could be taken"
            yield Problem(key, shown(split), message, "give whole numbers of rows", keys)
