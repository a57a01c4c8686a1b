"""POST of JSON to one address: timeouts, tries again where that can help, and errors that keep secrets."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lmppl.errors import FactorError

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

__all__ = ["Answer", "JsonService", "Stopped", "shown_url"]

log = logging.getLogger(__name__)

LONGEST_WAIT = 300.0  # seconds between two tries
SHOWN = 200  # characters of a body in errors
SECRET = 8  # characters from which on a word of a header's value may be one
TRY_AGAIN = (408, 425, 429)  # and all from 500 on
OWN_HEADERS = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "lmppl"}


class Stopped(Exception):
    """Another request has failed, so that this one is not tried again."""


@dataclass(frozen=True)
class Answer:
    """What came back, with status 2xx.

    Parameters
    ----------
    data
        The body, read as JSON.
    described : str
        Address, status, number of tries and the beginning of the body, for errors.
    """

    data: Any
    described: str


@dataclass(frozen=True)
class Outcome:
    """One try: what happened, in words; whether another one may end better, and how long the server asks to wait."""

    described: str
    body: bytes = b""
    good: bool = False
    may_pass: bool = False
    wait: float = 0.0


class JsonService:
    """JSON in, JSON out, by POST to one address; safe to use from many threads.

    Connection errors, timeouts and the statuses 408, 425, 429 and 5xx are tried again after `backoff`·2^i seconds, or
    after what a Retry-After header asks for if that is longer; redirects, other statuses and refused certificates are
    not. No proxy is used.

    Parameters
    ----------
    url : str
    timeout : float
        Seconds for one try, from connecting to the last byte.
    max_retries : int
        Tries after the first one.
    backoff : float
        Seconds before the first of these.
    headers : mapping
        Sent with each request; their values stand in no error, not even where the server quotes them.
    connections : int
        Kept open at most.
    """

    def __init__(
        self,
        url: str,
        timeout: float,
        max_retries: int,
        backoff: float,
        headers: Mapping[str, str],
        connections: int,
    ) -> None:
        self.url, self.timeout, self.max_retries, self.backoff = url, timeout, max_retries, backoff
        self.headers, self.connections = OWN_HEADERS | dict(headers), connections
        self.requests = self.retries = 0
        self._secrets = [word for value in headers.values() for word in (value, *value.split()) if len(word) >= SECRET]
        self._lock = threading.Lock()

    def post(self, data: Any, stop: threading.Event) -> Answer:
        """The answer to `data`.

        Raises
        ------
        FactorError
            Where the last try failed, or one that no other would mend, or where the answer is no JSON.
        Stopped
            Where `stop` was set before the next try.
        """
        try:
            payload = json.dumps(data, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise FactorError(f"judge {shown_url(self.url)}: what request= returned is no JSON: {error}") from error
        for attempt in range(self.max_retries + 1):
            with self._lock:
                self.requests += 1
                self.retries += attempt > 0
            outcome = self._try(payload)
            described = self._described(outcome, attempt + 1)
            if outcome.good:
                return self._read(outcome, described)
            if not outcome.may_pass or attempt == self.max_retries:
                raise FactorError(f"{described}; {_advice(outcome)}")
            if outcome.wait > LONGEST_WAIT:
                raise FactorError(f"{described}; it asks to wait {outcome.wait:.0f} s: run again after that")
            wait = max(outcome.wait, min(self.backoff * 2**attempt, LONGEST_WAIT))
            log.warning("%s; tried again in %.1f s", described, wait)
            if stop.wait(wait):
                raise Stopped
        raise AssertionError("the last try returns or raises")

    def _read(self, outcome: Outcome, described: str) -> Answer:
        try:
            return Answer(json.loads(outcome.body), described)
        except ValueError as error:
            raise FactorError(f"{described}, which is no JSON; see that the url is that of the judge") from error

    def _try(self, payload: bytes) -> Outcome:
        from urllib3 import Timeout
        from urllib3.exceptions import HTTPError, NewConnectionError, SSLError, TimeoutError

        late = Outcome(f"no whole answer within {self.timeout:g} s", may_pass=True)
        deadline = time.monotonic() + self.timeout
        try:
            response = self._pool.request(
                "POST",
                self.url,
                body=payload,
                headers=self.headers,
                timeout=Timeout(total=self.timeout),
                retries=False,
                redirect=False,
                preload_content=False,
            )
            body = _body(response, deadline)
        except HTTPError as error:
            if isinstance(error, TimeoutError) and not isinstance(error, NewConnectionError):
                return late
            described = f"no answer ({type(error).__name__}: {error})"
            return Outcome(described, may_pass=not isinstance(error, SSLError))
        if body is None:
            return late
        may_pass = response.status in TRY_AGAIN or response.status >= 500
        return Outcome(
            f"answered {response.status}",
            body,
            good=200 <= response.status < 300,
            may_pass=may_pass,
            wait=_retry_after(response) if may_pass else 0.0,
        )

    @cached_property
    def _pool(self) -> PoolManager:
        from urllib3 import PoolManager  # costs 70 ms, and most models have no judge

        return PoolManager(num_pools=1, maxsize=self.connections)

    def _described(self, outcome: Outcome, tries: int) -> str:
        # Secrets go before the cut, which could leave half of one.
        text = outcome.body.decode("utf-8", "replace")
        described = outcome.described
        for secret in self._secrets:
            text, described = text.replace(secret, "***"), described.replace(secret, "***")
        shown = repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")
        times = "1 try" if tries == 1 else f"{tries} tries"
        what = f": {shown}" if outcome.body else ""
        return f"judge {shown_url(self.url)}: {described} after {times}{what}"


def _body(response: BaseHTTPResponse, deadline: float) -> bytes | None:
    """The whole body; None where it is not whole at the deadline: a server that drips meets each timeout of a read."""
    parts = []
    while part := response.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > deadline:
            response.close()
            return None
    response.release_conn()
    return b"".join(parts)


def _retry_after(response: BaseHTTPResponse) -> float:
    from urllib3 import Retry
    from urllib3.exceptions import InvalidHeader

    try:
        return Retry().get_retry_after(response) or 0.0
    except InvalidHeader:  # the usual back-off then
        return 0.0


def _advice(outcome: Outcome) -> str:
    if outcome.may_pass:
        return "see that it runs, or raise timeout=, max_retries= or backoff="
    if outcome.described.startswith("answered 3"):
        return "it has moved: give the url that it moved to"
    if outcome.described.startswith("answered"):
        return "it refuses the request: see the url, headers= and request="
    return "see the url and the certificate"


def shown_url(url: str) -> str:
    """The address without its query, where keys may stand."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}{'?...' if parts.query else ''}"
