"""Tools with a running openai_api.py: the model asks for calls, this script makes them, round by round.

OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/openai_tools.py
"""

import json
import os
from typing import Any

from openai import OpenAI

os.environ.setdefault("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
os.environ.setdefault("OPENAI_API_KEY", "none")

ROUNDS = 4
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city today.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The city's name", "maxLength": 40}},
                "required": ["city"],
            },
        },
    }
]


def get_weather(city: str) -> str:
    return f"In {city} it is sunny, 24 degrees."


def main() -> None:
    client = OpenAI()
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
    for number in range(ROUNDS):
        # The first call is asked for, because small models forget their tools; Qwen-7B-Chat does well with "auto".
        choice = "required" if number == 0 else "auto"
        reply = client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, tool_choice=choice, temperature=0, max_tokens=200
        ).choices[0]
        messages.append(reply.message)
        if not reply.message.tool_calls:
            print(reply.message.content)
            return
        for call in reply.message.tool_calls:
            print(f"-> {call.function.name}({call.function.arguments})")
            try:
                result = get_weather(**json.loads(call.function.arguments))
            except (TypeError, ValueError) as error:
                result = f"Error: {error}"  # the model can read it, and try again
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    print(f"no answer after {ROUNDS} rounds")


if __name__ == "__main__":
    main()
