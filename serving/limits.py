"""What stands before the application: who may ask, the kind and size of bodies, and a count of what was answered."""

import hmac
import json
from typing import TYPE_CHECKING

from trunkline.serving.measures import Measures

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/", "/health", "/ready")  # which tell nothing of the model, and need no token
LARGEST_BODY = 4 * 2**20  # bytes


def refusal(text: str, kind: str, where: tuple[str | int, ...] = ()) -> dict:
    """The body of every refusal, in the form of those of wrong fields."""
    return {"detail": [{"loc": list(where), "msg": text, "type": kind}]}


class Limits:
    """An ASGI application around another one.

    Args:
        token: that every request must have, as `Authorization: Bearer TOKEN`; empty: none.
    """

    def __init__(self, app: "ASGIApp", measures: Measures, token: str = ""):
        self.app, self.measures, self.token = app, measures, token

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        status = 500

        async def counted(message: "Message") -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if not self._may(scope["path"], headers.get(b"authorization", b"")):
                refused = refusal("this server wants Authorization: Bearer TOKEN, of its --token-file", "token")
                await _answer(counted, 401, refused)
            elif scope["method"] == "POST" and b"json" not in headers.get(b"content-type", b""):
                # a page of somebody else's, open in the same browser, cannot send this type unasked
                text = "the body must come as Content-Type: application/json, as `curl --json` sends it"
                await _answer(counted, 415, refusal(text, "content_type", ("header", "content-type")))
            elif (body := await _body(headers, receive)) is None:
                text = f"the body has more than {LARGEST_BODY:,} bytes: send fewer texts at a time"
                await _answer(counted, 413, refusal(text, "too_large", ("body",)))
            else:
                await self.app(scope, _again(body, receive), counted)
        finally:
            route = scope.get("route")  # of unknown paths there may be any number
            self.measures.requested(getattr(route, "path", "other"), status)

    def _may(self, path: str, given: bytes) -> bool:
        return not self.token or path in OPEN or hmac.compare_digest(given, b"Bearer " + self.token.encode())


async def _body(headers: dict[bytes, bytes], receive: "Receive") -> bytes | None:
    """The whole body; None of one that is too large, which is not read to its end."""
    announced = headers.get(b"content-length", b"0")
    if announced.isdigit() and int(announced) > LARGEST_BODY:
        return None
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > LARGEST_BODY:
            return None
    return b"".join(parts)


def _again(body: bytes, receive: "Receive") -> "Receive":
    given = False

    async def receive_body() -> "Message":
        nonlocal given
        if given:
            return await receive()  # whether the client has gone
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_body


async def _answer(send: "Send", status: int, content: dict) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # what is left of a body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
