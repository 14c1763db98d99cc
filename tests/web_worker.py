"""web_demo.py as it is, but for one thing: a question that begins with `say: ` is answered with the rest of it.

Replies that the browser tests need word for word go through the engine like any other, token by token.
"""

from collections.abc import Sequence
from dataclasses import replace

import web.replies
import web_demo
from live_server import SAY, Script
from qwen.engine import Request
from utils import run_script


class ScriptedReplier(web.replies.Replier):
    def _request(
        self, prompt: Sequence[int], question: web.replies.Question, settings: web.replies.Settings
    ) -> Request:
        request = super()._request(prompt, question, settings)
        tokenizer = self.engine.tokenizer
        if not question.query.startswith(SAY):
            return request
        rest = question.query[len(SAY) :].removeprefix(question.prefix)  # where a reply is gone on with
        return replace(request, constraint=Script(tokenizer, rest))


if __name__ == "__main__":
    web.replies.Replier = ScriptedReplier
    run_script(web_demo.main)
