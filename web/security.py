"""What the page's browser may do, nothing but talk to this server; and the scripts that its document begins with."""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# gradio's page has scripts and styles within its HTML, hence 'unsafe-inline'; what counts is that nothing is loaded
# from, or sent to, another place, whatever a reply says.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)


class ContentPolicy:
    """Adds the policy to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await self.app(scope, receive, send_with_policy)


class PageHead:
    """Puts `head` and `tail` into gradio's document, before the ends of its head and body.

    What `launch(head=)` takes is added after gradio has started: too late for colours and language, which would change
    before the reader's eyes.
    """

    def __init__(self, app: ASGIApp, head: str, tail: str) -> None:
        self.app, self.head, self.tail = app, head.encode(), tail.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/" or scope["method"] != "GET":
            await self.app(scope, receive, send)
            return
        start: Message = {}

        async def send_with_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            body = message.get("body", b"")
            body = body.replace(b"</head>", self.head + b"</head>", 1)
            before, end, after = body.rpartition(b"</body>")
            message["body"] = before + self.tail + end + after if end else body
            MutableHeaders(scope=start)["Content-Length"] = str(len(message["body"]))
            await send(start)
            await send(message)

        await self.app(scope, receive, send_with_head)
