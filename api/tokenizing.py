"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them."""

from typing import Any

from qwen.chatml import encode_messages
from qwen.tools import render_messages

from .errors import ApiError
from .plan import build_chat_prompt, naming, read_tools
from .protocol import ChatRequest, DetokenizeRequest, TokenizeRequest
from .scores import token_bytes
from .server import Server


def tokenize(server: Server, body: TokenizeRequest) -> dict[str, Any]:
    tokenizer = server.ready.tokenizer
    if body.prompt is not None:
        tokens = tokenizer.encode_text(body.prompt)
    elif body.continue_final_message:
        given = {name: getattr(body, name) for name in ("messages", "tools")}
        request = ChatRequest.model_construct(**given, continue_final_message=True)
        tokens = build_chat_prompt(server, request, read_tools(request))[0]
    else:
        request = ChatRequest.model_construct(messages=body.messages, tools=body.tools)
        with naming("messages"):
            turns = render_messages([message.plain() for message in body.messages or []], read_tools(request).tools)
        tokens = encode_messages(tokenizer, turns, body.add_generation_prompt is not False)
    answer = {"tokens": tokens, "count": len(tokens), "max_model_len": server.ready.context}
    if body.return_token_strs:
        texts = (token_bytes(tokenizer, token).decode("utf-8", "replace") for token in tokens)
        answer["token_strs"] = list(texts)
    return answer


def detokenize(server: Server, body: DetokenizeRequest) -> dict[str, str]:
    tokenizer = server.ready.tokenizer
    if unknown := [token for token in body.tokens if token not in tokenizer.decoder]:
        raise ApiError(400, f"tokens: {unknown[0]} is no token of this vocabulary", "tokens", "invalid_value")
    return {"prompt": tokenizer.decode(body.tokens)}


def tokenizer_info(server: Server) -> dict[str, Any]:
    tokenizer = server.ready.tokenizer
    end = tokenizer.decoder[tokenizer.im_end_id]
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "chat_template": tokenizer.chat_template,
        "vocab_size": len(tokenizer),
        "model_max_length": server.ready.context,
        "bos_token": None,
        "eos_token": end,
        "pad_token": tokenizer.decoder[tokenizer.eod_id],
        "eot_token": end,
        "special_tokens": {str(token): tokenizer.decoder[token] for token in sorted(tokenizer.special_ids)},
        "add_bos_token": False,
        "add_eos_token": False,
    }
