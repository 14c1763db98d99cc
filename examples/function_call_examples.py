"""Function calls through a running openai_api.py, in today's form (`tools`), streamed, and in the older (`functions`).

OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/function_call_examples.py
"""

import json
import os
from collections.abc import Callable
from typing import Any

from openai import OpenAI

os.environ.setdefault("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
os.environ.setdefault("OPENAI_API_KEY", "none")

FUNCTION: dict[str, Any] = {
    "name": "get_population",
    "description": "The number of people who live in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city's name in English", "maxLength": 40}},
        "required": ["city"],
    },
}
QUESTION: dict[str, Any] = {"role": "user", "content": "How many people live in Rome?"}
OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 200}


def get_population(city: str) -> str:
    known = {"rome": 2_746_984, "paris": 2_102_650}
    return f"{known[city.lower()]:,}" if city.lower() in known else f"nothing is known of {city}"


def call(arguments: str) -> str:
    """The result for the model: what goes wrong, too, is something to be told."""
    try:
        return get_population(**json.loads(arguments))
    except (TypeError, ValueError) as error:
        return f"Error: {error}"


def with_tools(client: OpenAI, model: str) -> str | None:
    """One call and its result."""
    # A call is asked for, because small models forget their tools; Qwen-7B-Chat does well with "auto".
    tools: Any = [{"type": "function", "function": FUNCTION}]
    messages: list[Any] = [QUESTION]
    asked = client.chat.completions.create(
        model=model, messages=messages, tools=tools, tool_choice="required", **OPTIONS
    ).choices[0].message  # fmt: skip
    messages.append(asked)
    for each in asked.tool_calls or []:
        print(f"-> {each.function.name}({each.function.arguments})")
        messages.append({"role": "tool", "tool_call_id": each.id, "content": call(each.function.arguments)})
    answer = client.chat.completions.create(model=model, messages=messages, tools=tools, tool_choice="none", **OPTIONS)
    return answer.choices[0].message.content


def streamed(client: OpenAI, model: str) -> str | None:
    """The same call as it is written, piece by piece."""
    tools: Any = [{"type": "function", "function": FUNCTION}]
    name, arguments = "", ""
    stream = client.chat.completions.create(
        model=model, messages=[QUESTION], tools=tools, tool_choice="required", stream=True, **OPTIONS
    )
    for chunk in stream:
        for part in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    return f"{name}({arguments})"


def with_functions(client: OpenAI, model: str) -> str | None:
    """The form of 2023: one `function_call` in a message, its result in a message of the role `function`."""
    messages: list[Any] = [QUESTION]
    asked = client.chat.completions.create(
        model=model, messages=messages, functions=[FUNCTION], function_call={"name": FUNCTION["name"]}, **OPTIONS
    ).choices[0].message  # fmt: skip
    print(f"-> {asked.function_call.name}({asked.function_call.arguments})")
    result = call(asked.function_call.arguments)
    messages += [asked, {"role": "function", "name": FUNCTION["name"], "content": result}]
    answer = client.chat.completions.create(
        model=model, messages=messages, functions=[FUNCTION], function_call="none", **OPTIONS
    )
    return answer.choices[0].message.content


def main() -> None:
    client = OpenAI()
    model = client.models.list().data[0].id
    examples: list[Callable[[OpenAI, str], str | None]] = [with_tools, streamed, with_functions]
    for example in examples:
        print(f"{example.__name__}: {example(client, model)}")


if __name__ == "__main__":
    main()
