"""RemoteJudge: a judge of texts behind HTTP, as a function of texts that evidence can be declared with."""

from __future__ import annotations

import hashlib
import math
import numbers
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lmppl.errors import FactorError, LmpplError, ModelError
from lmppl.modeling.evidence.json_service import Answer, JsonService, Stopped, shown_url
from lmppl.modeling.function_contents import content_digest
from lmppl.modeling.returned_values import quote

__all__ = ["JudgeCost", "RemoteJudge"]

Score = float | list[float]
UNPICKLED = ("_service", "_memory", "_lock", "_texts", "_seconds")


@dataclass(frozen=True)
class JudgeCost:
    """What a judge was asked so far.

    Parameters
    ----------
    requests : int
        HTTP requests, tries again among them.
    retries : int
        Tries again alone.
    texts : int
        Texts that were judged; those it remembered are not among them.
    seconds : float
        Spent in calls, waiting included.
    """

    requests: int
    retries: int
    texts: int
    seconds: float


class RemoteJudge:
    """A judge over HTTP: list of texts → one score for each (or K ≥ 2 of them), in the judge's own units.

    A function as `Reward`, `Optimality`, `Constraint(where=)`, `UncertainReward` and `Moment` take it. Texts go out in
    batches, several at once, and each distinct text once: answers are remembered as they arrive, so that after a
    failure the next call asks for the rest alone. By default it POSTs {"texts": [...]} and reads {"scores": [...]}.

    Parameters
    ----------
    url : str
        http:// or https://, without a user's name and password.
    timeout : float
        Seconds for one request, whole.
    max_retries : int
        Tries again after connection errors, timeouts, 408, 425, 429 and 5xx; another status is an error at once.
    backoff : float
        Seconds before the first of these; doubled each time. A longer Retry-After is obeyed, up to five minutes.
    concurrency : int
        Requests at once.
    batch_size : int
        Texts in one request.
    headers : mapping, optional
        Such as {"Authorization": "Bearer ..."}. They stand in no error, repr, description or hash; a pickle has them.
    request : callable, optional
        texts of one batch → the JSON data to send.
    response : callable, optional
        JSON data that came back → scores, in the order of the texts.
    remember : bool
        Keep answers by text, as long as this object lives. With False every text of every call is judged anew, which a
        judge that is random (`stochastic=True`) needs.

    Raises
    ------
    ModelError
        Where an argument is out of range.
    FactorError
        When called: no answer, a status that is no success, no JSON, another number of scores, nan, +∞, or what is no
        number. The message has the address, the status, the beginning of the body and the number of tries.

    Examples
    --------
    >>> RemoteJudge("http://localhost:8000/score", batch_size=32)
    RemoteJudge('http://localhost:8000/score', timeout=30, max_retries=4, backoff=0.5, concurrency=8, batch_size=32)
    """

    __name__ = "judge"

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        max_retries: int = 4,
        backoff: float = 0.5,
        concurrency: int = 8,
        batch_size: int = 16,
        headers: Mapping[str, str] | None = None,
        request: Callable[[list[str]], Any] | None = None,
        response: Callable[[Any], Any] | None = None,
        remember: bool = True,
    ) -> None:
        _check_url(url)
        _check_number("timeout", timeout, positive=True)
        _check_number("backoff", backoff)
        for name, count, least in (
            ("max_retries", max_retries, 0),
            ("concurrency", concurrency, 1),
            ("batch_size", batch_size, 1),
        ):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ModelError(f"RemoteJudge: got {name}={count!r}, expected a whole number from {least} on")
        for name, adapter in (("request", request), ("response", response)):
            if adapter is not None and not callable(adapter):
                raise ModelError(f"RemoteJudge: got {name}={adapter!r}, expected a function")
        _check_headers(headers)
        self.url, self.timeout, self.max_retries, self.backoff = url, float(timeout), max_retries, float(backoff)
        self.concurrency, self.batch_size, self.remembers = concurrency, batch_size, bool(remember)
        self.request, self.response = request, response
        self._headers = dict(headers or {})
        self._begin()

    def _begin(self) -> None:
        """Nothing asked yet, nothing remembered."""
        self._service = JsonService(
            self.url, self.timeout, self.max_retries, self.backoff, self._headers, self.concurrency
        )
        self._memory: dict[str, Score] = {}
        self._lock = threading.Lock()
        self._texts, self._seconds = 0, 0.0

    @property
    def cost(self) -> JudgeCost:
        """What was asked so far, by all calls."""
        return JudgeCost(self._service.requests, self._service.retries, self._texts, self._seconds)

    @property
    def fingerprint(self) -> str:
        """Names what is asked, for the spec hash: the address and the contents of `request` and `response`."""
        adapters = [None if fn is None else content_digest(fn) for fn in (self.request, self.response)]
        return hashlib.sha256(repr((self.url, adapters)).encode()).hexdigest()[:16]

    def forget(self) -> None:
        """Drop the answers: every text will be judged anew."""
        with self._lock:
            self._memory.clear()

    def __call__(self, texts: list[str]) -> list[Score]:
        start = time.perf_counter()
        if not (isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)):
            raise FactorError(f"judge {shown_url(self.url)}: reads texts, got {type(texts).__name__}; leave on= out")
        with self._lock:
            known = {text: self._memory[text] for text in texts if text in self._memory}
        asked = [t for t in dict.fromkeys(texts) if t not in known] if self.remembers else list(texts)
        try:
            scores = self._ask_all([asked[i : i + self.batch_size] for i in range(0, len(asked), self.batch_size)])
        finally:
            with self._lock:
                self._seconds += time.perf_counter() - start
        if not self.remembers:
            return scores
        known.update(zip(asked, scores, strict=True))
        return [known[text] for text in texts]

    def _ask_all(self, batches: list[list[str]]) -> list[Score]:
        """The scores of all batches, in order; the first failure ends the tries of all, and keeps what has arrived."""
        stop = threading.Event()
        if len(batches) < 2 or self.concurrency == 1:
            return [score for batch in batches for score in self._ask(batch, stop)]
        pool = ThreadPoolExecutor(min(self.concurrency, len(batches)), thread_name_prefix="lmppl-judge")
        try:
            futures = [pool.submit(self._ask, batch, stop) for batch in batches]
            for future in as_completed(futures):
                future.result()
        except LmpplError:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)  # for what is under way, whose answers are kept
            raise
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        return [score for future in futures for score in future.result()]

    def _ask(self, batch: list[str], stop: threading.Event) -> list[Score]:
        if stop.is_set():
            raise Stopped
        data = {"texts": batch} if self.request is None else self._adapted("request", self.request, list(batch), "")
        answer = self._service.post(data, stop)
        scores = self._scores(answer, batch)
        with self._lock:
            self._texts += len(batch)
            if self.remembers:
                self._memory.update(zip(batch, scores, strict=True))
        return scores

    def _scores(self, answer: Answer, batch: list[str]) -> list[Score]:
        if self.response is not None:
            scores = self._adapted("response", self.response, answer.data, f"{answer.described}; ")
        elif isinstance(answer.data, Mapping) and "scores" in answer.data:
            scores = answer.data["scores"]
        else:
            raise FactorError(f'{answer.described}, expected {{"scores": [...]}}; response= reads another form')
        if hasattr(scores, "tolist"):
            scores = scores.tolist()
        if not isinstance(scores, list | tuple):
            raise FactorError(f"{answer.described}; its scores are a {type(scores).__name__}, expected a list")
        if len(scores) != len(batch):
            raise FactorError(f"{answer.described}; got {len(scores)} scores for {len(batch)} texts")
        return [_score(score, text, answer) for score, text in zip(scores, batch, strict=True)]

    def _adapted(self, name: str, adapter: Callable[[Any], Any], argument: Any, described: str) -> Any:
        try:
            return adapter(argument)
        except Exception as error:
            head = described or f"judge {shown_url(self.url)}: "
            raise FactorError(f"{head}{name}= raised {type(error).__name__}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """The configuration: a copy has asked nothing yet, and remembers nothing."""
        return {name: value for name, value in vars(self).items() if name not in UNPICKLED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __repr__(self) -> str:
        options = "timeout", "max_retries", "backoff", "concurrency", "batch_size"
        shown = ", ".join(f"{name}={getattr(self, name):g}" for name in options)
        return f"RemoteJudge({shown_url(self.url)!r}, {shown})"


def _score(value: Any, text: str, answer: Answer) -> Score:
    if isinstance(value, list | tuple) and value:
        return [_number(one, text, answer) for one in value]
    return _number(value, text, answer)


def _number(value: Any, text: str, answer: Answer) -> float:
    """−∞ passes: whether it is allowed is the factor's business."""
    if not isinstance(value, numbers.Real):
        raise FactorError(f"{answer.described}; got {quote(str(value))}, expected a number, for the text {quote(text)}")
    number = float(value)
    if math.isnan(number) or number == math.inf:
        raise FactorError(f"{answer.described}; got {number}, expected a finite number, for the text {quote(text)}")
    return number


def _check_url(url: Any) -> None:
    if isinstance(url, str) and "@" in url.partition("://")[2].partition("/")[0]:
        raise ModelError("RemoteJudge: the url holds a user's name or password; give them in headers=")
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is no number, or half an address
        good = False
    if not good:
        raise ModelError(f"RemoteJudge: got url={url!r}, expected one such as 'http://localhost:8000/score'")


def _check_number(name: str, value: Any, *, positive: bool = False) -> None:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not real or value < 0 or (positive and value == 0):
        raise ModelError(f"RemoteJudge: got {name}={value!r}, expected a number of seconds")


def _check_headers(headers: Any) -> None:
    """Their values are never shown."""
    if headers is None:
        return
    if not isinstance(headers, Mapping):
        raise ModelError(f"RemoteJudge: got headers of type {type(headers).__name__}, expected a mapping")
    for name, value in headers.items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise ModelError(
                f"RemoteJudge: header {name!r} is a {type(value).__name__}, expected a string (is the variable set?)"
            )
        if not (value.isascii() and value.isprintable()):
            raise ModelError(
                f"RemoteJudge: header {name!r} holds a line break or another character that headers cannot have; "
                "a key that was read from a file is stripped with key.strip()"
            )
