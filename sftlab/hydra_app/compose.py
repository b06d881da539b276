"""Compose conf/ and the command line with Hydra: once per command, with launchers that reserve what a job needs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

_PACKAGE = Path(__file__).parents[1]
# Beside the package in a checkout, inside it in a wheel.
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())

# Hydra raises these, besides its own exceptions, about an override that it cannot compose.
COMPOSITION_ERRORS = (TypeError, ValueError, AttributeError, AssertionError)


class ComposeOnce(ConfigLoaderImpl):
    """A config loader that composes a command line once.

    Hydra itself composes it to read ``hydra.mode``, and a second time to run it.
    """

    overrides: Sequence[str] = ()
    composed: DictConfig | Exception | None = None

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose, or return what was composed to read the mode, with the ``hydra.mode`` override that Hydra adds."""
        settings = config_name, overrides, run_mode, from_shell
        if not validate_sweep_overrides:  # Hydra reads the mode; in a sweep, defaults may be missing
            self.overrides = tuple(overrides)
            try:
                # If no default is missing, a run and a sweep compose to the same config.
                self.composed = super().load_configuration(config_name, overrides, RunMode.RUN, from_shell, False)
            except Exception as error:
                self.composed = error
                if "You must specify" in str(error):
                    return super().load_configuration(*settings, False)
                raise
            return self.composed
        first, self.composed = self.composed, None
        added = overrides[len(self.overrides) :]
        again = tuple(overrides) == (*self.overrides, *added) and all(text.startswith("hydra.mode=") for text in added)
        if first is None or not again or (isinstance(first, Exception) and run_mode == RunMode.MULTIRUN):
            return super().load_configuration(*settings)
        self.validate_sweep_overrides_legal(OverridesParser.create().parse_overrides(overrides), run_mode, from_shell)
        if isinstance(first, Exception):
            raise first
        for text in added:
            first.hydra.mode = RunMode[text.partition("=")[2]]
            first.hydra.overrides.hydra.append(text)
        return first


class Composer:
    """Compose the configs of a command line again, to explain what is wrong with it.

    It sees the same files as Hydra: those of sftlab, ``--config-dir`` and ``hydra.searchpath``.

    Args:
        options: of the command line, as Hydra parses them.
        searched: overrides of Hydra's own keys, which may extend the search path.
    """

    def __init__(self, options: Namespace, searched: Sequence[str]) -> None:
        path = create_automatic_config_search_path(None, "sftlab", options.config_path or str(CONF))
        if options.config_dir:
            folder = Path(options.config_dir).absolute()
            path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema", path=None))
        GlobalHydra.instance().clear()
        loader = Hydra.create_main_hydra2("sftlab", path).config_loader
        GlobalHydra.instance().clear()  # Hydra refuses to start twice in a process
        assert isinstance(loader, ConfigLoaderImpl)
        self.loader, self.name = loader, options.config_name or "config"
        self.has_own_files = bool(options.config_dir or options.config_path or options.config_name)
        self.searched = list(searched)

    @cached_property
    def _repository(self) -> CachingConfigRepository:
        return self.loader._parse_overrides_and_create_caching_repo(self.name, self.searched)[1]

    def choices(self, group: str) -> list[str]:
        """List the options of a group; empty if the group does not exist."""
        return self._repository.get_group_options(group)

    @cached_property
    def default_groups(self) -> set[str]:
        """The groups that have a choice by default."""
        defaults = self.loader.compute_defaults_list(self.name, self.searched, RunMode.RUN)
        return {str(group) for group in defaults.overrides.known_choices}

    def is_multirun(self, overrides: list[str]) -> bool:
        """Whether ``hydra.mode``, set by these overrides or by a file that they choose, is MULTIRUN."""
        if not overrides and not self.has_own_files:
            return False
        try:
            config = self.loader.load_configuration(self.name, overrides, RunMode.RUN)
        except (HydraException, *COMPOSITION_ERRORS):
            return False
        return bool(config.hydra.mode == RunMode.MULTIRUN)

    def compose(self, overrides: list[str]) -> DictConfig:
        """Compose a config without the section ``hydra``."""
        return without_hydra(self.loader.load_configuration(self.name, overrides, RunMode.RUN))


def without_hydra(config: DictConfig) -> DictConfig:
    """Copy a composed config without the section ``hydra``."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def set_for_jobs(composed: DictConfig, key: str, value: str) -> None:
    """Set a key of Hydra's in this config and in those of all jobs, which are composed again from the overrides."""
    OmegaConf.update(composed, key, value, force_add=True)
    quoted = value.replace("\\", "\\\\").replace("'", "\\'")
    composed.hydra.overrides.hydra.append(f"++{key}='{quoted}'")


def _extend_launchers() -> None:
    """Merge conf/hydra/reserve into the launchers' configs, so that a job reserves what its instance needs.

    A file in conf/hydra/launcher would replace the plugin's config, and hide that the plugin is not installed.
    """

    def gpus(device: str, num_processes: int | None) -> int | None:
        from sftlab.instance.machine import gpus_per_job

        return gpus_per_job(device, num_processes) or None

    def parallel_jobs(device: str, num_processes: int | None) -> int:
        from sftlab.hydra_app import launchers

        return launchers.parallel_jobs(device, num_processes)

    OmegaConf.register_new_resolver("sftlab.gpus", gpus, replace=True)
    OmegaConf.register_new_resolver("sftlab.parallel_jobs", parallel_jobs, replace=True)
    Plugins.instance()  # imports the installed plugins, which register their configs
    store = ConfigStore.instance()
    for file in (CONF / "hydra" / "reserve").glob("*.yaml"):
        with suppress(ConfigLoadError):  # the plugin is not installed
            node = store.load(f"hydra/launcher/{file.name}").node
            store.store(file.stem, OmegaConf.merge(node, OmegaConf.load(file)), "hydra/launcher", provider="sftlab")
    # Hydra copies the store for each group that --help lists, and only reads the copies.
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]


_extend_launchers()  # at import, so that the workers of a launcher have the resolvers too
