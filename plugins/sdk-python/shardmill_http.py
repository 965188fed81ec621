"""The capability `http`: requests to granted hosts."""

import json as _json
from dataclasses import dataclass
from typing import Any, Mapping

from componentize_py_types import Err
from shardmill import _failed
from wit_world.imports import http as _host


@dataclass(frozen=True, slots=True)
class Response:
    """Response to a request, whatever its status."""

    status: int
    #: Headers by lower-case name.
    headers: Mapping[str, str]
    body: bytes

    def text(self) -> str:
        """The body as UTF-8."""
        return self.body.decode()

    def json(self) -> Any:
        """The body as a JSON value."""
        return _json.loads(self.body)


def send(
    url: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
) -> Response:
    """Sends a request and waits for the response. Raises `Retry` if a later attempt may succeed."""
    request = _host.Request(method, url, list((headers or {}).items()), body)
    try:
        response = _host.send(request)
    except Err as failure:
        raise _failed(failure) from None
    return Response(response.status, dict(response.headers), response.body)
