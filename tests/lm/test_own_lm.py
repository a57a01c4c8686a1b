"""An LM of one's own, which transformers does not know: a character LSTM, in about forty lines."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

import lmppl
from lmppl.lm import LanguageModel, Step
from tests.conftest import SHARED

pytestmark = pytest.mark.shared


class CharacterDecoder:
    """State: the LSTM's (layers, B, H) hidden and cell tensors. It cannot be cut back, so it claims no `crop`."""

    capabilities = frozenset({"chunk", "hidden"})

    def __init__(self, lm):
        self.lm = lm

    def prefill(self, context, prefix=None, lengths=None):
        assert prefix is None
        net, texts = self.lm.net, [self.lm.prompts[c] for c in context.tolist()]
        states = [net.lstm(net.emb(net.encode(text))) for text in texts]
        hidden = torch.cat([output[:, -1:] for output, _ in states])
        return Step(net.out, hidden), tuple(torch.cat([s[i] for _, s in states], 1) for i in (0, 1))

    def extend(self, state, tokens, *, grad=False):
        with torch.set_grad_enabled(grad):
            hidden, state = self.lm.net.lstm(self.lm.net.emb(tokens), state)
        return Step(self.lm.net.out, hidden), state

    def crop(self, state, lengths):
        raise NotImplementedError

    def select(self, state, index):
        return tuple(part[:, index].contiguous() for part in state)


class CharacterLM(LanguageModel):
    """Shakespeare, letter by letter; a newline ends a text."""

    def __init__(self, net, contexts, max_new_tokens):
        self.net = net
        eos = net.vocab["\n"]
        super().__init__(contexts, vocab_size=net.V, max_new_tokens=max_new_tokens, eos_ids=[eos], pad_id=eos)

    def decoder(self):
        return CharacterDecoder(self)

    def decode(self, sequences):
        return [self.net.decode(row).rstrip("\n") for row in sequences.token_lists()]

    def with_contexts(self, contexts):
        return CharacterLM(self.net, contexts, self.max_new_tokens)

    @property
    def fingerprint(self):
        return f"charlstm-{self.prompts}-{self.max_new_tokens}"

    @property
    def dtype(self):
        return self.net.out.weight.dtype


@pytest.fixture(scope="module")
def character_net():
    folder = SHARED / "models" / "charlstm-shakespeare"
    spec = importlib.util.spec_from_file_location("char_lstm", folder / "char_lstm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = json.loads((folder / "config.json").read_text())
    net = module.CharLSTM(config["vocab"], config["hidden"], config["layers"])
    net.load_state_dict(load_file(folder / "model.safetensors"))
    return net.double().eval()


@pytest.fixture
def lm(character_net):
    return CharacterLM(character_net, ["ROMEO", "To be or not to b"], 2)


def test_its_outcomes_sum_to_one(lm):
    for context in (0, 1):
        listed = lm.enumerate_sequences(context)
        assert len(listed) == 1 + 64 * 65
        assert float(listed.log_prior.exp().sum()) == pytest.approx(1.0, abs=1e-10)
        torch.testing.assert_close(lm.score(listed), listed.log_prior, rtol=0, atol=1e-10)


def test_its_draws_are_scored_as_they_were_drawn(character_net):
    lm = CharacterLM(character_net, ["ROMEO", "To be or not to b"], 30)
    draws = lm.draw(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lm.score(draws), draws.log_prior, rtol=0, atol=1e-10)
    for row in (0, 25):
        text = draws.full_text[row] + ("\n" if draws.finished[row] else "")
        ids = character_net.encode(text)
        start = len(lm.prompts[draws.context[row]])
        with torch.no_grad():
            law = torch.log_softmax(character_net(ids)[0][0, start - 1 : -1], -1)
        want = law.gather(1, ids[0, start:, None]).sum()
        assert float(draws.log_prior[row]) == pytest.approx(float(want), abs=1e-10)


def test_it_is_a_pyro_distribution(lm):
    assert lm.log_prob(lm.sample((3,))).shape == (3, 2)


def test_lmppl_takes_it_as_a_prior(lm):
    one = lm.with_contexts(["ROMEO"])
    model = one * lmppl.Reward(lambda texts: [float(len(text)) for text in texts], beta=1.0, name="length")
    posterior = lmppl.infer(model, lmppl.Exact())
    listed = one.enumerate_sequences()
    want = torch.logsumexp(listed.log_prior + torch.tensor([float(len(t)) for t in listed.text]).double(), 0)
    assert float(posterior.log_normalizer[0].value[0]) == pytest.approx(float(want), abs=1e-8)
