"""AutomatonLM: π* of a `TabularLM` under finite automata, by dynamic programming over their product machine.

A `TabularLM` is a finite machine and so is each automaton; reading a token moves all of them at once. The soft value

    V_t(s) = log E_π0[∏_k φ_k | the product machine is in s after t tokens]

depends on a prefix through (t, s) alone, so that a backward pass of T steps over S product states gives log Z = V(∅)
and π*(x_t|x_<t) = π0(x_t|x_<t) e^{V(x_≤t) − V(x_<t)}, exactly and at any horizon: the backward recursion of a hidden
Markov model (`rabiner1989`) on a product of weighted automata (`mohri1997`), read as control (`levine2018`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lmppl.errors import SupportTooLarge
from lmppl.inference.posterior_lm import PosteriorLM
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.automata import Automaton
from lmppl.storage import hash_tensors

__all__ = ["AutomatonLM", "ProductMachine", "product_machine", "soft_values"]

MEMORY = 4 << 30  # bytes that the transition tables and the soft values may take
MAX_CODES = 100_000_000  # bytes of the table that marks visited product states


class ProductMachine(NamedTuple):
    """The S product states that can be reached from a context with positive probability.

    Parameters
    ----------
    following : Tensor (S, V), int64
        The next state; S stands for "no further token": after EOS, and where π0 is zero.
    log_edge : Tensor (S, V), float64
        log π0(token | state); at EOS, −inf unless every automaton accepts what has been read.
    log_accept : Tensor (S,), float64
        0 where every automaton accepts a text that the cap ends here, −inf elsewhere.
    initial : Tensor (C,), int64
        The start state of each context.
    """

    following: Tensor
    log_edge: Tensor
    log_accept: Tensor
    initial: Tensor


def product_machine(prior: TabularLM, automata: Sequence[Automaton]) -> ProductMachine:
    """The reachable product of the prior's machine and `automata`, lifted to its tokens where they read characters.

    Raises
    ------
    SupportTooLarge
        Where the product has too many states to mark or to tabulate.
    """
    tables = [lift(automaton, prior) for automaton in automata]
    radices = [len(t) for t in tables]
    count = len(prior.log_table) * math.prod(radices)
    if count > MAX_CODES:
        shape = " × ".join(str(n) for n in [len(prior.log_table), *radices])
        raise SupportTooLarge(
            f"dynamic programming: {shape} product states exceed {MAX_CODES:,}; use a prior of lower order, or "
            "automata with fewer states"
        )
    log_prior = _normalised(prior.log_table)

    def digits(codes: Tensor) -> list[Tensor]:
        parts = []
        for radix in reversed(radices):
            parts.append(codes % radix)
            codes = codes // radix
        return [codes, *reversed(parts)]

    def step(codes: Tensor) -> Tensor:
        state, *rest = digits(codes)
        new = prior.next_state[state]
        for table, radix, at in zip(tables, radices, rest, strict=True):
            new = new * radix + table[at]
        return new

    initial = prior.initial
    for automaton, radix in zip(automata, radices, strict=True):
        initial = initial * radix + automaton.start
    goes_on = torch.ones(prior.vocab_size, dtype=torch.bool)
    goes_on[list(prior.eos_ids)] = False
    allowed = (log_prior > -torch.inf) & goes_on

    visited = torch.zeros(count, dtype=torch.bool)
    frontier = initial.unique()
    visited[frontier] = True
    for _ in range(prior.max_new_tokens):
        reached = step(frontier)[allowed[digits(frontier)[0]]]
        frontier = reached[~visited[reached]].unique()
        if len(frontier) == 0:
            break
        visited[frontier] = True

    codes = torch.nonzero(visited).squeeze(1)
    _guard_memory(len(codes), prior.vocab_size, prior.max_new_tokens)
    state, *rest = digits(codes)
    ahead = step(codes)
    # States first reached at the cap have successors that were never visited; no row goes on from there.
    goes_on_from = allowed[state] & visited[ahead]
    following = torch.where(goes_on_from, torch.searchsorted(codes, ahead), len(codes))
    accepted = torch.ones(len(codes), dtype=torch.bool)
    log_edge = log_prior[state].masked_fill(goes_on & ~goes_on_from, -torch.inf)
    for automaton, table, at in zip(automata, tables, rest, strict=True):
        accept = torch.as_tensor(automaton.accept)
        accepted &= accept[at]
        for eos in prior.eos_ids:
            log_edge[:, eos] = log_edge[:, eos].masked_fill(~accept[table[at, eos]], -torch.inf)
    log_accept = torch.zeros(len(codes), dtype=torch.float64).masked_fill(~accepted, -torch.inf)
    return ProductMachine(following, log_edge, log_accept, torch.searchsorted(codes, initial))


def soft_values(machine: ProductMachine, horizon: int) -> Tensor:
    """(T+1, S+1) soft values V_t(s), in nats, for t = 0..T; the last column is 0, the value after EOS.

    V_T(s) = log accept(s);  V_t(s) = log Σ_x π0(x|s) e^{V_{t+1}(s·x)}, in float64.
    """
    values = torch.zeros(horizon + 1, len(machine.log_accept) + 1, dtype=torch.float64)
    values[horizon, :-1] = machine.log_accept
    for t in range(horizon - 1, -1, -1):
        values[t, :-1] = torch.logsumexp(machine.log_edge + values[t + 1][machine.following], -1)
    return values


class AutomatonLM(PosteriorLM):
    """π*(x|c) ∝ π0(x|c) ∏_k 1[automaton k accepts x], with next-token conditionals computed when asked for.

    Parameters
    ----------
    prior : TabularLM
        π0.
    automata : sequence of Automaton
        One for each factor; none is the prior itself.

    Attributes
    ----------
    values : Tensor (T+1, S+1), float64
        Soft values of the product states, in nats.
    log_normalizer : Tensor (C,), float64
        log Z(c) = V(∅), in nats; −inf where nothing is accepted.
    """

    def __init__(self, prior: TabularLM, automata: Sequence[Automaton]) -> None:
        self.machine = product_machine(prior, automata)
        self.values = soft_values(self.machine, prior.max_new_tokens)
        self.log_normalizer = self.values[0, self.machine.initial]
        super().__init__(prior, self.machine.initial)  # state (t, s) is coded t·S + s

    @property
    def num_states(self) -> int:
        """S, the reachable product states."""
        return len(self.machine.log_accept)

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """As `PosteriorLM.advance`."""
        size, off = self.num_states, self.max_new_tokens * self.num_states
        following = self.machine.following[states % size, tokens]
        moved = (states // size + 1) * size + following
        return torch.where((states < off) & (following < size) & (moved < off), moved, off)

    def next_log_probs(self, states: Tensor) -> Tensor:
        """As `PosteriorLM.next_log_probs`."""
        size, off = self.num_states, self.max_new_tokens * self.num_states
        inside = states < off
        t, at = torch.where(inside, states // size, 0), states % size
        now = self.values[t, at]
        ahead = self.values[(t + 1)[:, None], self.machine.following[at]]
        scores = self.machine.log_edge[at] + ahead - now[:, None]
        return torch.where((inside & (now > -torch.inf))[:, None], scores, -math.log(self.vocab_size))

    @property
    def fingerprint(self) -> str:
        """As `LanguageModel.fingerprint`."""
        machine = hash_tensors(self.machine._asdict())
        return hashlib.sha256(f"{self.prior.fingerprint}{machine}".encode()).hexdigest()[:16]


def lift(automaton: Automaton, prior: TabularLM) -> Tensor:
    """(Q, V) the automaton's next state on each token of the prior; EOS adds no text."""
    symbols = ["" if i in prior.eos_ids else symbol for i, symbol in enumerate(prior.vocabulary)]
    return automaton.lift(symbols)


def _normalised(log_table: Tensor) -> Tensor:
    """Conditionals summed to 1, as `Step.log_probs` reads them; a row that is all −inf stays so."""
    total = torch.logsumexp(log_table, -1, keepdim=True)
    return torch.where(total > -torch.inf, log_table - total, log_table)


def _guard_memory(states: int, vocab: int, horizon: int) -> None:
    needed = 8 * states * (4 * vocab + horizon + 1)
    if needed > MEMORY:
        raise SupportTooLarge(
            f"dynamic programming: {states:,} product states × ({vocab} tokens and {horizon} steps) need "
            f"{needed / 2**30:.1f} GiB, more than {MEMORY / 2**30:.0f}; use a prior of lower order, automata with "
            "fewer states, or a smaller max_new_tokens"
        )
