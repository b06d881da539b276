"""What of a completion is an answer, and what was only thought aloud."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftlab.model.reasoning import answered, unclosed

GPT_OSS = "<|channel|>analysis<|message|>Perhaps (A).<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"

# Completion, what answers in it, and the mark that would end the reasoning that it ends in.
COMPLETIONS = [
    ("The answer is (B).", "The answer is (B).", ""),
    ("<think>(A)?</think>B", "B", ""),
    ("\n <think>\n(A)?\n</think>\n\nB", "\n \n\nB", ""),
    ("<think></think>B", "B", ""),
    ("<THINK>(A)?</Think>B", "B", ""),
    ("<thinking>(A)?</thinking>B", "B", ""),
    ("<thought>(A)?</thought>B", "B", ""),
    ("<reasoning>(A)?</reasoning>\n<answer>B</answer>", "\n<answer>B</answer>", ""),
    ("<seed:think>(A)?</seed:think>B", "B", ""),
    ('<think effort="high">(A)?</think>B', "B", ""),
    ("[THINK](A)?[/THINK]B", "B", ""),
    ("[unused16](A)?[unused17]B", "B", ""),
    ("[unused16](A)?", "", "[unused17]"),
    ("<antThinking>(A)?</antThinking>B", "B", ""),
    ("<|START_THINKING|>(A)?<|END_THINKING|><|START_RESPONSE|>B<|END_RESPONSE|>", "B", ""),
    ("<|begin_of_thought|>(A)?<|end_of_thought|><|begin_of_solution|>B<|end_of_solution|>", "B", ""),
    ("◁think▷(A)?◁/think▷B", "B", ""),
    ("<unused94>thought\n(A)?<unused95>B", "B", ""),
    ("<|channel>thought\n(A)?<channel|>B", "B", ""),
    (f"{GPT_OSS}{FINAL}B<|return|>", "B", ""),
    (f"{GPT_OSS}<|channel|>commentary<|message|>(C)?<|end|><|start|>assistant{FINAL}B", "B", ""),
    (f"{FINAL}B", "B", ""),
    ("analysisWe need one. (A)?assistantfinalB", "B", ""),  # without its special tokens
    ("analysisthe user asks. (A)?assistantfinalB", "B", ""),
    ("analysis We need one. (A)?assistantfinalB", "B", ""),
    ("analysis\nWe need one. (A)?assistantfinalB", "B", ""),
    ("assistantanalysis1. (A)?assistantfinalB", "B", ""),
    ("analysis of it: (A)?assistantfinalB", "B", ""),
    ("<|inner_prefix|>(A)?<|inner_suffix|>B", "B", ""),
    ("<|think|>(A)?<|end|><|begin|>assistant<|content|>B", "B", ""),
    ("<start_working_out>(A)?<end_working_out><SOLUTION>B</SOLUTION>", "<SOLUTION>B</SOLUTION>", ""),
    *(
        (f"<{name}>(A)?</{name}>B", "B", "")
        for name in (
            *("reason", "analysis", "rationale", "cot", "chain_of_thought", "thought_process", "internal_monologue"),
            *("think_fast", "inner_thoughts"),
        )
    ),
    ("Here is my thought process:\n(A)?\nHere is my response:\nB", "\nB", ""),
    ("Here's my thought process: (A)? Here's my response: B", " B", ""),
    ("<think>(A)?</think >B", "B", ""),
    ("```\n<think>\n(A)?\n</think>\nB\n```", "```\n\nB\n```", ""),
    # Several blocks, in a row and within each other.
    ("<think>(A)?</think>\n<think>(C)?</think>B", "\nB", ""),
    ("<think>(A)?</think>B <reflection>(C)?</reflection>", "B ", ""),
    ("<think>(A)? <think>(C)?</think> (D)?</think>B", "B", ""),
    ("<thinking>(A)? <reflection>(C)?</reflection> (D)?</thinking>B", "B", ""),
    ("<think>\n<think>(A)?</think>B", "B", ""),
    ("<think>(A)?</thinking>B", "B", ""),
    # Without an end: whatever follows is thought, however the text ended.
    ("<think>(A)", "", "</think>"),
    ("<think>", "", "</think>"),
    ("[THINK]Suppose (A).", "", "[/THINK]"),
    ("<|START_THINKING|>(A)", "", "<|END_THINKING|>"),
    (GPT_OSS, "", f"<|end|><|start|>assistant{FINAL}"),
    ("analysisWe need one. (A)", "", f"<|end|><|start|>assistant{FINAL}"),
    ("<think>(A)?</think>B\n<think>(C)?", "B\n", "</think>"),
    ("<thinking>(A)? <reflection>(C)?</reflection> (D)", "", "</thinking>"),
    ("<thinking>(A)? <reflection>(C)?", "", "</reflection></thinking>"),
    ("Okay. <think>(A)", "Okay. ", "</think>"),
    ("Sure, <think> I guess (A)", "Sure, ", "</think>"),
    ("Let me reason <think> (A)", "Let me reason ", "</think>"),
    ("<|assistant|><think>(A)", "<|assistant|>", "</think>"),
    ("<|im_start|>assistant <think>(A)", "<|im_start|>assistant ", "</think>"),
    ("<answer><think>(A)", "<answer>", "</think>"),
    ("(Thinking) <think>(A)", "(Thinking) ", "</think>"),
    ("1) <think>(A)", "1) ", "</think>"),
    ("Answer - <think>(A)", "Answer - ", "</think>"),
    ("😀<think>(A)", "😀", "</think>"),
    ("<thought>(A)", "", "</thought>"),
    ("<|inner_prefix|>(A)", "", "<|inner_suffix|>"),
    ("<|think|>(A)", "", "<|end|><|begin|>assistant<|content|>"),
    ("<start_working_out>(A)", "", "<end_working_out>"),
    ("Here is my thought process:\n(A)", "", "\n\nHere is my response:"),
    ("analysisthe user asks. (A)", "", f"<|end|><|start|>assistant{FINAL}"),
    ("analysis We need one. (A)", "", f"<|end|><|start|>assistant{FINAL}"),
    ("analysis\nWe need one. (A)", "", f"<|end|><|start|>assistant{FINAL}"),
    ("Sure, <think>(A)?</think>B", "Sure, B", ""),
    # An end without a beginning, which the prompt may have had.
    ("(A)?</think>B", "B", ""),
    ("(A)?\n</think>", "", ""),
    ("(A)?</think>(C)?</think>B", "B", ""),
    ("<think>(A)?</think>B</think>", "B", ""),
    # Marks that are only spoken of.
    ("B. I never write `<think>` here.", "B. I never write `<think>` here.", ""),
    ('B. No "<think>" and no "</think>".', 'B. No "<think>" and no "</think>".', ""),
    ("B. I do not use <think> here.", "B. I do not use <think> here.", ""),
    ("B. The <think> tag stays empty.", "B. The <think> tag stays empty.", ""),
    ("B. Of <b>, <think> and <i> I use none.", "B. Of <b>, <think> and <i> I use none.", ""),
    ("B\n```\n<think>\n</think>\n```\n", "B\n```\n<think>\n</think>\n```\n", ""),
    ("<think>I end it by `</think>` soon. (A)?</think>B", "B", ""),
    ("<think>\n```python\nprint()\n</think>\nB", "\nB", ""),
    ("<think>I end it by `</think>` soon. (A)", "", "</think>"),
    ("We think that <b>B</b> is right <|end|>", "We think that <b>B</b> is right <|end|>", ""),
    ("analysis of (B)", "analysis of (B)", ""),
    ("analysis: (B)", "analysis: (B)", ""),
]


@pytest.mark.parametrize(("text", "answer", "end"), COMPLETIONS)
def test_what_is_thought_is_no_answer(text: str, answer: str, end: str) -> None:
    assert answered(text) == answer
    assert unclosed(text) == end
    if end:
        assert answered(f"{text}{end}C") == f"{answer}C"
        assert unclosed(f"{text}{end}C") == ""


@pytest.mark.parametrize("text", ["I use <think> (A)", "The <think> tag (A)", "B\n```\n<think>(A)"])
def test_a_mark_that_nothing_closes_opens_a_block_of_a_truncated_text(text: str) -> None:
    before = text.partition("<think>")[0]
    assert (answered(text, truncated=True), unclosed(text, truncated=True)) == (before, "</think>")


@pytest.mark.parametrize(
    ("prompt", "text", "answer", "end"),
    [
        ("<assistant><think>\n", "(A)", "", "</think>"),
        ("<assistant><think>\n", "(A)?</think>B", "B", ""),
        ("<assistant><think>\n", "<think>(A)?</think>B", "B", ""),
        ("<assistant><think>\n\n</think>\n\n", "B", "B", ""),  # a template that asks for no reasoning
        ("Think in <think>. <assistant>", "B", "B", ""),
        ("<|start|>assistant<|channel|>analysis<|message|>", "(A)", "", f"<|end|><|start|>assistant{FINAL}"),
        ("<|start|>assistant", f"{GPT_OSS}{FINAL}B", "B", ""),
        (f"<|start|>assistant{FINAL}", "B", "B", ""),
    ],
)
def test_the_prompt_may_have_begun_the_reasoning(prompt: str, text: str, answer: str, end: str) -> None:
    assert (answered(text, prompt), unclosed(text, prompt)) == (answer, end)


def test_special_tokens_that_mark_reasoning_stay_in_the_text(tmp_path: Path) -> None:
    from conftest import write_model
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    from sftlab.eval.engines import reasoning_decoder

    tokenizer = AutoTokenizer.from_pretrained(write_model(tmp_path / "model"))
    assert reasoning_decoder(tokenizer) is None
    marks = ["[THINK]", "[/THINK]", "<|channel|>", "<|message|>", "<|other|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(mark, special=True) for mark in marks]})
    decode = reasoning_decoder(tokenizer)
    assert decode is not None
    ids = tokenizer("<s>[THINK]é (A)?[/THINK]<|other|>the answer is (B)</s>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "é (A)?the answer is (B)"
    assert decode(ids) == "[THINK]é (A)?[/THINK]the answer is (B)"
