"""A judge over HTTP: what is sent and read, what is tried again, what is an error, and that nothing is paid twice.

Every judge here listens on this machine, on a free port, in a thread of the test.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lmppl
from lmppl.cli import app
from lmppl.errors import FactorError, ModelError
from lmppl.modeling.evidence.json_service import LONGEST_WAIT
from lmppl.modeling.function_contents import content_digest
from lmppl.testing import check_factor

Reply = tuple[int, Any, dict[str, str]]  # status, body (bytes as they are, else JSON), headers

LM = lmppl.TabularLM.random(3, 3, context=["", "b"])
TEXTS = ["a", "bb", "abc", "", "cab"]
SECRET = "sk-0123456789abcdef"


def count_a(texts: list[str]) -> list[float]:
    return [float(t.count("a")) for t in texts]


class Judge:
    """A judge that listens. `replies` are given first, one a request; then every request is judged well."""

    def __init__(self, score: Callable[[list[str]], list[Any]] = count_a, replies: tuple[Any, ...] = ()) -> None:
        self.score, self.replies = score, list(replies)
        self.delay = 0.0
        self.asked: list[list[str]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.overlap = self.most = 0
        self.lock = threading.Lock()
        self.connections: list[socket.socket] = []
        self.port = 0
        self.start()

    def start(self) -> None:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # an answer in one packet, or acknowledgements take 40 ms

            def setup(self) -> None:
                super().setup()
                judge.connections.append(self.connection)

            def do_POST(self) -> None:
                judge.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.handle_error = lambda *args: None  # type: ignore[method-assign]  # who asked may have gone
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/score"

    @property
    def texts(self) -> list[str]:
        return [text for batch in self.asked for text in batch]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        with self.lock:
            self.overlap += 1
            self.most = max(self.most, self.overlap)
            data = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
            self.headers.append(dict(handler.headers))
            self.times.append(time.monotonic())
            reply = self.replies.pop(0) if self.replies else None
            if isinstance(data, dict) and "texts" in data:
                self.asked.append(data["texts"])
        time.sleep(self.delay)
        if callable(reply):
            reply = reply(handler, data)
        if reply is None:
            reply = (200, {"scores": self.score(data["texts"])}, {})
        with self.lock:
            self.overlap -= 1
        if reply == "hang up":
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
            return
        status, body, headers = reply
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            handler.send_response(status)
            for name, value in ({"Content-Length": str(len(payload))} | headers).items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(payload)
        except OSError:  # who asked has gone
            handler.close_connection = True


@contextmanager
def listening(*args: Any, **options: Any) -> Iterator[Judge]:
    judge = Judge(*args, **options)
    try:
        yield judge
    finally:
        judge.stop()


@pytest.fixture
def server() -> Iterator[Judge]:
    with listening() as judge:
        yield judge


def asking(server: Judge, **options: Any) -> lmppl.RemoteJudge:
    return lmppl.RemoteJudge(server.url, **{"backoff": 0.001, "timeout": 5.0, "max_retries": 2} | options)


def failure(judge: lmppl.RemoteJudge, texts: list[str] = TEXTS) -> str:
    """What evidence by this judge says when it is evaluated; always the factor's name, and the address."""
    rows = LM.enumerate_sequences(0).sequences.select(list(range(len(texts))))
    rows = lmppl.Sequences(rows.ids, rows.lengths, rows.finished, rows.context, LM.prompts, lambda _: texts)
    with pytest.raises(FactorError) as caught:
        lmppl.Target(LM * lmppl.Reward(judge, name="tone")).log_factors(rows)
    message = str(caught.value)
    assert message.startswith(f"factor 'tone': judge http://127.0.0.1:{judge.url.split(':')[2].split('/')[0]}/score: ")
    return message


# What is sent and read.


