"""Tools and tool calls in one form: that of OpenAI, with arguments as objects."""

from __future__ import annotations

import json
from typing import cast

from sftlab.dataset.row_formats.cells import opened, refused
from sftlab.dataset.wording import item_path, short
from sftlab.records import Tool, ToolCall


def tools_in(value: object, path: str) -> list[Tool] | None:
    """Return the tools of a row: a list of functions, or its JSON text. None if there are none.

    A function without an envelope gets one: ``{"name": …}`` becomes ``{"type": "function", "function": {"name": …}}``.

    Raises:
        ConfigError: the value is not a list of functions.
    """
    value = opened(value)
    if value is None or value == [] or (isinstance(value, str) and value.strip().lower() in ("", "none", "null")):
        return None
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise _not_tools(path, value)
    return [_tool(opened(item), item_path(path, number)) for number, item in enumerate(items)]


def calls_in(value: object, path: str) -> list[ToolCall]:
    """Return the tool calls of a turn: one call or a list of calls, as objects or JSON text.

    Raises:
        ConfigError: the value is not a list of calls.
    """
    value = opened(value)
    items = [] if value is None else [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise _not_a_call(path, value)
    return [_call(opened(item), item_path(path, number)) for number, item in enumerate(items)]


def are_calls(value: object) -> bool:
    """Return whether a value is a list of tool calls that has at least one."""
    value = opened(value)
    items = value if isinstance(value, list) else []
    named = [isinstance(item, dict) and "name" in (item.get("function") or item) for item in items]
    return bool(named) and all(named)


def text_of_calls(calls: list[ToolCall]) -> str:
    """Return tool calls as JSON text, the target of a turn without other text."""
    functions = [call["function"] for call in calls]
    return json.dumps(functions[0] if len(functions) == 1 else functions, ensure_ascii=False)


def _tool(value: object, path: str) -> Tool:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _not_tools(path, value)
    function = dict(function)
    parameters = opened(function.get("parameters"))
    if isinstance(parameters, dict):
        bare = (
            parameters
            and "properties" not in parameters
            and all(isinstance(item, dict) for item in parameters.values())
        )
        function["parameters"] = {"type": "object", "properties": parameters} if bare else parameters
    return {**value, "function": function} if "function" in value else {"type": "function", "function": function}


def _call(value: object, path: str) -> ToolCall:
    function = value.get("function", value) if isinstance(value, dict) else None
    function = opened(function)
    if not isinstance(value, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _not_a_call(path, value)
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise refused(
                f"{path} has arguments that are not JSON: {short(str(arguments))!r}", "fix the row"
            ) from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise refused(f"{path} has arguments that are not an object: {short(repr(arguments))}", "fix the row")
    call: ToolCall = {
        "type": "function",
        "function": {"name": function["name"], "arguments": cast("dict[str, object]", arguments)},
    }
    if "function" in value and isinstance(value.get("id"), str):
        call["id"] = value["id"]
    return call


def _not_tools(path: str, value: object) -> Exception:
    return refused(
        f"{path} is not a list of functions, each with a name: {short(repr(value))}",
        'write [{"type": "function", "function": {"name": …, "description": …, "parameters": …}}]',
    )


def _not_a_call(path: str, value: object) -> Exception:
    return refused(
        f"{path} is not a tool call with a name and arguments: {short(repr(value))}",
        'write {"name": …, "arguments": {…}}',
    )
