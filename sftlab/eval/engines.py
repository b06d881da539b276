"""Generation engines: prompts as token ids in, completions out. They run in a child process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sftlab.model.base import reads_images
from sftlab.model.reasoning import marks


@dataclass(frozen=True)
class Completion:
    """Text and token ids that follow a prompt, without the stop token. ``finish_reason`` is "stop" or "length"."""

    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class Settings:
    """Settings of an engine; lengths in tokens, memory in GiB. Generation stops at ``stop_token_ids``.

    ``model`` is a folder. ``dtype`` is the number format of weights and activations, "bfloat16" or "float32".
    """

    model: str
    trust_remote_code: bool
    stop_token_ids: list[int]
    device: str
    dtype: str
    max_model_len: int
    max_tokens: int
    temperature: float
    seed: int
    batch_size: int
    tensor_parallel_size: int
    gpu_memory_utilization: float
    kv_cache_gib: float
    lora_rank: int | None = None
    quantization: str | None = None
    """Rank of the LoRA adapters with which vLLM computes beside the model's weights; None: adapters are merged."""


class Engine(Protocol):
    """A loaded model that continues prompts."""

    def load(self, checkpoint: Path, scratch: Path) -> None:
        """Use the weights of a checkpoint of the model.

        Merged weights may be written into the folder ``scratch``, and are deleted after they are loaded.
        """

    def generate(
        self, prompts: Sequence[list[int]], *, seed: int, max_tokens: int | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """Yield the index of each prompt and its completion, in the order they are finished.

        Calls are independent: no cache is reused.
        """

    def logprobs(
        self, prompts: Sequence[list[int]], tokens: Sequence[list[int]]
    ) -> Iterator[tuple[int, dict[int, float]]]:
        """Yield the index of each prompt and the log-probabilities of its next tokens, in the order of completion.

        Log-probabilities are those over the whole vocabulary, in nats.
        """


def start(engine: str, settings: Settings, beat: Callable[[], None]) -> Engine:
    """Load the model with ``vllm`` or ``transformers``. The engine calls ``beat`` after every step."""
    return Vllm(settings, beat) if engine == "vllm" else Transformers(settings, beat)


def reasoning_decoder(tokenizer: Any) -> Callable[[Sequence[int]], str] | None:
    """Return a decoder that retains reasoning marks such as ``[THINK]``; None if no special token is one."""
    specials = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    retained = marks(specials.values())
    dropped = {number for number, token in specials.items() if token not in retained}
    if not retained:
        return None
    return lambda ids: str(tokenizer.decode([number for number in ids if number not in dropped]))


@contextmanager
def merged_folder(settings: Settings, checkpoint: Path, scratch: Path) -> Iterator[Path]:
    """A folder with the weights of a checkpoint, merged into those of the model.

    One merged model is on the disk at a time.
    """
    from sftlab.model.variants import save_merged

    folder = scratch / "merged"
    try:
        save_merged(Path(settings.model), checkpoint, folder, trust_remote_code=settings.trust_remote_code)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def nf4(settings: Settings) -> Any:
    """Return the configuration with which transformers quantises the linear layers to 4 bits."""
    import torch
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, settings.dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


class Vllm:
    """vLLM, in this process."""

    def __init__(self, settings: Settings, beat: Callable[[], None]) -> None:
        # In this process: one exit code, one Ctrl-C, and all memory is freed when it ends.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        on_cpu = settings.device == "cpu"
        if on_cpu:
            # All supported versions read this variable; by default vLLM takes most of the memory.
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(settings.kv_cache_gib))))
        from vllm import LLM

        self.settings, self.beat = settings, beat
        self.adapter: Any = None
        self.adapters = 0
        quantised = {"quantization": "bitsandbytes"} if settings.quantization == "nf4" else {}
        lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": settings.lora_rank} if settings.lora_rank else {}
        self.llm = LLM(
            model=settings.model,
            trust_remote_code=settings.trust_remote_code,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            seed=settings.seed,
            enable_prefix_caching=True,
            tensor_parallel_size=settings.tensor_parallel_size,
            # Of a model that also reads images, load only the text part.
            language_model_only=reads_images(Path(settings.model)),
            # Compilation needs a C compiler, which a CPU machine may not have.
            enforce_eager=on_cpu,
            use_tqdm_on_load=False,
            **({} if on_cpu else {"gpu_memory_utilization": settings.gpu_memory_utilization}),
            **lora,
            **quantised,
        )

    def load(self, checkpoint: Path, scratch: Path) -> None:
        """Use an adapter beside the weights, or replace the weights by merged ones."""
        if self.settings.lora_rank:
            from vllm.lora.request import LoRARequest

            self.adapters += 1
            self.adapter = LoRARequest(str(self.adapters), self.adapters, str(checkpoint))
            return
        with merged_folder(self.settings, checkpoint, scratch) as folder:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})

    def generate(
        self, prompts: Sequence[list[int]], *, seed: int, max_tokens: int | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """Yield the index of each prompt and its completion, in the order they are finished."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        decode = reasoning_decoder(self.llm.get_tokenizer())
        self.llm.reset_prefix_cache()
        sampling = SamplingParams(
            max_tokens=max_tokens or self.settings.max_tokens,
            temperature=self.settings.temperature,
            seed=seed,
            stop_token_ids=self.settings.stop_token_ids,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for place, out in self._run(prompts, [sampling.clone() for _ in prompts]):
            tokens = [token for token in out.token_ids if token not in self.settings.stop_token_ids]
            text = decode(tokens) if decode else out.text
            yield place, Completion(text, tokens, out.finish_reason or "stop")

    def logprobs(
        self, prompts: Sequence[list[int]], tokens: Sequence[list[int]]
    ) -> Iterator[tuple[int, dict[int, float]]]:
        """Yield the index of each prompt and the log-probabilities of its next tokens, in the order of completion."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        final = RequestOutputKind.FINAL_ONLY
        sampling = [
            SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=list(of_prompt), output_kind=final)
            for of_prompt in tokens
        ]
        for place, out in self._run(prompts, sampling):
            known = out.logprobs[0]
            yield place, {token: float(known[token].logprob) for token in tokens[place]}

    def _run(self, prompts: Sequence[list[int]], sampling: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Do what LLM.generate does, but yield each output when it is finished."""
        from vllm.inputs import tokens_input

        engine = self.llm.llm_engine
        for place, (prompt, parameters) in enumerate(zip(prompts, sampling, strict=True)):
            engine.add_request(str(place), tokens_input(prompt), parameters, lora_request=self.adapter)
        while engine.has_unfinished_requests():
            finished = engine.step()
            self.beat()
            for request in finished:
                yield int(request.request_id), request.outputs[0]


class Transformers:
    """The generate method of transformers in batches: slower than vLLM, and faster to start."""

    def __init__(self, settings: Settings, beat: Callable[[], None]) -> None:
        from transformers import AutoTokenizer

        self.settings, self.beat = settings, beat
        code = settings.trust_remote_code
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=code, local_files_only=True)
        self.decode = reasoning_decoder(self.tokenizer)
        self._start(Path(settings.model))

    def _start(self, model: Path) -> None:
        from transformers import GenerationConfig

        from sftlab.model.base import load

        settings = self.settings
        self.model: Any = None  # frees the memory of the model before
        quantised = {} if settings.quantization is None else {"quantization_config": nf4(settings)}
        self.model = load(model, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code, **quantised)
        self.model = (self.model if quantised else self.model.to(settings.device)).eval()
        # As in vLLM, ignore the sampling options of the model's own config, such as a repetition penalty.
        self.model.generation_config = GenerationConfig(
            pad_token_id=self._padding(), eos_token_id=settings.stop_token_ids or None
        )

    def load(self, checkpoint: Path, scratch: Path) -> None:
        """Use an adapter beside the weights (``lora_rank``), or replace the model by the merged one."""
        if self.settings.lora_rank:
            from peft import PeftModel

            config = self.model.generation_config
            self.model = PeftModel.from_pretrained(self.model, str(checkpoint)).eval()
            self.model.generation_config = self.model.base_model.generation_config = config
            return
        with merged_folder(self.settings, checkpoint, scratch) as folder:
            self._start(folder)

    def generate(
        self, prompts: Sequence[list[int]], *, seed: int, max_tokens: int | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """Yield the index of each prompt and its completion. Prompts of similar length share a batch."""
        import torch

        sampling: dict[str, object] = {"do_sample": False}
        if self.settings.temperature > 0:
            torch.manual_seed(seed)
            sampling = {"do_sample": True, "temperature": self.settings.temperature, "top_k": 0, "top_p": 1.0}
        for batch in self._batches(prompts):
            limit = max_tokens or self.settings.max_tokens
            rows = self._continue([prompts[place] for place in batch], limit, **sampling)
            for place, row in zip(batch, rows, strict=True):
                yield place, self._completion(row)

    def logprobs(
        self, prompts: Sequence[list[int]], tokens: Sequence[list[int]]
    ) -> Iterator[tuple[int, dict[int, float]]]:
        """Yield the index of each prompt and the log-probability of each of its next tokens."""
        for batch in self._batches(prompts):
            options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            out = self._generate([prompts[place] for place in batch], 1, **options)
            every = out.logits[0].float().log_softmax(-1)
            for place, row in zip(batch, every, strict=True):
                values = row[tokens[place]].tolist()
                yield place, dict(zip(tokens[place], values, strict=True))

    def _batches(self, prompts: Sequence[list[int]]) -> Iterator[list[int]]:
        """Yield the indices of the prompts of each batch, shortest prompts first."""
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        size = self.settings.batch_size
        return (order[first : first + size] for first in range(0, len(order), size))

    def _continue(self, prompts: list[list[int]], tokens: int, **options: Any) -> list[list[int]]:
        """Generate at most ``tokens`` tokens after each prompt, and return them."""
        out = self._generate(prompts, tokens, **options)
        rows: list[list[int]] = out[:, max(map(len, prompts)) :].tolist()
        return rows

    def _generate(self, prompts: list[list[int]], tokens: int, **options: Any) -> Any:
        """Call the model's generate method. Only the last position of a prompt gets logits."""
        import torch

        def beat(ids: Any, *_: Any, **__: Any) -> Any:
            self.beat()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        ids, mask = self._pad(prompts)
        with torch.no_grad():
            return self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=tokens, stopping_criteria=[beat], **options
            )

    def _pad(self, prompts: list[list[int]]) -> tuple[Any, Any]:
        import torch

        longest = max(map(len, prompts))
        ids = [[self._padding()] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _padding(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else next(iter(self.settings.stop_token_ids), 0))

    def _completion(self, row: list[int]) -> Completion:
        ends = self.settings.stop_token_ids
        stop = next((place for place, token in enumerate(row) if token in ends), None)
        tokens = row if stop is None else row[:stop]
        text = self.decode(tokens) if self.decode else self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Completion(text, tokens, "length" if stop is None else "stop")
