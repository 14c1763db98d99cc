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
    def _request(self, prompt: Sequence[int], settings: web.replies.Settings) -> Request:
        request = super()._request(prompt, settings)
        tokenizer = self.engine.tokenizer
        asked = tokenizer.decode(list(prompt)).rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        if not asked.startswith(SAY):
            return request
        return replace(request, constraint=Script(tokenizer, asked[len(SAY) :]))


if __name__ == "__main__":
    web.replies.Replier = ScriptedReplier
    run_script(web_demo.main)
