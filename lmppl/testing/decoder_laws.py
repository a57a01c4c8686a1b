"""The laws of a decoder: however a row was come by, the next token has the law that a fresh prefill of it gives."""

from __future__ import annotations

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Decoder, State, Step
from lmppl.sequences import Draws
from lmppl.testing.reports import Report

__all__ = ["check_decoder"]

ROWS = 6


def check_decoder(report: Report, lm: LanguageModel, draws: Draws, tolerance: float) -> None:
    """Compare extend, select and crop with fresh prefills, on prefixes of `draws` that have not ended.

    Each law is checked twice: at once, and after one more token, when the state itself is read.
    """
    prefixes = _prefixes(lm, draws)
    if prefixes is None:
        for law in ("extend appends", "select reorders", "crop cuts"):
            report.skip(f"decoder: {law}", "no draw has two tokens that do not end it")
        return
    context, tokens = prefixes
    comparer = _Comparer(report, lm, tolerance)
    comparer.extend(context, tokens)
    comparer.ragged_prefill(context, tokens)
    comparer.select(context, tokens)
    comparer.crop(context, tokens)
    comparer.crop_to_ragged(context, tokens)
    if "chunk" in lm.decoder().capabilities:
        comparer.chunk(context, tokens)
    else:
        report.skip("decoder: a chunk of tokens is the same as one after the other", "not among its capabilities")


def _prefixes(lm: LanguageModel, draws: Draws) -> tuple[Tensor, Tensor] | None:
    """Contexts (B,) and tokens (B, k) of a few draws, k ≥ 2 tokens that end no row and leave room for one more."""
    free = draws.lengths - draws.finished.long()
    for width in (4, 3, 2):
        rows = torch.nonzero(free >= width).squeeze(1)
        if width < lm.max_new_tokens and len(rows) > 0:
            chosen = rows[torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).long()]
            return draws.context[chosen], draws.ids[chosen, :width]
    return None


class _Comparer:
    """Runs one decoder against fresh prefills."""

    def __init__(self, report: Report, lm: LanguageModel, tolerance: float) -> None:
        self.report, self.lm, self.tolerance = report, lm, tolerance
        self.capabilities = lm.decoder().capabilities

    def fresh(self, context: Tensor, tokens: Tensor) -> Tensor:
        """(B, V) law of the next token after each row, each row by a prefill of its own."""
        rows = []
        for c, row in zip(context, tokens, strict=True):
            step, _ = self.lm.decoder().prefill(c[None], row[None])
            rows.append(step.log_probs[0, -1])
        return torch.stack(rows)

    def close(self, step: Step, expected: Tensor, law: str) -> None:
        got = step.log_probs[:, -1]
        self.report.require_close(got, expected, f"decoder: {law}", tolerance=self.tolerance)

    def then(self, decoder: Decoder, state: State, context: Tensor, rows: list[Tensor], law: str) -> None:
        """One more token, the last of each row again, read through the state."""
        last = torch.stack([row[-1] for row in rows])
        step, _ = decoder.extend(state, last[:, None])
        longer = [torch.cat([row, row[-1:]]) for row in rows]
        expected = torch.stack([self.fresh(context[i : i + 1], row[None])[0] for i, row in enumerate(longer)])
        self.close(step, expected, law)

    def extend(self, context: Tensor, tokens: Tensor) -> None:
        decoder = self.lm.decoder()
        step, state = decoder.prefill(context)
        for t in range(tokens.shape[1]):
            step, state = decoder.extend(state, tokens[:, t : t + 1])
        self.close(step, self.fresh(context, tokens), "prefill and extend give what a fresh prefill gives")

    def chunk(self, context: Tensor, tokens: Tensor) -> None:
        decoder = self.lm.decoder()
        _, state = decoder.prefill(context)
        step, _ = decoder.extend(state, tokens)
        every = torch.stack([self.fresh(context, tokens[:, : t + 1]) for t in range(tokens.shape[1])], 1)
        law = "decoder: a chunk of tokens is the same as one after the other"
        self.report.require_close(step.log_probs, every, law, tolerance=self.tolerance)

    def ragged_prefill(self, context: Tensor, tokens: Tensor) -> None:
        width = tokens.shape[1]
        lengths = 1 + torch.arange(len(tokens), device=tokens.device) % width
        decoder = self.lm.decoder()
        step, state = decoder.prefill(context, tokens, lengths)
        rows = [row[:n] for row, n in zip(tokens, lengths.tolist(), strict=True)]
        expected = torch.stack([self.fresh(context[i : i + 1], row[None])[0] for i, row in enumerate(rows)])
        self.close(step, expected, "prefixes of different length do not disturb one another")
        self.then(decoder, state, context, rows, "rows of different length can be extended")

    def select(self, context: Tensor, tokens: Tensor) -> None:
        decoder = self.lm.decoder()
        _, state = decoder.prefill(context, tokens)
        index = torch.arange(len(tokens), device=tokens.device).flip(0).repeat_interleave(2)[1:]
        state = decoder.select(state, index)
        rows = list(tokens[index])
        self.then(decoder, state, context[index], rows, "select reorders, repeats and drops rows")

    def crop(self, context: Tensor, tokens: Tensor) -> None:
        law = "crop cuts all rows to one length"
        if "crop" not in self.capabilities:
            self.report.skip(f"decoder: {law}", "not among its capabilities")
            return
        decoder = self.lm.decoder()
        _, state = decoder.prefill(context, tokens)
        state = decoder.crop(state, torch.full_like(context, tokens.shape[1] - 1))
        self.then(decoder, state, context, list(tokens[:, :-1]), law)

    def crop_to_ragged(self, context: Tensor, tokens: Tensor) -> None:
        law = "crop cuts rows to different lengths, again and again"
        if "ragged" not in self.capabilities:
            self.report.skip(f"decoder: {law}", "not among its capabilities")
            return
        decoder = self.lm.decoder()
        _, state = decoder.prefill(context, tokens)
        width = tokens.shape[1]
        lengths = width - torch.arange(len(tokens), device=tokens.device) % width
        state = decoder.crop(state, lengths)
        rows = [row[:n] for row, n in zip(tokens, lengths.tolist(), strict=True)]
        _, state = decoder.extend(state, torch.stack([row[-1:] for row in rows]))
        state = decoder.crop(state, torch.ones_like(lengths))
        self.then(decoder, state, context, [row[:1] for row in rows], law)
