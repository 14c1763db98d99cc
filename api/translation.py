"""What the protocols that are translated into the inner request share."""

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from .errors import ApiError, validation_error
from .plan import ChatPlan, plan_chat
from .protocol import ChatRequest
from .server import Server


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Tell mistakes in the inner request by the protocol's own names of the parameters."""
    try:
        yield
    except ApiError as error:
        for inner, outer in names.items():
            if error.param and (error.param == inner or error.param.startswith((f"{inner}.", f"{inner}["))):
                message = str(error).replace(error.param, outer, 1)
                raise ApiError(error.status, message, outer, error.code, error.retry_after) from error
        raise


def inner_request(fields: Mapping[str, Any]) -> ChatRequest:
    """The inner request; ApiError where it can't be one."""
    try:
        return ChatRequest.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise validation_error(error.errors()) from error


async def plan_inner(server: Server, fields: Mapping[str, Any], names: Mapping[str, str]) -> ChatPlan:
    """The plan of an inner request, mistakes told by the protocol's names."""
    with renamed(names):
        return await asyncio.to_thread(plan_chat, server, inner_request(fields))
