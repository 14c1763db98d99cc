"""Tool calls of Qwen-7B-Chat for vLLM: the package's own ReAct parser behind vLLM's interface.

    vllm serve ... --enable-auto-tool-choice --tool-call-parser qwen_react

Without the plugin, for a checkpoint in Qwen2's layout: --tool-parser-plugin PATH/TO/tool_parser.py, with the package
`qwen` on PYTHONPATH.
"""

import json
from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.sampling_params import StructuredOutputsParams
from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager

from qwen.react import Delta, ReactParser, join_deltas
from qwen.tools import STOP_WORD, Tool, read_tool

FORCED_THOUGHT = "I need to use a tool."


def tools_of(request: Any) -> list[Tool]:
    """The tools that may be called, as the parser knows them."""
    if not request.tools or request.tool_choice == "none":
        return []
    return [read_tool(tool.function.model_dump(exclude_none=True)) for tool in request.tools]


def goes_on(request: Any) -> bool:
    """Whether the reply continues the assistant's turn after a result, behind `Thought:`, which the prompt ends in."""
    last = request.messages[-1]
    role = last.get("role") if isinstance(last, dict) else getattr(last, "role", None)
    return role in ("tool", "function")


def forced_format(tools: Sequence[Tool], is_open: bool) -> dict[str, Any]:
    """xgrammar's structural tag of a reply that calls one of the tools."""
    calls = [
        {"type": "sequence", "elements": [
            {"type": "const_string", "value": f"{tool.name}\nAction Input: "},
            {"type": "json_schema", "json_schema": tool.parameters or {"type": "object"}},
        ]}
        for tool in tools
    ]  # fmt: skip
    begin = f"{'' if is_open else 'Thought:'} {FORCED_THOUGHT}\nAction: "
    elements = [{"type": "const_string", "value": begin}, {"type": "or", "elements": calls}]
    return {"type": "structural_tag", "format": {"type": "sequence", "elements": elements}}


class ReactToolParser(ToolParser):
    """ReAct replies as vLLM's tool calls, whole or streamed."""

    supports_required_and_named = False  # a forced call comes in ReAct form too, see `adjust_request`
    engine_based_streaming = True  # `finish_streaming` is called at the end, for what is held back until then

    def __init__(self, tokenizer: Any, tools: Any = None) -> None:
        super().__init__(tokenizer, tools)
        self.parser: ReactParser | None = None

    def adjust_request(self, request: Any) -> Any:
        """Stop where the tool's result begins, and hold a forced call to its schema."""
        tools = tools_of(request)
        if not tools:
            return request
        stop = [request.stop] if isinstance(request.stop, str) else list(request.stop or [])
        request.stop = [*stop, STOP_WORD]
        named = getattr(getattr(request.tool_choice, "function", None), "name", None)
        if named or request.tool_choice == "required":
            chosen = [tool for tool in tools if named in (None, tool.name)]
            tag = json.dumps(forced_format(chosen, goes_on(request)), ensure_ascii=False)
            request.structured_outputs = StructuredOutputsParams(structural_tag=tag)
            request.response_format = None
        return request

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        parser = self._begin(request)
        text, calls = join_deltas([*parser.push(model_output), *parser.close()])
        made = [ToolCall(type="function", function=FunctionCall(name=c.name, arguments=c.arguments)) for c in calls]
        return ExtractedToolCallInformation(tools_called=bool(made), tool_calls=made, content=text or None)

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> DeltaMessage | None:
        if self.parser is None:
            self.parser = self._begin(request)
        return self._message(self.parser.push(delta_text))

    def finish_streaming(self) -> DeltaMessage | None:
        return None if self.parser is None else self._message(self.parser.close())

    def _begin(self, request: Any) -> ReactParser:
        most_calls = 1 if request.parallel_tool_calls is False else None
        parser = ReactParser(tools_of(request), most_calls=most_calls)
        if goes_on(request):
            parser.push("Thought:\n")
        return parser

    def _message(self, deltas: Sequence[Delta]) -> DeltaMessage | None:
        """What a client is sent of the parser's deltas."""
        text = "".join(delta.text for delta in deltas)
        calls = []
        for delta in deltas:
            if delta.call is None:
                continue
            if delta.name is not None:
                self.prev_tool_call_arr.append({"name": delta.name, "arguments": ""})
                self.streamed_args_for_tool.append("")
            self.prev_tool_call_arr[delta.call]["arguments"] += delta.arguments
            self.streamed_args_for_tool[delta.call] += delta.arguments
            begins = {} if delta.name is None else {"id": make_tool_call_id(), "type": "function"}
            function = DeltaFunctionCall(name=delta.name, arguments=delta.arguments)
            calls.append(DeltaToolCall(index=delta.call, function=function, **begins))
        return DeltaMessage(content=text or None, tool_calls=calls) if text or calls else None


if "qwen_react" not in ToolParserManager.list_registered():
    ToolParserManager.register_module("qwen_react", module=ReactToolParser)