@pytest.mark.parametrize(("batch_size", "concurrency"), [(1, 1), (2, 1), (2, 3), (100, 8)])
def test_scores_come_back_in_order(server: Judge, batch_size: int, concurrency: int) -> None:
    texts = [f"{'a' * (i % 7)}{i}" for i in range(23)]
    judge = asking(server, batch_size=batch_size, concurrency=concurrency)
    assert judge(texts) == count_a(texts)
    assert sorted(server.texts) == sorted(texts)
    assert max(map(len, server.asked)) <= batch_size
    assert judge.cost.requests == len(server.asked) == -(-23 // batch_size)
    assert (judge.cost.retries, judge.cost.texts) == (0, 23)
    assert judge.cost.seconds > 0


def test_no_texts_ask_nothing(server: Judge) -> None:
    assert asking(server)([]) == []
    assert server.asked == []


def test_each_distinct_text_is_asked_once_and_remembered(server: Judge) -> None:
    judge = asking(server)
    assert judge(["a", "bb", "a"]) == [1.0, 0.0, 1.0]
    assert judge(["bb", "aa", "a"]) == [0.0, 2.0, 1.0]
    assert server.asked == [["a", "bb"], ["aa"]]
    judge.forget()
    assert judge(["a"]) == [1.0]
    assert server.asked[2:] == [["a"]]


def test_a_judge_without_memory_is_asked_about_every_text(server: Judge) -> None:
    judge = asking(server, remember=False)
    assert [judge(["a", "bb", "a"]) for _ in range(2)] == [[1.0, 0.0, 1.0]] * 2
    assert server.asked == [["a", "bb", "a"]] * 2
    lmppl.Reward(judge, stochastic=True)
    with pytest.raises(ModelError, match=r"no sample is fresh; make it with remember=False"):
        lmppl.Reward(asking(server), stochastic=True)


def test_texts_of_every_kind_arrive_whole(server: Judge) -> None:
    texts = ["café ∝ 😀", 'he said "no"\n\t\\', "\ud800", "\x00", " "]
    asking(server)(texts)
    assert server.asked == [texts]


def test_headers_are_sent(server: Judge) -> None:
    asking(server, headers={"Authorization": f"Bearer {SECRET}", "User-Agent": "mine"})(["a"])
    sent = server.headers[0]
    assert (sent["Authorization"], sent["User-Agent"]) == (f"Bearer {SECRET}", "mine")
    assert sent["Content-Type"] == "application/json"


def chat_request(texts: list[str]) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text} for text in texts]}


def chat_response(data: dict[str, Any]) -> list[float]:
    return [float(choice["message"]["content"]) for choice in data["choices"]]


def test_another_protocol_by_two_functions() -> None:
    def chat(handler: Any, data: Any) -> Reply:
        number = data["messages"][0]["content"].count("a")
        return 200, {"choices": [{"message": {"content": f" {number}\n"}}]}, {}

    with listening(replies=(chat,) * 5) as server:
        judge = asking(server, batch_size=1, request=chat_request, response=chat_response)
        assert judge(TEXTS) == count_a(TEXTS)


def test_several_scores_for_a_text_are_a_belief() -> None:
    with listening(lambda texts: [[t.count("a"), t.count("b") / 2] for t in texts]) as server:
        reward = lmppl.UncertainReward(asking(server), 0.5, lmppl.LowerBound(1.0), name="tone")
        rows = LM.enumerate_sequences(0).sequences
        column = lmppl.Target(LM * reward).features(rows)["judge"]
    members = torch.tensor([[t.count("a"), t.count("b") / 2] for t in rows.text], dtype=torch.float64)
    assert torch.allclose(column[:, 0], members.mean(1), atol=1e-12, rtol=0)
    assert torch.allclose(column[:, 1], members.std(1), atol=1e-12, rtol=0)


def test_every_kind_of_evidence_takes_it() -> None:
    def log_score(texts: list[str]) -> list[float]:
        return [-float(t.count("a")) - (1e400 if t == "ccc" else 0.0) for t in texts]

    with listening(log_score) as server:
        judge = asking(server)
        rows = LM.enumerate_sequences(0).sequences
        model = (
            LM
            * lmppl.Optimality(judge)
            * lmppl.Constraint(judge, where=lambda s: s > -2, name="few")
            * lmppl.Constraint(judge, where=lambda s: s < 0, name="some")
        )
        factors = lmppl.Target(model).log_factors(rows)
    assert factors["judge"].tolist() == log_score(list(rows.text))
    assert (factors["few"] == 0).tolist() == [s > -2 for s in log_score(list(rows.text))]
    assert len(server.texts) == len(set(server.texts)) == len(set(rows.text)), "three factors, one question"
    with listening(lambda texts: ["a" in t for t in texts]) as server:
        values = lmppl.Target(LM * lmppl.Constraint(asking(server))).log_factors(rows)["judge"]
    assert (values == 0).tolist() == ["a" in t for t in rows.text]


