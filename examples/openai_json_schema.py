"""A reply of a running openai_api.py that fits a JSON schema, whatever the model would rather write.

OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/openai_json_schema.py
"""

import os

from openai import OpenAI
from pydantic import BaseModel, Field

os.environ.setdefault("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
os.environ.setdefault("OPENAI_API_KEY", "none")


class City(BaseModel):
    name: str = Field(max_length=40)
    country: str = Field(max_length=40)
    is_capital: bool


def main() -> None:
    client = OpenAI()
    reply = client.chat.completions.parse(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "Describe Paris as JSON, with name, country and is_capital."}],
        response_format=City,
        temperature=0,
        max_tokens=200,
    )
    print(repr(reply.choices[0].message.parsed))


if __name__ == "__main__":
    main()
