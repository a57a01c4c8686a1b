"""Film reviews by a judge that answers over HTTP: asked once about each text, several texts at once.

    lmppl compare examples/remote_judge.py
    python examples/remote_judge.py

The judge here is a server of a few lines in a thread of this process; yours is a reward model on another machine, or an
LLM that is asked for a score (`request=` and `response=` of `RemoteJudge` speak its language). Chains come back to
texts that they have seen: those cost no request.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import lmppl

PRAISE = {"good", "great", "brilliant", "beautiful", "fascinating", "powerful", "funny", "best"}


class Judge(BaseHTTPRequestHandler):
    """POST {"texts": [...]} → {"scores": [...]}: the share of praise among the words, times ten, at most 1."""

    requests: ClassVar[list[int]] = []

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["texts"]
        self.requests.append(len(texts))
        words = [text.lower().replace(",", " ").replace(".", " ").split() for text in texts]
        scores = [min(1.0, 10 * sum(w in PRAISE for w in said) / max(1, len(said))) for said in words]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"scores": scores}).encode())

    def log_message(self, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
threading.Thread(target=server.serve_forever, daemon=True).start()

judge = lmppl.RemoteJudge(f"http://127.0.0.1:{server.server_port}/score", batch_size=16, concurrency=4)
prior = lmppl.LM("tiny", context="The film was", max_new_tokens=5)
model = prior * lmppl.Reward(judge, beta=0.3, upper=1.0)
engines = [lmppl.Rejection(), lmppl.Importance(256), lmppl.MCMC(num_chains=16, num_steps=8, warmup=16)]


if __name__ == "__main__":
    chains = lmppl.infer(model, lmppl.MCMC(num_chains=16, num_steps=16, warmup=16))
    print(f"values needed: {chains.cost.factor_calls + chains.cost.cache_hits}, texts judged: {judge.cost.texts}")
    print(
        f"requests: {judge.cost.requests}, as the server counts: {len(Judge.requests)}, retries: {judge.cost.retries}"
    )
    print("\n".join(chains.draws.text[-5:]))
