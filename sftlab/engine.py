"""The generation engines: prompts as token ids in, completions out. Runs in a child process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sftlab.models import reads_images
from sftlab.reasoning import marks


@dataclass(frozen=True)
class Completion:
    """Text and token ids that followed a prompt. ``finish_reason`` is "stop" or "length"."""

    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class Settings:
    """What an engine is started with; lengths in tokens, memory in GiB."""

    model: str
    trust_remote_code: bool
    device: str
    max_model_len: int
    max_tokens: int
    temperature: float
    seed: int
    batch_size: int
    tensor_parallel_size: int
    gpu_memory_utilization: float
    kv_cache_gib: float


class Engine(Protocol):
    """A loaded model that continues prompts."""

    def generate(self, prompts: Sequence[list[int]], *, seed: int) -> Iterator[tuple[int, Completion]]:
        """A completion for each prompt, with the prompt's place among them, in the order they are finished.

        Nothing of an earlier call is made use of, so that two calls are as two runs.
        """

    def choose(self, prompts: Sequence[list[int]], allowed: Sequence[list[int]]) -> list[int]:
        """For each prompt the likeliest of its allowed next tokens."""


def start(engine: str, settings: Settings) -> Engine:
    """Load the model in ``vllm`` or ``transformers``."""
    return Vllm(settings) if engine == "vllm" else Transformers(settings)


def reasoning_decoder(tokenizer: Any) -> Callable[[Sequence[int]], str] | None:
    """Decode token ids to text that retains reasoning marks (``[THINK]``); None where no special token is one."""
    specials = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    retained = marks(specials.values())
    dropped = {number for number, token in specials.items() if token not in retained}
    if not retained:
        return None
    return lambda ids: str(tokenizer.decode([number for number in ids if number not in dropped]))


class Vllm:
    """vLLM in this process: fast, and the engine that serves such models."""

    def __init__(self, settings: Settings) -> None:
        # In this process, so that one exit code and one Ctrl-C are enough, and memory ends with it.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        on_cpu = settings.device == "cpu"
        if on_cpu:
            # The variable is the older of two ways; without one of them vLLM takes most of the memory.
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(settings.kv_cache_gib))))
        from vllm import LLM

        self.settings = settings
        self.llm = LLM(
            model=settings.model,
            trust_remote_code=settings.trust_remote_code,
            dtype="bfloat16",
            max_model_len=settings.max_model_len,
            seed=settings.seed,
            enable_prefix_caching=True,
            tensor_parallel_size=settings.tensor_parallel_size,
            # Of a model that reads images too, only the text part takes memory.
            language_model_only=reads_images(Path(settings.model)),
            # Compiling needs a compiler, which a CPU machine may not have.
            enforce_eager=on_cpu,
            **({} if on_cpu else {"gpu_memory_utilization": settings.gpu_memory_utilization}),
        )

    def generate(self, prompts: Sequence[list[int]], *, seed: int) -> Iterator[tuple[int, Completion]]:
        """A completion for each prompt, with the prompt's place among them, in the order they are finished."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        # What LLM.generate does, but for its end: it gives nothing back before all are finished.
        engine = self.llm.llm_engine
        decode = reasoning_decoder(self.llm.get_tokenizer())
        self.llm.reset_prefix_cache()
        for place, prompt in enumerate(prompts):
            sampling = SamplingParams(
                max_tokens=self.settings.max_tokens,
                temperature=self.settings.temperature,
                seed=seed,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(place), tokens_input(prompt), sampling)
        while engine.has_unfinished_requests():
            for request in engine.step():
                out = request.outputs[0]
                text = decode(out.token_ids) if decode else out.text
                yield int(request.request_id), Completion(text, list(out.token_ids), out.finish_reason or "stop")

    def choose(self, prompts: Sequence[list[int]], allowed: Sequence[list[int]]) -> list[int]:
        """For each prompt the likeliest of its allowed next tokens."""
        from vllm import SamplingParams

        sampling = [SamplingParams(max_tokens=1, temperature=0, allowed_token_ids=tokens) for tokens in allowed]
        requests: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(requests, sampling, use_tqdm=False)
        return [int(output.outputs[0].token_ids[0]) for output in outputs]


class Transformers:
    """transformers' generate in batches: slower, and with nothing to start."""

    def __init__(self, settings: Settings) -> None:
        from transformers import AutoTokenizer

        from sftlab.models import load

        self.settings = settings
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model, local_files_only=True)
        self.decode = reasoning_decoder(self.tokenizer)
        self.model: Any = load(Path(settings.model), dtype="bfloat16", trust_remote_code=settings.trust_remote_code)
        self.model.to(settings.device).eval()

    def generate(self, prompts: Sequence[list[int]], *, seed: int) -> Iterator[tuple[int, Completion]]:
        """A completion for each prompt, with the prompt's place among them; equally long prompts run together."""
        import torch

        sampling: dict[str, Any] = {"do_sample": False}
        if self.settings.temperature > 0:
            torch.manual_seed(seed)
            sampling = {"do_sample": True, "temperature": self.settings.temperature, "top_k": 0, "top_p": 1.0}
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        size = self.settings.batch_size
        ends = self._ends()
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            ids, mask = self._pad([prompts[place] for place in batch])
            with torch.no_grad():
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=self.settings.max_tokens,
                    pad_token_id=self._padding(),
                    **sampling,
                )
            for place, row in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
                yield place, self._completion(row, ends)

    def choose(self, prompts: Sequence[list[int]], allowed: Sequence[list[int]]) -> list[int]:
        """For each prompt the likeliest of its allowed next tokens."""
        import torch

        chosen = []
        for prompt, tokens in zip(prompts, allowed, strict=True):
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([prompt], device=self.model.device)).logits[0, -1]
            chosen.append(tokens[int(logits[torch.tensor(tokens)].argmax())])
        return chosen

    def _pad(self, prompts: list[list[int]]) -> tuple[Any, Any]:
        import torch

        longest = max(map(len, prompts))
        ids = [[self._padding()] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _padding(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)

    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return {int(end) for end in [*ends, self.tokenizer.eos_token_id] if end is not None}

    def _completion(self, row: list[int], ends: set[int]) -> Completion:
        stop = next((place for place, token in enumerate(row) if token in ends), None)
        tokens = row if stop is None else row[:stop]
        text = self.decode(tokens) if self.decode else self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Completion(text, tokens, "length" if stop is None else "stop")