def test_a_posterior_by_a_judge_is_that_of_the_function(server: Judge) -> None:
    remote = lmppl.infer(LM * lmppl.Reward(asking(server, batch_size=3), 0.7), "exact").draws
    local = lmppl.infer(LM * lmppl.Reward(count_a, 0.7), "exact").draws
    assert torch.equal(remote.weights, local.weights)
    swapped = lmppl.infer(LM * lmppl.Reward(lambda texts: count_a(texts[::-1]), 0.7), "exact").draws
    assert not torch.allclose(swapped.weights, local.weights)


def test_the_laws_of_a_factor(server: Judge) -> None:
    check_factor(lmppl.Reward(asking(server), 0.5, upper=3), LM)


# What is tried again.


@pytest.mark.parametrize("reply", [(500, b"", {}), (503, {}, {}), (429, {}, {}), (408, {}, {}), "hang up"])
def test_what_may_pass_is_tried_again(reply: Any) -> None:
    with listening(replies=(reply, reply)) as server:
        judge = asking(server)
        assert judge(TEXTS) == count_a(TEXTS)
        assert server.asked == [TEXTS] * 3
        assert (judge.cost.requests, judge.cost.retries, judge.cost.texts) == (3, 2, 5)


def test_waits_double(server: Judge) -> None:
    server.replies = [(500, {}, {})] * 3
    asking(server, max_retries=3, backoff=0.05)(["a"])
    waits = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    for wait, expected in zip(waits, (0.05, 0.1, 0.2), strict=True):
        assert expected <= wait < expected + 1.0


@pytest.mark.parametrize("header", ["1", "date", "nonsense"])
def test_retry_after_is_obeyed(header: str, server: Judge) -> None:
    value = formatdate(time.time() + 1.5, usegmt=True) if header == "date" else header
    server.replies = [(429, {}, {"Retry-After": value})]
    assert asking(server)(["a"]) == [1.0]
    waited = server.times[1] - server.times[0]
    assert waited < 0.4 if header == "nonsense" else 0.4 < waited < 5.0


def test_a_judge_that_asks_to_wait_too_long_is_an_error(server: Judge) -> None:
    server.replies = [(429, {}, {"Retry-After": str(int(LONGEST_WAIT) + 60)})]
    assert "answered 429 after 1 try: '{}'; it asks to wait 360 s: run again after that" in failure(asking(server))


def test_requests_are_under_way_together(server: Judge) -> None:
    server.delay = 0.2
    judge = asking(server, batch_size=1, concurrency=4)
    start = time.monotonic()
    judge([str(i) for i in range(8)])
    assert server.most == 4
    assert time.monotonic() - start < 1.4, "one after the other they take 1.6 s"
    alone = asking(server, batch_size=1, concurrency=1)
    server.most = 0
    alone(["x", "y"])
    assert server.most == 1


