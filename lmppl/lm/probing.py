"""What one model's cache and head can really do, found by comparison, never looked up by class name.

Every path is measured with forwards that use no cache and no padding, one row at a time.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lmppl.errors import ModelError
from lmppl.lm.network import POSTPROCESSING, Network
from lmppl.lm.rows import CachedRows

if TYPE_CHECKING:
    from lmppl.lm.caches import CacheKind

__all__ = ["Abilities", "abilities_of"]

logger = logging.getLogger(__name__)

# What a path that an architecture does not support may raise; each means "not this path".
_REFUSALS = (
    AttributeError,
    AssertionError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Largest difference that counts as rounding, in units of the spread of the scores: a wrong mask or position is off by
# more than a hundredth. Many networks compute parts in float32 whatever dtype their weights have: the softmax of an
# attention, and (in those that need the config's cache) whole recurrences.
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
_LENGTH = 9

_known: weakref.WeakKeyDictionary[nn.Module, dict[int, Abilities]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Abilities:
    """What was found about one model.

    Parameters
    ----------
    cache : str
        The kind of cache that continues exactly; "none" where every step reads the whole row again.
    head : str or None
        What follows the output embedding; None where the full model must give the logits.
    padded, chunk, crop, ragged : bool
        Whether left padding is exact; several tokens can follow a prefill; rows can be cut back by one length, or by a
        length each.
    """

    cache: CacheKind
    head: str | None
    padded: bool
    chunk: bool
    crop: bool
    ragged: bool

    @property
    def capabilities(self) -> frozenset[str]:
        """As `Decoder.capabilities`."""
        there = {"chunk": self.chunk, "crop": self.crop, "ragged": self.ragged, "hidden": self.head is not None}
        return frozenset({"grad"} | {name for name, value in there.items() if value})


def abilities_of(network: Network, num_positions: int) -> Abilities:
    """The abilities for rows of up to `num_positions` tokens.

    Probed once per model, and once more with rows longer than the sliding window where `num_positions` exceeds it.
    """
    window = network.sliding_window
    length = _LENGTH if window is None or window >= num_positions else max(_LENGTH, window + 5)
    known = _known.setdefault(network.model, {})
    if length not in known:
        with torch.no_grad():
            known[length] = _probe(network, length)
        logger.debug("%s: %s", network.name, known[length])
    return known[length]


def _probe(network: Network, length: int) -> Abilities:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(network.vocab_size, (2, length), generator=generator).to(network.device)
    logits = torch.stack([network.forward(row[None], split=False)[0].to(network.dtype) for row in tokens])
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"{network.name} gives nan or infinite logits: its weights or dtype are broken")
    spread = float(logits.std())
    strict = _ROUNDING[network.network_dtype] * spread
    loose = max(strict, _ROUNDING[torch.float32] * spread)
    head = _find_head(network, tokens[:1], logits[:1], strict)
    trials = _Trials(network, head, tokens, logits, {"buffer": strict, "config": loose, "none": loose})
    kinds: tuple[CacheKind, ...] = ("buffer", "config")
    kind: CacheKind = next((k for k in kinds if trials.passes(trials.continues, k)), "none")
    padded = trials.passes(trials.pads, kind)
    crop = kind != "config" and trials.passes(trials.crops, kind)
    return Abilities(
        cache=kind,
        head=head,
        padded=padded,
        chunk=trials.passes(trials.chunks, kind),
        crop=crop,
        # Without padding rows are grouped by length, and each group is cut back by one length.
        ragged=crop and (not padded or trials.passes(trials.crops_ragged, kind)),
    )


def _find_head(network: Network, tokens: Tensor, logits: Tensor, tolerance: float) -> str | None:
    """The declared postprocessing with which the head reproduces the model's own logits best, within rounding."""
    best: tuple[float, str] | None = None
    for name in POSTPROCESSING:
        if name != "plain" and not isinstance(getattr(network.config, name, None), int | float):
            continue
        try:
            hidden = network.forward(tokens, split=True)
            got = network.project(hidden.flatten(0, 1), name).view(logits.shape)
        except _REFUSALS as refusal:
            logger.debug("%s: head %s refuses: %s", network.name, name, refusal)
            continue
        error = float((got - logits).abs().max())
        logger.debug("%s: head %s is off by %.1e, rounding is %.1e", network.name, name, error, tolerance)
        if error <= tolerance and (best is None or error < best[0]):
            best = (error, name)
    return None if best is None else best[1]


