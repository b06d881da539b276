"""Quantise a merged model in a child process, and write it in its format."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sftlab.errors import StageError
from sftlab.model.gguf import dequantise
from sftlab.runtime.processes import serve

GGUF = "model.gguf"
BESIDE = ("*token*", "vocab*", "merges.txt", "chat_template*", "generation_config.json")  # files of a model's tokenizer
BLOCK = 512  # tokens of a calibration sequence
GROUPS = (128, 64, 32)  # weights that share a scale in AWQ: sizes for which vLLM has kernels


class ExportTask(BaseModel):
    """What is written."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    format: Literal["gguf", "awq", "fp8", "bnb4", "plain"]
    """export.format; ``plain``: the bfloat16 weights that ``model`` stands for, a GGUF file."""
    gguf: str
    """export.gguf."""
    model: Path
    """The merged model, or the file."""
    texts: list[str]
    """Training rows from which AWQ measures activations."""
    device: str
    """cpu or cuda."""
    seed: int
    """Of the choice of calibration sequences."""


def run(folder: Path, task: ExportTask) -> None:
    """Write the model into ``folder``."""
    match task.format:
        case "plain":
            dequantise(task.model, folder)
        case "bnb4":
            _bitsandbytes(folder, task)
        case _:
            _auto_round(folder, task)


def _bitsandbytes(folder: Path, task: ExportTask) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        task.model,
        quantization_config=config,
        dtype=torch.bfloat16,
        device_map={"": task.device},
        local_files_only=True,
        use_safetensors=True,
    )
    model.save_pretrained(folder)
    for pattern in BESIDE:
        for file in task.model.glob(pattern):
            shutil.copy(file, folder / file.name)


def _auto_round(folder: Path, task: ExportTask) -> None:
    """Without tuning: AutoRound rounds to the nearest value, after AWQ has scaled the weights."""
    from auto_round import AutoRound

    logging.getLogger("gguf").setLevel(logging.WARNING)  # it reports every special token
    scheme, target = {
        "gguf": (f"gguf:{task.gguf}", f"gguf:{task.gguf}"),
        "awq": ("W4A16", "auto_awq"),
        "fp8": ("FP8_BLOCK", "llm_compressor"),
    }[task.format]
    options: dict[str, object] = {"iters": 0, "disable_opt_rtn": True}
    if task.format == "awq":
        length = min(BLOCK, max(map(len, task.texts)) // 4)
        options = {"alg_configs": "awq", "dataset": task.texts, "nsamples": len(task.texts), "seqlen": length}
        options["group_size"] = _group_size(task.model)
    device = "cpu" if task.device == "cpu" else 0
    rounding = AutoRound(str(task.model), scheme=scheme, device_map=device, seed=task.seed, batch_size=1, **options)
    out = folder / "auto_round"
    rounding.quantize_and_save(output_dir=str(out), format=target)
    if task.format == "gguf":
        files = [file for file in out.rglob("*.gguf") if not file.name.startswith("mmproj")]
        if len(files) != 1:
            raise StageError(f"export.format=gguf: auto-round wrote {len(files)} files, and one is expected")
        files[0].rename(folder / GGUF)
    else:
        for file in next(path for path in out.rglob("config.json")).parent.iterdir():
            file.rename(folder / file.name)
    shutil.rmtree(out)


def _group_size(model: Path) -> int:
    """The largest group that divides the inputs of all linear layers.

    Raises:
        StageError: none does.
    """
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(model, local_files_only=True).get_text_config()
    heads = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    inputs = (text.hidden_size, text.intermediate_size, heads)
    for size in GROUPS:
        if not any(width % size for width in inputs):
            return size
    raise StageError(f"its layers have {', '.join(map(str, inputs))} inputs, and none of {GROUPS} divides all of them")


if __name__ == "__main__":
    serve(ExportTask, run)