def test_calls_from_many_threads_are_counted(server: Judge) -> None:
    judge = asking(server, batch_size=1, concurrency=2)
    threads = [threading.Thread(target=judge, args=([f"{i} {j}" for j in range(5)],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (judge.cost.requests, judge.cost.texts, len(server.asked)) == (20, 20, 20)


# A judge that is down, slow, or answers nonsense.


def test_down() -> None:
    with listening() as server:
        judge = asking(server)
    message = failure(judge)
    assert "no answer (NewConnectionError" in message
    assert "refused" in message
    assert "after 3 tries; see that it runs, or raise timeout=, max_retries= or backoff=" in message
    assert judge.cost.requests == 3, "the batch is not asked again text by text to find one to blame"


def test_slow(server: Judge) -> None:
    server.delay = 2.0
    judge = asking(server, timeout=0.05, max_retries=1)
    start = time.monotonic()
    assert "no whole answer within 0.05 s after 2 tries; see that it runs, or raise timeout=" in failure(judge)
    assert time.monotonic() - start < 1.5
    assert judge.cost.requests == 2


def test_an_answer_that_drips_is_slow_too(server: Judge) -> None:
    def drip(handler: Any, data: Any) -> Any:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        try:
            for _ in range(60):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.03)
        except OSError:
            pass
        return "hang up"

    server.replies = [drip]
    start = time.monotonic()
    assert "no whole answer within 0.1 s after 1 try" in failure(asking(server, timeout=0.1, max_retries=0))
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((200, b"<html>hello</html>", {}), "answered 200 after 1 try: '<html>hello</html>', which is no JSON"),
        ((200, b"", {}), "answered 200 after 1 try, which is no JSON"),
        ((200, b"\xff\xfe", {}), "which is no JSON"),
        ((200, {"score": [1]}, {}), """'{"score": [1]}', expected {"scores": [...]}; response= reads another form"""),
        ((200, [1, 2, 3, 4, 5], {}), 'expected {"scores": [...]}'),
        ((200, {"scores": 1}, {}), "its scores are a int, expected a list"),
        ((200, {"scores": None}, {}), "its scores are a NoneType, expected a list"),
        ((200, {"scores": [1, 2]}, {}), "got 2 scores for 5 texts"),
        ((200, {"scores": [1, float("nan"), 1, 1, 1]}, {}), "got nan, expected a finite number, for the text 'bb'"),
        ((200, {"scores": [1, 1, float("inf"), 1, 1]}, {}), "got inf, expected a finite number, for the text 'abc'"),
        ((200, {"scores": ["high", 1, 1, 1, 1]}, {}), "got 'high', expected a number, for the text 'a'"),
        ((200, {"scores": [1, 1, 1, None, 1]}, {}), "got 'None', expected a number, for the text ''"),
        ((200, {"scores": [1, 1, [2, "x"], 1, 1]}, {}), "got 'x', expected a number, for the text 'abc'"),
        ((401, {"error": "who are you?"}, {}), 'answered 401 after 1 try: \'{"error": "who are you?"}\'; it refuses'),
        ((404, b"x" * 999, {}), f"answered 404 after 1 try: '{'x' * 200}...'; it refuses the request: see the url"),
        ((301, b"", {"Location": "http://elsewhere/"}), "answered 301 after 1 try; it has moved: give the url"),
    ],
)
def test_nonsense_is_an_error_at_once(server: Judge, reply: Any, words: str) -> None:
    server.replies = [reply]
    judge = asking(server)
    assert words in failure(judge)
    assert (judge.cost.requests, judge.cost.texts) == (1, 0), "it is not asked again"
    assert judge(TEXTS) == count_a(TEXTS), "nothing of the nonsense is remembered"


def test_what_a_factor_forbids_it_refuses_itself() -> None:
    with listening(lambda texts: [float("-inf")] * len(texts)) as server:
        judge = asking(server)
        rows = LM.enumerate_sequences(0).sequences
        with pytest.raises(FactorError, match=r"factor 'judge'.*−inf, although this Reward"):
            lmppl.Target(LM * lmppl.Reward(judge)).log_factors(rows)
        assert torch.all(lmppl.Target(LM * lmppl.Optimality(judge)).log_factors(rows)["judge"] == -torch.inf)


def test_adapters_that_fail(server: Judge) -> None:
    assert "response= raised KeyError: 'choices'" in failure(asking(server, response=chat_response))
    assert "request= raised IndexError" in failure(asking(server, request=lambda texts: texts[99]))
    assert "what request= returned is no JSON" in failure(asking(server, request=lambda texts: {1j}))
    assert "what request= returned is no JSON" in failure(asking(server, request=lambda texts: [float("nan")]))
    with pytest.raises(FactorError, match=r"factor 'tone': judge .* reads texts, got Sequences; leave on= out"):
        lmppl.Target(LM * lmppl.Reward(asking(server), on="ids", name="tone")).log_factors(
            LM.enumerate_sequences(0).sequences
        )


# Nothing is lost.


