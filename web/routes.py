"""What the page's scripts ask the server for, beside gradio's own routes: replies, attached files, and the scripts.

A reply is a stream of JSON lines over a plain POST. Gradio's event queue could carry it, but would compare and send
the whole conversation at every step; and it ends with the server, where a reply here is asked to go on.
"""

import contextlib
import json
import logging
import mimetypes
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import charset_normalizer
from gradio.utils import get_upload_folder
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from qwen import QwenError
from qwen.errors import first_line
from qwen.tools import Tool, read_tool

from .replies import PageError, Progress, Question, Replier, ServerClosing, Settings, Step

logger = logging.getLogger("qwen.web")
FOLDER = Path(__file__).parent
MAX_BODY = 16 * 2**20  # bytes of a question, its history included
MAX_FILE = 4 * 2**20  # bytes of an attached file
SAMPLE = 2**16  # bytes in which binary data shows


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SettingsBody(Strict):
    """`Settings` with their bounds."""

    temperature: float = Field(ge=0, le=10)
    top_p: float = Field(gt=0, le=1)
    top_k: int = Field(ge=0)
    repetition_penalty: float = Field(gt=0, le=10)
    max_new_tokens: int = Field(ge=1)
    seed: int | None = Field(ge=0, lt=2**63)


class ToolBody(Strict):
    """A tool as the user described it."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}


class StepBody(Strict):
    thought: str
    name: str
    arguments: str
    observation: str


class QuestionBody(Strict):
    """A POST to /chat/reply."""

    query: str
    history: list[tuple[str, str]] = []
    system: str
    prefix: str = ""
    settings: SettingsBody
    tools: Annotated[list[ToolBody], Field(max_length=32)] = []
    steps: Annotated[list[StepBody], Field(max_length=32)] = []


class ChatRoutes:
    """The routes of a page. `tools` are those that the server runs, by name."""

    def __init__(self, replier: Replier, tools: Mapping[str, Tool]) -> None:
        self.replier, self.tools = replier, tools
        mimetypes.add_type("text/javascript", ".js")  # some systems have it as text, which no browser runs

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/chat/reply", self.reply, methods=["POST"]),
            Route("/chat/file", self.read_file, methods=["POST"]),
            Route("/chat/alive", self.is_alive),
            Mount("/chat/texts", StaticFiles(directory=FOLDER / "texts")),
            Mount("/chat", StaticFiles(directory=FOLDER / "static")),
        ]

    async def is_alive(self, request: Request) -> Response:
        return Response(status_code=204)

    async def reply(self, request: Request) -> Response:
        """Lines of JSON, each with what of `Progress` is there, or an error."""
        await check_user(request)
        body = await read_body(request)
        try:
            asked = QuestionBody.model_validate_json(body)
            question = self._question(asked)
        except (ValidationError, QwenError) as error:
            return JSONResponse({"error": describe(error)}, status_code=400)
        lines = self._lines(request, question, Settings(**asked.settings.model_dump()))
        return StreamingResponse(lines, media_type="application/x-ndjson", headers={"Cache-Control": "no-store"})

    def _question(self, asked: QuestionBody) -> Question:
        tools = [self.tools.get(tool.name) or read_tool(tool.model_dump()) for tool in asked.tools]
        steps = [Step(**step.model_dump()) for step in asked.steps]
        return Question(asked.query, asked.history, asked.system, asked.prefix, tools, steps)

    async def _lines(self, request: Request, question: Question, settings: Settings) -> AsyncIterator[str]:
        try:
            async with contextlib.aclosing(self.replier.reply(question, settings)) as reply:
                async for progress in reply:
                    if await request.is_disconnected():
                        return
                    yield to_line(progress)
        except ServerClosing:
            return  # without an end: the page waits for the next server, and goes on there
        except QwenError as error:
            yield json.dumps({"error": describe(error)}) + "\n"
        except Exception as error:  # a line that says so: without one the page would ask again and again
            logger.exception("a reply failed")
            yield json.dumps({"error": {"message": f"the reply failed: {first_line(error)}"}}) + "\n"

    async def read_file(self, request: Request) -> Response:
        """The text of a file that gradio took in, which is deleted then: it lives in the browser from now on."""
        await check_user(request)
        try:
            path = uploaded_path(json.loads(await read_body(request)))
        except (ValueError, TypeError, AttributeError):
            raise HTTPException(400, "a JSON object with the path of an uploaded file is wanted") from None
        try:
            data = path.read_bytes()
        except OSError:
            raise HTTPException(404, "no such upload") from None
        try:
            text = read_text(data, self.replier.engine.context)
        except PageError as error:
            return JSONResponse({"error": describe(error)}, status_code=400)
        path.unlink(missing_ok=True)
        return JSONResponse({"text": text, "tokens": self.replier.count(text), "bytes": len(data)})


def to_line(progress: Progress) -> str:
    return json.dumps({name: value for name, value in asdict(progress).items() if value not in (None, "", 0)}) + "\n"


def describe(error: Exception) -> dict[str, Any]:
    """An error as the page takes it: its sentence, and the key of the page's own text for it."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return {"message": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}
    if isinstance(error, PageError):
        return {"message": str(error), "key": error.key, "values": error.values}
    return {"message": str(error)}


def read_text(data: bytes, context: int) -> str:
    """The text of a file, whatever its encoding.

    Raises:
        PageError: it is no text, or longer than the model can read.
    """
    if len(data) > MAX_FILE or len(data) > 16 * context:  # few tokens have more than 16 bytes
        raise PageError("the file is longer than the model can read", "file_too_long")
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))  # UTF-16, which is full of zeros
    if b"\0" in data[:SAMPLE] and not wide:
        raise PageError("the file is no text", "file_binary")
    try:
        return data.decode("utf-16" if wide else "utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        found = charset_normalizer.from_bytes(data).best()
    if found is None:
        raise PageError("the file is no text", "file_binary")
    return str(found).replace("\r\n", "\n")


def uploaded_path(asked: Mapping[str, str]) -> Path:
    """The path that the browser names, if it is a file that gradio took in.

    Raises:
        ValueError: it is not.
    """
    path = Path(os.path.realpath(asked["path"]))
    if not path.is_relative_to(os.path.realpath(get_upload_folder())):
        raise ValueError(path)
    return path


async def read_body(request: Request) -> bytes:
    """The body, if it is JSON, which no form of another site can send, and not huge."""
    if request.headers.get("content-type") != "application/json":
        raise HTTPException(415, "application/json is wanted")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, "the question is too long")
    return body


async def check_user(request: Request) -> None:
    """As gradio's own routes do: with --auth, only who has signed in."""
    if request.app.auth is None:
        return
    get_user = next(route.endpoint for route in request.app.routes if route.path == "/gradio_api/user")
    if await get_user(request) is None:
        raise HTTPException(401, "sign in first")
