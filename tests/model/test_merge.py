"""The check of a merged model: losses and sums of weights in little memory, whatever the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
from test_receipt import tiny, with_adapters

pytestmark = pytest.mark.smoke  # torch


def rows(length: int, prompt: int) -> list[dict[str, Any]]:
    ids = [3 + 7 * place % 290 for place in range(length)]
    return [
        {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]},
        {"input_ids": ids[::-1], "labels": [-100] * (length - 1) + ids[:1]},
    ]


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_vision"])
def test_the_loss_in_parts_equals_that_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, architecture: str, adapters: bool
) -> None:
    import torch
    from torch.nn import functional

    from sftlab.model import merge_worker as merge

    torch.manual_seed(0)
    model = tiny(architecture).eval()
    model = with_adapters(model) if adapters else model
    examples, total, count = rows(60, 20), 0.0, 0
    with torch.no_grad():
        for row in examples:
            labels = torch.tensor(row["labels"])[1:]
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            total += float(functional.cross_entropy(logits, labels, reduction="sum"))
            count += int((labels != -100).sum())
    monkeypatch.setattr(merge, "LOGIT_POSITIONS", 7)
    runs = []
    backbone = model.get_base_model().base_model if adapters else model.base_model
    hook = backbone.get_input_embeddings().register_forward_hook(lambda *_: runs.append(1))
    assert merge._loss(model, examples) == pytest.approx(total / count, abs=1e-5)
    assert len(runs) == len(examples)  # not once per part
    hook.remove()
    with torch.no_grad():  # the model is unchanged
        once = model(input_ids=torch.tensor([examples[0]["input_ids"]])).logits
        assert not torch.equal(once, model(input_ids=torch.tensor([examples[1]["input_ids"]])).logits)


def test_no_tensor_holds_the_logits_of_all_positions() -> None:
    """Record the largest tensor of every operation: 60,000 words in the vocabulary, 1,500 tokens, 1,200 supervised."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter
    from transformers import LlamaConfig, LlamaForCausalLM

    from sftlab.model import merge_worker as merge

    class Largest(TorchDispatchMode):  # type: ignore[misc]
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes = [part.untyped_storage().nbytes() for part in tree_iter(out) if isinstance(part, torch.Tensor)]
            self.size = max([self.size, *sizes])
            return out

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60_000, **shape)).to(torch.bfloat16).eval()
    with Largest() as spy:
        merge._loss(model, rows(1500, 300))
    assert spy.size == merge.LOGIT_POSITIONS * 60_000 * 4  # float32
    with Largest() as spy, torch.no_grad():
        model(input_ids=torch.tensor([rows(1500, 300)[0]["input_ids"]]))
    assert spy.size >= 1500 * 60_000 * 2


def test_sums_of_weights_in_parts_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from sftlab.model import merge_worker as merge

    model = torch.nn.Linear(50, 30).to(torch.bfloat16)
    monkeypatch.setattr(merge, "FINGERPRINT_PART", 64)
    sums = merge._fingerprint(model)
    for name, weight in model.state_dict().items():
        exact = weight.double()
        assert sums[name] == pytest.approx((float(exact.sum()), float(exact.abs().sum())))
    before = dict(sums)
    with torch.no_grad():
        model.weight[29, 49] += 1
    after = merge._fingerprint(model)
    assert [name for name in after if after[name] != before[name]] == ["weight"]
