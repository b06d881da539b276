"""Single questions with an answer: Alpaca, prompt and completion, question and answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sftlab.dataset.row_formats import turns
from sftlab.dataset.row_formats.cells import empty, not_text, opened, refused, required, text_in, written
from sftlab.dataset.row_formats.fitting import STATED
from sftlab.dataset.row_formats.match import Match
from sftlab.dataset.row_formats.record import Converted, FormatName, Recognised
from sftlab.dataset.row_formats.sample import MOST, Sample
from sftlab.dataset.row_formats.tools import are_calls, calls_in, text_of_calls, tools_in
from sftlab.dataset.rows import Row
from sftlab.dataset.values import is_null
from sftlab.dataset.wording import column_path, short
from sftlab.records import Message

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
CONTEXT = ("context", "contexts", "passage", "article", "support", "paragraph", "story", "background", "premise")
RATIONALE = (
    *("rationale", "exp", "explanation", "cot", "complex_cot", "chain_of_thought", "reasoning", "thought"),
    *("long_answer", "cot_content"),
)
TOOLS = ("tools", "functions")

Names = Mapping[str, tuple[str, ...]]
ALPACA: Names = {
    "instruction": ("instruction",),
    "output": ("output", "response", "completion"),
    "input": ("input", "context"),
    "system": SYSTEM,
    "history": ("history",),
}
PROMPT: Names = {
    "prompt": ("prompt", "input", "inputs", "user", "human"),
    "completion": ("completion", "response", "output", "target", "targets", "assistant", "gpt", "bot"),
    "system": SYSTEM,
    "tools": TOOLS,
}
QUESTION: Names = {
    "question": ("question", "query", "problem"),
    "answer": ("answer", "answers", "response", "final_answer", "output", "completion"),
    "context": CONTEXT,
    "rationale": RATIONALE,
    "system": SYSTEM,
    "tools": TOOLS,
}
FORMATS: Mapping[FormatName, Names] = {"alpaca": ALPACA, "prompt_completion": PROMPT, "question_answer": QUESTION}


def match(sample: Sample, name: FormatName) -> Match | None:
    """Return the columns of a format; None if a column that it needs is missing or has no text."""
    roles = {role: sample.named(role, names) for role, names in FORMATS[name].items()}
    if name == "question_answer" and (solutions := sample.named("solution", ("solution",))):
        # A solution is the rationale of a short answer, or the answer itself.
        role = "rationale" if roles["answer"] else "answer"
        roles[role] = (*roles[role], *solutions)
    asked, answered = list(FORMATS[name])[:2]
    if not roles[asked] or not roles[answered] or set(roles[asked]) == set(roles[answered]):
        return None
    if not any(_can_ask(sample, column) for column in roles[asked]):
        return None
    if not any(_can_answer(sample, column, name) for column in roles[answered]):
        return None
    return Match(name, roles)


def describe(sample: Sample, matched: Match) -> Recognised:
    """Determine the column of each role.

    Raises:
        ConfigError: several columns could have the same role.
    """
    return Recognised(matched.format, sample.decided(matched.roles))


def convert(found: Recognised, row: Row, section: str) -> Converted:
    """Convert a row to a conversation.

    Raises:
        ConfigError: a text is missing, or not text.
    """
    by_format: Mapping[str, Callable[[Recognised, Row, str], Converted]] = {
        "alpaca": _alpaca,
        "prompt_completion": _prompt_completion,
        "question_answer": _question_answer,
    }
    return by_format[found.format](found, row, section)


def context_in(row: Row, column: str | None, section: str) -> str:
    """Return a text, or the texts of a list, that precede the question; "" if there are none."""
    value = opened(row.get(column)) if column else None
    if isinstance(value, dict):  # PubMedQA: {"contexts": [...], "labels": [...]}
        value = next((value[name] for name in ("contexts", "sentences", "text") if name in value), value)
    if column is None or value is None:
        return ""
    texts = [written(item) for item in (value if isinstance(value, list) else [row.get(column)])]
    if None in texts:
        raise not_text(column_path(column), value, section)
    return "\n\n".join(text.strip() for text in texts if text and text.strip())


def system_in(row: Row, column: str | None, section: str) -> list[Message]:
    """Return the system turn of a row: none if there is no text."""
    text = text_in(row, column, section=section) if column else ""
    return [{"role": "system", "content": text}] if text.strip() else []


def _alpaca(found: Recognised, row: Row, section: str) -> Converted:
    columns = found.columns
    instruction = required(row, columns["instruction"], section=section)
    added = text_in(row, columns["input"], section=section) if "input" in columns else ""
    output = required(row, columns["output"], section=section)
    history: list[Message] = []
    if "history" in columns and opened(row.get(columns["history"])):
        history = turns.messages_in(row[columns["history"]], "pairs", column_path(columns["history"]), section)
    messages: list[Message] = [
        *system_in(row, columns.get("system"), section),
        *history,
        {"role": "user", "content": f"{instruction}\n\n{added}" if added.strip() else instruction},
        {"role": "assistant", "content": output},
    ]
    return Converted(messages, None, [output])


def _prompt_completion(found: Recognised, row: Row, section: str) -> Converted:
    columns = found.columns
    prompt = _messages(row, columns["prompt"], "user", section)
    completion = _messages(row, columns["completion"], "assistant", section)
    system = system_in(row, columns.get("system"), section)
    messages = [*([] if prompt[0]["role"] == "system" else system), *prompt, *completion]
    turns.check(messages, column_path(columns["completion"]), section)
    tools = tools_in(row.get(columns["tools"]), column_path(columns["tools"])) if "tools" in columns else None
    return Converted(messages, tools, [text_of_answer(messages[-1])])


def _question_answer(found: Recognised, row: Row, section: str) -> Converted:
    columns = found.columns
    question = required(row, columns["question"], section=section)
    column = columns["answer"]
    tools = tools_in(row.get(columns["tools"]), column_path(columns["tools"])) if "tools" in columns else None
    context = context_in(row, columns.get("context"), section)
    last: Message
    if tools and are_calls(row.get(column)):
        calls = calls_in(row[column], column_path(column))
        last = {"role": "assistant", "content": None, "tool_calls": calls}
        targets = [text_of_calls(calls)]
    else:
        targets = _answers(row, column, section)
        rationale = text_in(row, columns["rationale"], section=section).strip() if "rationale" in columns else ""
        last = {"role": "assistant", "content": f"{rationale}\n\n{STATED}{targets[0]}" if rationale else targets[0]}
    messages: list[Message] = [
        *system_in(row, columns.get("system"), section),
        {"role": "user", "content": f"{context}\n\n{question}" if context else question},
        last,
    ]
    return Converted(messages, tools, targets)


def text_of_answer(message: Message) -> str:
    """Return the text of an assistant turn: its tool calls as JSON if it has no other text."""
    return message.get("content") or text_of_calls(message.get("tool_calls", []))


def _answers(row: Row, column: str, section: str) -> list[str]:
    """Return the right answers: a text, a list of texts, or an object of SQuAD or TriviaQA around one."""
    raw, path = row.get(column), column_path(column)
    value = raw if type(raw) is str else opened(raw)
    if isinstance(value, dict):
        first = value.get("text", value.get("value"))
        value = first if isinstance(first, list) else [first, *(value.get("aliases") or [])]
        if value == [None]:
            raise not_text(path, opened(raw), section)
        path += ".text"
    items = value if isinstance(value, list) else [raw]
    texts = [None if is_null(item) else written(item) for item in items]
    if not any(text and text.strip() for text in texts):
        raise empty(row, column, section) if is_null(raw) or not isinstance(value, list) else _no_answers(path, section)
    if None in texts:
        raise not_text(path, opened(raw), section)
    return list(dict.fromkeys(text for text in texts if text and text.strip()))


def _no_answers(path: str, section: str) -> Exception:
    from sftlab.dataset.row_formats.cells import leave_out

    return refused(f"{path} has no answer", leave_out(section, path), f"{section}.keep")


def _messages(row: Row, column: str, role: str, section: str) -> list[Message]:
    """Return the turns of a column that is text or a list of messages."""
    value, path = opened(row.get(column)), column_path(column)
    layout = turns.layout_of(value, column)
    if layout == "turns":
        return turns.messages_in(value, layout, path, section)
    if isinstance(row.get(column), list | dict):
        raise refused(f"{path} is neither text nor a list of messages: {short(repr(value))}", "fix the row")
    text = required(row, column, section=section)
    return [{"role": "user" if role == "user" else "assistant", "content": text}]


def _can_ask(sample: Sample, column: str) -> bool:
    return sample.has_text(column) or _has_turns(sample, column)


def _can_answer(sample: Sample, column: str, name: FormatName) -> bool:
    """Return whether a column has answers. Its conversations are answers only in prompt and completion."""
    if sample.has_text(column):
        return True
    return _has_turns(sample, column) if name == "prompt_completion" else name == "question_answer"


def _has_turns(sample: Sample, column: str) -> bool:
    values = sample.opened(column)
    return sum(turns.layout_of(value, column) == "turns" for value in values) > MOST * len(values) if values else False