class _Trials:
    """Each trial runs one path on two rows and gives what it found next to what it should have found."""

    def __init__(
        self, network: Network, head: str | None, tokens: Tensor, logits: Tensor, tolerances: dict[str, float]
    ) -> None:
        self.network, self.head, self.tokens = network, head, tokens
        self.logits, self.tolerances = logits, tolerances
        self.length = tokens.shape[1]

    def passes(self, trial: Callable[[CachedRows], list[tuple[Tensor, Tensor]]], kind: CacheKind) -> bool:
        rows = CachedRows(self.network, kind, split=self.head is not None)
        try:
            pairs = trial(rows)
        except _REFUSALS as refusal:
            logger.debug("%s: %s %s refuses: %s", self.network.name, kind, trial.__name__, refusal)
            return False
        error = max(float((self._logits(got) - want).abs().max()) for got, want in pairs)
        logger.debug("%s: %s %s is off by %.1e", self.network.name, kind, trial.__name__, error)
        return error <= self.tolerances[kind]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.network.project(hidden, self.head)

    def _lengths(self, *lengths: int) -> Tensor:
        return torch.tensor(lengths, device=self.tokens.device)

    def _at(self, positions: Tensor) -> Tensor:
        """(2, V) true scores of row i at `positions[i]`."""
        return self.logits[torch.arange(2, device=positions.device), positions]

    def continues(self, rows: CachedRows) -> list[tuple[Tensor, Tensor]]:
        """One token at a time after a prefill, and after the rows have been swapped and doubled."""
        n = self.length
        hidden, state = rows.start(self.tokens[:, : n - 2], self._lengths(n - 2, n - 2))
        pairs = [(hidden[:, -1], self.logits[:, n - 3])]
        hidden, state = rows.append(state, self.tokens[:, n - 2 : n - 1])
        pairs.append((hidden[:, -1], self.logits[:, n - 2]))
        index = self._lengths(1, 0, 1)
        hidden, _ = rows.append(rows.select(state, index), self.tokens[index, n - 1 :])
        return [*pairs, (hidden[:, -1], self.logits[index, n - 1])]

    def chunks(self, rows: CachedRows) -> list[tuple[Tensor, Tensor]]:
        """Three tokens in one forward after a prefill."""
        n = self.length
        _, state = rows.start(self.tokens[:, : n - 3], self._lengths(n - 3, n - 3))
        hidden, _ = rows.append(state, self.tokens[:, n - 3 :])
        return [(hidden.flatten(0, 1), self.logits[:, n - 3 :].flatten(0, 1))]

    def pads(self, rows: CachedRows) -> list[tuple[Tensor, Tensor]]:
        """Rows of different lengths, left-padded, then one token each."""
        lengths = self._lengths(self.length - 1, self.length - 4)
        hidden, state = rows.start(self._aligned(lengths), lengths)
        pairs = [(hidden[:, -1], self._at(lengths - 1))]
        hidden, _ = rows.append(state, self._next(lengths))
        return [*pairs, (hidden[:, -1], self._at(lengths))]

    def crops(self, rows: CachedRows) -> list[tuple[Tensor, Tensor]]:
        """Both rows cut back by one length, then one token each."""
        n = self.length
        _, state = rows.start(self.tokens, self._lengths(n, n))
        state = rows.crop(state, self._lengths(n - 3, n - 3))
        hidden, _ = rows.append(state, self.tokens[:, n - 3 : n - 2])
        return [(hidden[:, -1], self.logits[:, n - 3])]

    def crops_ragged(self, rows: CachedRows) -> list[tuple[Tensor, Tensor]]:
        """Rows cut back by a length each, then one token each, twice."""
        n = self.length
        lengths = self._lengths(n - 5, n - 2)
        _, state = rows.start(self.tokens, self._lengths(n, n))
        hidden, state = rows.append(rows.crop(state, lengths), self._next(lengths))
        pairs = [(hidden[:, -1], self._at(lengths))]
        hidden, _ = rows.append(state, self._next(lengths + 1))
        return [*pairs, (hidden[:, -1], self._at(lengths + 1))]

    def _next(self, lengths: Tensor) -> Tensor:
        return self.tokens.gather(1, lengths[:, None])

    def _aligned(self, lengths: Tensor) -> Tensor:
        """The first `lengths[i]` tokens of row i, at the right; what stands left of them must not matter."""
        width = int(lengths.max())
        columns = torch.arange(width, device=lengths.device) - (width - lengths)[:, None]
        return self.tokens.gather(1, columns % self.length)
