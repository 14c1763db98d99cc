"""A question to a running openai_api.py, and its reply in one piece.

OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/openai_plain.py
"""

import os

from openai import OpenAI

os.environ.setdefault("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
os.environ.setdefault("OPENAI_API_KEY", "none")


def main() -> None:
    client = OpenAI()
    reply = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[
            {"role": "system", "content": "You are a helpful assistant. Be brief."},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        temperature=0,
        max_tokens=60,
    )
    print(reply.choices[0].message.content)
    print(f"({reply.choices[0].finish_reason}, {reply.usage.completion_tokens} tokens)")


if __name__ == "__main__":
    main()
