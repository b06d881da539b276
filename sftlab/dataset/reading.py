"""Read the rows of a source: files, a dataset of the hub, or a generator."""

from __future__ import annotations

from pathlib import Path

from sftlab.config import SourceConfig
from sftlab.dataset import sources
from sftlab.dataset.formats import Parsed
from sftlab.dataset.rows import Rows, Table
from sftlab.dataset.sources import Source
from sftlab.dataset.templates import Templates
from sftlab.errors import ConfigError, Problem, shown


def read(cfg: SourceConfig, commit: str | None, key: str) -> Source:
    """Return the rows of a source by its own splits; a source with a single split calls it ``all``."""
    name = cfg.name_or_path
    if name.startswith("generate:"):
        return {"all": [*Parsed.of(Table(_generate(cfg, key), []))]}
    if Path(name).exists():
        return sources.read(Path(name))
    from sftlab.model.hub import dataset_rows

    return sources.read_hub(name, *dataset_rows(name, cfg.subset, commit, f"{key}.name_or_path"))


def _generate(cfg: SourceConfig, key: str) -> Rows:
    """Generate as many rows as the splits ask for, and more if ``keep`` leaves rows out."""
    from sftlab.dataset import basics, vignettes

    generate = {"generate:vignettes": vignettes.rows, "generate:basics": basics.rows}[cfg.name_or_path]
    wanted = sum(int(size) for size in cfg.split.values())
    try:
        rows = generate(wanted, cfg.seed)
        if cfg.keep is None or not rows:
            return [*rows]
        templates = Templates(cfg, key, list(rows[0]))
        for factor in (2, 4, 8, 16):
            kept = sum(templates.keeps(row, f"{cfg.name_or_path}, row {n}") for n, row in enumerate(rows, start=1))
            if not 0 < kept < wanted:
                break
            rows = generate(factor * wanted, cfg.seed)
    except ValueError as error:
        raise ConfigError(Problem(f"{key}.split", shown(cfg.split), str(error))) from error
    return [*rows]