def test_after_a_failure_only_the_rest_is_paid_for(server: Judge) -> None:
    server.replies = [None, (404, {}, {}), None]
    judge = asking(server, batch_size=2, concurrency=1)
    texts = ["a", "b", "aa", "bb", "aaa"]
    with pytest.raises(FactorError, match="404"):
        judge(texts)
    assert server.asked == [["a", "b"], ["aa", "bb"]]
    assert judge(texts) == count_a(texts)
    assert server.asked[2:] == [["aa", "bb"], ["aaa"]]


def test_what_is_under_way_when_another_request_fails_is_kept() -> None:
    def slow(handler: Any, data: Any) -> None:
        time.sleep(0.2)

    def refuse(handler: Any, data: Any) -> Reply:
        time.sleep(0.05)
        return 404, {}, {}

    with listening(replies=(slow, refuse)) as server:
        judge = asking(server, batch_size=1, concurrency=2)
        with pytest.raises(FactorError, match="404"):
            judge(["a", "b", "aa", "bb"])
        first = server.asked[0][0]
        assert len(server.asked) <= 3, "what had not begun is not sent"
        judge([first])
        assert server.texts.count(first) == 1


def test_one_failure_ends_the_tries_of_all(server: Judge) -> None:
    server.replies = [(500, {}, {}), (404, {}, {})]
    judge = asking(server, batch_size=1, concurrency=2, backoff=30.0)
    start = time.monotonic()
    with pytest.raises(FactorError, match="404"):
        judge(["a", "b"])
    assert time.monotonic() - start < 5, "the other does not sit out its wait"


@pytest.mark.parametrize(
    "engine",
    [lmppl.Importance(), lmppl.SMC(8), lmppl.MCMC(num_chains=2, num_steps=4, warmup=2)],
    ids=lambda engine: engine.name,
)
def test_a_run_whose_judge_dies_goes_on_from_its_checkpoint(engine: lmppl.Engine, tmp_path: Path) -> None:
    """To the very draws of a run whose judge never died; what was whole is not judged again, in any process."""
    prior = lmppl.TabularLM.random(4, 5, seed=1)
    num_draws = {"importance": 3000, "smc": 64, "mcmc": 192}[engine.name]

    def run(url: str, **options: Any) -> Any:
        judge = lmppl.RemoteJudge(url, backoff=0.001, max_retries=1, batch_size=4, concurrency=1)
        return lmppl.infer(prior * lmppl.Reward(judge, 0.5), engine, num_draws, seed=3, **options)

    with listening() as server:
        parts: list[Any] = []
        whole = run(server.url, on_part=parts.append)
        asked = len(set(server.texts))
        assert len(parts) > 2
        server.asked.clear()
        done: list[Any] = []

        def die(part: Any) -> None:
            done.append(part)
            if len(done) == 2:
                server.stop()  # its connections with it

        with pytest.raises(FactorError, match=r"factor 'judge': judge http.* no answer") as caught:
            run(server.url, on_part=die, checkpoint=tmp_path / "run")
        (note,) = caught.value.__notes__
        assert re.search(r"its checkpoint holds 2 whole shard\(s\); to go on, run the same call again", note)
        server.start()
        before = len(server.texts)
        resumed = run(server.url, checkpoint=tmp_path / "run")
        assert resumed.status == "complete"
        assert torch.equal(resumed.draws.ids, whole.draws.ids)
        assert torch.equal(resumed.draws.weights, whole.draws.weights)
        assert len(server.texts) - before < asked


def test_the_command_line_says_how_to_go_on(server: Judge, tmp_path: Path) -> None:
    spec = tmp_path / "spec.py"
    spec.write_text(
        "import lmppl\n"
        f"judge = lmppl.RemoteJudge({server.url!r}, batch_size=1000, concurrency=1)\n"
        "model = lmppl.TabularLM.random(4, 5, seed=1) * lmppl.Reward(judge, 0.5)\n"
    )
    command = ["infer", str(spec), "-e", "smc(num_particles=8)", "-n", "64", "--checkpoint", str(tmp_path / "run")]
    server.replies = [None, None, None, (404, {}, {})]
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
    failed = runner.invoke(app, command)
    said = " ".join(failed.output.split())
    assert failed.exit_code == 2
    assert "factor 'judge': judge http://127.0.0.1" in said
    assert re.search(r"its checkpoint holds \d whole shard\(s\); to go on, run the same call again", said)
    sys.modules.pop("lmppl_spec", None)
    assert runner.invoke(app, command).exit_code == 0
    sys.modules.pop("lmppl_spec", None)


