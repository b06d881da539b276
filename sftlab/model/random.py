"""Random models for tests and dry runs of the pipeline (``random:ARCHITECTURE``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftlab.model.gguf import without_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARCHITECTURES = ("llama", "gemma3", "gemma3_vision", "qwen3")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_random_model(architecture: str, seed: int, folder: Path) -> None:
    """Save a model of two random layers in bfloat16, and a byte-level BPE tokenizer trained on the vignettes."""
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
    model = AutoModelForCausalLM.from_config(random_config(architecture, len(fast), fast), dtype=torch.float32)
    with without_progress_bars():
        model.to(torch.bfloat16).save_pretrained(folder)


def random_config(architecture: str, vocabulary: int, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the transformers config of a small model: 2 layers, 128 hidden units, 4 heads."""
    from transformers import Gemma3Config, Gemma3TextConfig, LlamaConfig, Qwen3Config

    shape = {
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
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        return Gemma3Config(
            text_config=dict(shape),
            vision_config={**vision, "image_size": 56, "patch_size": 14},
            mm_tokens_per_image=4,
            **{f"{name}_token_index": tokenizer.pad_token_id for name in ("boi", "eoi", "image")},
            **{name: shape[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        )
    configs = {"llama": LlamaConfig, "gemma3": Gemma3TextConfig, "qwen3": Qwen3Config}
    return configs[architecture](**shape)
