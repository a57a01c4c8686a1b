"""The prefix-by-prefix form of a head on mean hidden states, from the states that the prior makes anyway."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lmppl.errors import ModelError, UnsupportedModel
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Step
from lmppl.modeling.evidence.prefix_columns import at_lengths, ended_with
from lmppl.sequences import Sequences

__all__ = ["MeanPotential", "MeanRows"]


class MeanRows(NamedTuple):
    """B prefixes.

    Parameters
    ----------
    ids : Tensor (B, T), int64
    lengths, context : Tensor (B,), int64
    over : Tensor (B,), bool
        Rows that have ended.
    means : Tensor (B, T + 1, H)
        The mean hidden state after each number of tokens; after none, the state that the context ends with.
    scores, values : Tensor (B, T + 1), float64
        log p(a|x_≤s) of the means, and log ψ.
    """

    ids: Tensor
    lengths: Tensor
    context: Tensor
    over: Tensor
    means: Tensor
    scores: Tensor
    values: Tensor


class MeanPotential:
    """log ψ(x_≤t) = log p(a|x_<t) while a row goes on, and log φ(x) = log p(a|x) at its end; log p(a|c) at the start.

    What a token brings is known only when the LM has read it, which it does for the next token: so ψ lags one token
    behind, and costs no forward. The ends of rows are scored as the factor scores them, one pass over each row that has
    ended, and by the run's cache once; therefore engines are told that the form reads text, and ask about the tokens
    that they have drawn.

    Parameters
    ----------
    lm : LanguageModel
        The prior.
    log_prob : callable
        Mean hidden states (B, H) → log p(a|·) (B,), in nats.
    ending : callable
        Outcomes → log φ (B,).
    content : callable
        Names the content of the head; called when it is asked for, since it may hash a network.
    """

    needs: Collection[Literal["text", "ids", "hidden"]] = frozenset({"hidden", "text"})

    def __init__(
        self,
        lm: LanguageModel,
        log_prob: Callable[[Tensor], Tensor],
        ending: Callable[[Sequences], Tensor],
        content: Callable[[], str],
    ) -> None:
        self.lm, self.log_prob, self.ending, self._content = lm, log_prob, ending, content

    @property
    def fingerprint(self) -> str:
        """Of the head."""
        return self._content()

    def start(self, contexts: Tensor, step: Step | None = None) -> MeanRows:
        """As `Incremental.start`; the step after the context is needed."""
        if step is None:
            raise ModelError("Classifier: its incremental form reads hidden states; start it with a step")
        if "hidden" not in self.lm.decoder().capabilities:
            raise UnsupportedModel(
                f"{self.lm!r} gives no hidden states; use a Hugging Face LM whose head can be split off, or a factor "
                "of texts"
            )
        first = step.hidden[:, -1]
        batch, cap, device = len(contexts), self.lm.max_new_tokens, contexts.device
        means = first.new_zeros(batch, cap + 1, first.shape[1])
        means[:, 0] = first
        score = self._score(first).to(device)
        scores = torch.zeros(batch, cap + 1, dtype=torch.float64, device=device)
        scores[:, 0] = score
        none = torch.zeros_like(contexts)
        ids = torch.full((batch, cap), self.lm.pad_id, dtype=torch.int64, device=device)
        return MeanRows(ids, none, contexts, none.bool(), means, scores, scores.clone())

    def weigh(self, state: MeanRows, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`: the same for all tokens that go on; −inf for a row that has ended."""
        device = state.ids.device
        if candidates is None:
            candidates = torch.arange(self.lm.vocab_size, device=device).expand(len(state.ids), -1)
        gain = at_lengths(state.scores, state.lengths) - self.potential(state)
        result = gain[:, None].repeat(1, candidates.shape[1]).masked_fill(state.over[:, None], -torch.inf)
        ends, stopped = self._ended(state, candidates)
        row, column = torch.nonzero(ends & ~state.over[:, None], as_tuple=True)
        if len(row):
            ids, lengths = state.ids[row].clone(), state.lengths[row]
            ids[torch.arange(len(row), device=device), lengths] = candidates[row, column]
            rows = Sequences(
                ids.cpu(), lengths.cpu() + 1, stopped[row, column].cpu(), state.context[row].cpu(), self.lm.prompts,
                self.lm.decode,
            )  # fmt: skip
            result[row, column] = self.ending(rows).to(device) - self.potential(state)[row]
        return result

    def advance(self, state: MeanRows, tokens: Tensor, step: Step) -> MeanRows:
        """As `Incremental.advance`."""
        s, each = state, torch.arange(len(tokens), device=tokens.device)
        at = s.lengths.clamp_max(self.lm.max_new_tokens - 1)  # a row that has ended may be given more tokens
        count = (at + 1).to(s.means.dtype)[:, None]
        before = torch.where(s.lengths[:, None] > 0, s.means[each, at] * at[:, None], 0.0)
        mean = (before + step.hidden[:, -1]) / count
        ends, _ = self._ended(s, tokens[:, None])
        over = s.over | ends[:, 0]
        score = self._score(mean).to(tokens.device)
        lagging = at_lengths(s.scores, s.lengths)
        value = torch.where(s.over, self.potential(s), torch.where(over, score, lagging))
        ids, means, scores, values = (x.clone() for x in (s.ids, s.means, s.scores, s.values))
        ids[each, at], means[each, at + 1], scores[each, at + 1], values[each, at + 1] = tokens, mean, score, value
        return MeanRows(ids, at + 1, s.context, over, means, scores, values)

    def potential(self, state: MeanRows) -> Tensor:
        """As `Incremental.potential`."""
        return at_lengths(state.values, state.lengths)

    def select(self, state: MeanRows, index: Tensor) -> MeanRows:
        """As `Incremental.select`."""
        return MeanRows(*(column[index] for column in state))

    def crop(self, state: MeanRows, lengths: Tensor) -> MeanRows:
        """As `Incremental.crop`."""
        lengths = lengths.to(state.lengths)
        return state._replace(lengths=lengths, over=state.over & (lengths == state.lengths))

    def _score(self, mean: Tensor) -> Tensor:
        with torch.no_grad():
            return self.log_prob(mean).double()

    def _ended(self, state: MeanRows, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, k) whether a row ends with a token, and whether it does so before the cap asks."""
        cap = self.lm.max_new_tokens
        at = state.lengths.clamp_max(cap - 1)
        stopped = ended_with(self.lm, state.ids, at, tokens)
        return stopped | (at + 1 >= cap)[:, None], stopped