def test_a_run_without_a_checkpoint_says_nothing_of_one(server: Judge) -> None:
    server.replies = [(404, {}, {})]
    with pytest.raises(FactorError) as caught:
        lmppl.infer(LM * lmppl.Reward(asking(server)), lmppl.Importance(8))
    assert not hasattr(caught.value, "__notes__")


def test_the_same_judge_after_a_failure_has_kept_what_it_answered(server: Judge) -> None:
    judge = asking(server, batch_size=1, concurrency=1, max_retries=0)
    model = LM * lmppl.Reward(judge)
    server.replies = [None, None, (500, {}, {})]
    with pytest.raises(FactorError):
        lmppl.infer(model, "exact")
    lmppl.infer(model, "exact")
    repeated = [text for text in set(server.texts) if server.texts.count(text) > 1]
    assert repeated == server.asked[2], "only the one that failed"


def test_repeated_texts_of_chains_cost_no_call() -> None:
    """MCMC goes over 15 texts: each is asked once, at the server, though 9,000 values were needed."""
    lm = lmppl.TabularLM([0.5, 0.3, 0.2], ["a", "b", "<eos>"], max_new_tokens=3)
    with listening() as server:
        judge = asking(server)
        engine = lmppl.MCMC(num_chains=16, num_steps=64, warmup=8)
        run = lmppl.infer(lm * lmppl.Reward(judge, 2.0), engine, num_draws=1024)
        assert len(server.texts) == len(set(server.texts)) <= 15
        assert set(run.draws.text) <= set(server.texts)
    assert run.cost.factor_calls == judge.cost.texts == len(server.texts)
    assert run.cost.cache_hits > 1000
    assert run.cost.cache_hits + run.cost.factor_calls >= len(run.draws)


def test_an_interrupt_does_not_wait_and_loses_nothing(server: Judge) -> None:
    def interrupting(handler: Any, data: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.8)

    server.replies = [None, interrupting]
    judge = asking(server, batch_size=1, concurrency=2)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        judge(["a", "b", "aa", "bb", "aaa", "bbb"])
    assert time.monotonic() - start < 0.7
    time.sleep(0.9)  # what was under way arrives meanwhile
    asked = set(server.texts)
    assert len(asked) < 6
    judge(["a", "b", "aa", "bb", "aaa", "bbb"])
    assert sorted(server.texts) == ["a", "aa", "aaa", "b", "bb", "bbb"], "each once in all"


# Secrets, copies, hashes.


def test_secrets_stand_nowhere(server: Judge) -> None:
    headers = {"Authorization": f"Bearer {SECRET}"}
    judge = asking(server, headers=headers, max_retries=0)
    server.replies = [(401, f"{'x' * 190} bad key {SECRET} of {SECRET}".encode(), {}), (500, SECRET.encode(), {})]
    messages = [failure(judge), failure(judge)]
    assert "bad key ***"[:4] in messages[0]
    assert "'***'" in messages[1]
    model = LM * lmppl.Reward(judge)
    shown = [*messages, repr(judge), repr(model), str(model.graph.to_dict()), model.spec_hash, judge.fingerprint]
    assert [text for text in shown if "sk-" in text or SECRET[:8] in text] == []
    keyed = lmppl.RemoteJudge(f"{server.url}?key={SECRET}", max_retries=0)
    server.replies = [(404, b"", {})]
    with pytest.raises(FactorError) as caught:
        keyed(["a"])
    assert "/score?...: answered 404" in str(caught.value)
    assert SECRET not in str(caught.value) + repr(keyed)
    with pytest.raises(ModelError) as refused:
        lmppl.RemoteJudge(f"http://me:{SECRET}@localhost/score")
    assert "headers=" in str(refused.value)
    assert SECRET not in str(refused.value)


def test_the_hash_is_of_what_is_asked_and_not_of_what_was_answered(server: Judge) -> None:
    judge = asking(server, headers={"Authorization": "one"})
    model = LM * lmppl.Reward(judge, 0.5)
    before = (content_digest(judge), model.spec_hash)
    judge(TEXTS)
    assert (content_digest(judge), model.spec_hash) == before
    same = asking(server, headers={"Authorization": "two"}, timeout=1.0, batch_size=3, concurrency=2)
    assert (LM * lmppl.Reward(same, 0.5)).spec_hash == before[1]
    others = [
        lmppl.RemoteJudge(server.url + "/v2"),
        asking(server, request=chat_request),
        asking(server, response=chat_response),
        asking(server, response=lambda data: [2 * s for s in data["scores"]]),
    ]
    digests = [content_digest(other) for other in others]
    assert len({before[0], *digests}) == 5
    moved = [lmppl.Reward(lmppl.RemoteJudge(url), fingerprint="tone v3") for url in ("http://a/s", "http://b/s")]
    assert len({(LM * reward).spec_hash for reward in moved}) == 1, "a judge that moves keeps its fingerprint"


def test_a_copy_by_pickle_has_the_configuration_alone(server: Judge) -> None:
    judge = asking(server, headers={"Authorization": SECRET}, request=chat_request, batch_size=3)
    judge.request = None
    judge(["a"])
    copied = pickle.loads(pickle.dumps(judge))
    assert (copied.fingerprint, repr(copied)) == (judge.fingerprint, repr(judge))
    assert copied.cost == lmppl.modeling.evidence.remote_judge.JudgeCost(0, 0, 0, 0.0)
    assert copied(["a"]) == [1.0]
    assert server.headers[-1]["Authorization"] == SECRET
    assert server.asked == [["a"], ["a"]]


def test_the_declaration_goes_through_data_and_back(server: Judge) -> None:
    judge = asking(server)
    model = LM * lmppl.Reward(judge, 0.5, upper=3) * lmppl.Optimality(lambda texts: [-1.0] * len(texts), name="o")
    functions = {name: feature.fn for name, feature in model.features.items()}
    again = model.graph.to_model(LM, functions)
    assert again.spec_hash == model.spec_hash
    rows = LM.enumerate_sequences(1).sequences
    assert torch.equal(lmppl.Target(again).log_prob_unnormalized(rows), lmppl.Target(model).log_prob_unnormalized(rows))


# Arguments.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "localhost:8000"}, "got url='localhost:8000', expected one such as"),
        ({"url": "ftp://localhost"}, "expected one such as"),
        ({"url": "http://"}, "expected one such as"),
        ({"url": "http://localhost:port/score"}, "expected one such as"),
        ({"url": "http://[::1/score"}, "expected one such as"),
        ({"url": f"ftp://me:{SECRET}@localhost"}, "the url holds a user's name or password"),
        ({"url": None}, "expected one such as"),
        ({"timeout": 0}, "got timeout=0"),
        ({"timeout": float("inf")}, "got timeout=inf"),
        ({"timeout": "1"}, "got timeout='1'"),
        ({"backoff": -1}, "got backoff=-1"),
        ({"max_retries": -1}, "got max_retries=-1, expected a whole number from 0 on"),
        ({"max_retries": 1.5}, "got max_retries=1.5"),
        ({"concurrency": 0}, "got concurrency=0, expected a whole number from 1 on"),
        ({"batch_size": True}, "got batch_size=True"),
        ({"request": {}}, "got request={}, expected a function"),
        ({"response": "scores"}, "got response='scores', expected a function"),
        ({"headers": [SECRET]}, "got headers of type list, expected a mapping"),
        ({"headers": {"Authorization": SECRET + "\n"}}, "header 'Authorization' holds a line break or another"),
        ({"headers": {"Authorization": SECRET + "é"}}, "header 'Authorization' holds a line break or another"),
        ({"headers": {"Authorization": None}}, "header 'Authorization' is a NoneType, expected a string"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=re.escape(words)) as caught:
        lmppl.RemoteJudge(**{"url": "http://localhost/score"} | options)
    assert SECRET not in str(caught.value)
