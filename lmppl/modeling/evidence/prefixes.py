"""Constraints prefix by prefix: the incremental forms that a `Constraint` gets when it meets its language model.

A hard constraint has one where "already violated, for good" can be told from a prefix: an automaton knows its dead
states; of a user's function it holds where the user says so (`prefix_closed=True`). What is read of a prefix is its
settled text, with which every continuation's text begins (see `lmppl.lm.spelling`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lmppl.errors import FactorError
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Step
from lmppl.lm.spelling import Spelled
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.automaton_prefixes import AutomatonPrefixes
from lmppl.modeling.factors import Factor, Incremental
from lmppl.modeling.function_contents import content_digest
from lmppl.sequences import Sequences

__all__ = ["LogFactor", "PrefixReader", "PrefixRows", "automaton_form", "prefix_closed_form"]

LogFactor = Callable[[Sequences], Tensor]

CHUNK = 1 << 14  # rows that are read at once
PROBES = 8  # texts that a run tries in order to find a function that is not prefix-closed


class PrefixRows(NamedTuple):
    """B prefixes.

    Parameters
    ----------
    ids : Tensor (B, T), int64
    lengths, context : Tensor (B,), int64
    over : Tensor (B,), bool
        Rows that have ended.
    values : Tensor (B, T+1), float64
        The potential after each number of tokens.
    spelled : list of Spelled
        Their texts.
    """

    ids: Tensor
    lengths: Tensor
    context: Tensor
    over: Tensor
    values: Tensor
    spelled: list[Spelled]


class PrefixReader:
    """An `Incremental` form that reads prefixes: log ψ(x_≤t) = `going(prefix)` while a row goes on, log φ at its end.

    Both functions return 0 or −inf; −inf of a prefix must mean that every continuation is −inf. Once a row is −inf it
    stays so, without being read again.

    Parameters
    ----------
    lm : LanguageModel
    going : callable
        (`Sequences` of prefixes, whose text is the settled one) → (B,) potentials.
    ending : callable
        (`Sequences` of outcomes) → (B,) log φ.
    content : callable
        Names the content of the two; called when it is asked for, since it may hash a network.
    """

    needs: Collection[Literal["text", "ids", "hidden"]] = frozenset({"ids", "text"})

    def __init__(self, lm: LanguageModel, going: LogFactor, ending: LogFactor, content: Callable[[], str]) -> None:
        self.lm, self._going, self._ending, self._content = lm, going, ending, content
        self.stop: tuple[str, ...] = tuple(getattr(lm, "stop", ()))

    @property
    def fingerprint(self) -> str:
        """A hash of what the form says."""
        return self._content()

    def start(self, contexts: Tensor, step: Step | None = None) -> PrefixRows:
        """As `Incremental.start`."""
        batch, cap = len(contexts), self.lm.max_new_tokens
        begins = self.lm.begins_text
        spelled = [self.lm.spelling.start(begins[c]) for c in contexts.tolist()]
        ids = contexts.new_full((batch, cap), self.lm.pad_id)
        none = torch.zeros_like(contexts)
        values = torch.zeros(batch, cap + 1, dtype=torch.float64, device=contexts.device)
        rows = PrefixRows(ids, none, contexts, none.bool(), values, spelled)
        rows.values[:, 0] = self._read(ids, none, contexts, spelled, none.bool(), none.bool())
        return rows

    def weigh(self, state: PrefixRows, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`: 0 or −inf; −inf for a row that is dead or has ended."""
        device, vocab = state.ids.device, self.lm.vocab_size
        width = vocab if candidates is None else candidates.shape[1]
        result = torch.full((len(state.ids), width), -torch.inf, dtype=torch.float64, device=device)
        going = torch.nonzero((self.potential(state) > -torch.inf) & ~state.over).squeeze(1)
        tokens = torch.arange(vocab, device=device).expand(len(state.ids), -1) if candidates is None else candidates
        for rows in going.split(max(1, CHUNK // width)):
            several = rows.repeat_interleave(width)
            value = self._after(state, several, tokens[rows].reshape(-1))[-1]
            result[rows] = value.view(len(rows), width)
        return result

    def advance(self, state: PrefixRows, tokens: Tensor, step: Any = None) -> PrefixRows:
        """As `Incremental.advance`; every row has room for the token."""
        index = torch.arange(len(tokens), device=tokens.device)
        ids, lengths, over, spelled, value = self._after(state, index, tokens, self.potential(state) == -torch.inf)
        values = state.values.clone()
        values[index, lengths] = value
        return PrefixRows(ids, lengths, state.context, over, values, spelled)

    def potential(self, state: PrefixRows) -> Tensor:
        """As `Incremental.potential`."""
        return state.values.gather(1, state.lengths[:, None])[:, 0]

    def select(self, state: PrefixRows, index: Tensor) -> PrefixRows:
        """As `Incremental.select`."""
        s = state
        spelled = [s.spelled[i] for i in index.tolist()]
        return PrefixRows(s.ids[index], s.lengths[index], s.context[index], s.over[index], s.values[index], spelled)

    def crop(self, state: PrefixRows, lengths: Tensor) -> PrefixRows:
        """As `Incremental.crop`."""
        lengths = lengths.to(state.lengths)
        begins, spelling = self.lm.begins_text, self.lm.spelling
        spelled = []
        for row, n, c in zip(state.ids.tolist(), lengths.tolist(), state.context.tolist(), strict=True):
            prefix = spelling.start(begins[c])
            for token in row[:n]:
                prefix = prefix if token in spelling.eos_ids else spelling.read(prefix, token)
            spelled.append(prefix)
        return state._replace(lengths=lengths, over=state.over & (lengths == state.lengths), spelled=spelled)

    def _after(
        self, state: PrefixRows, rows: Tensor, tokens: Tensor, dead: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, list[Spelled], Tensor]:
        """Row `rows[i]` and one more token: ids, lengths, whether it has ended, text, potential."""
        lm, spelling = self.lm, self.lm.spelling
        ids, at = state.ids[rows], state.lengths[rows]
        each = torch.arange(len(rows), device=ids.device)
        ids[each, at] = tokens
        stopped = torch.zeros(len(rows), dtype=torch.bool, device=ids.device)
        for length in at.unique().tolist():
            same = torch.nonzero(at == length).squeeze(1)
            stopped[same] = lm.ended(ids[same, : length + 1], int(length))
        over = stopped | (at + 1 == lm.max_new_tokens)
        spelled = [
            state.spelled[r] if v in spelling.eos_ids else spelling.read(state.spelled[r], v)
            for r, v in zip(rows.tolist(), tokens.tolist(), strict=True)
        ]
        context = state.context[rows]
        value = torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=ids.device)
        asked = torch.arange(len(rows), device=ids.device) if dead is None else torch.nonzero(~dead).squeeze(1)
        some = spelled if dead is None else [spelled[i] for i in asked.tolist()]
        value[asked] = self._read(ids[asked], at[asked] + 1, context[asked], some, over[asked], stopped[asked])
        return ids, at + 1, over, spelled, value

    def _read(
        self, ids: Tensor, lengths: Tensor, context: Tensor, spelled: list[Spelled], over: Tensor, stopped: Tensor
    ) -> Tensor:
        """(B,) potentials, of rows that go on and of rows that have ended."""
        value = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
        for ended, function in ((False, self._going), (True, self._ending)):
            index = torch.nonzero(over == ended).squeeze(1)
            if len(index) == 0:
                continue
            own, n, eos, where = (x[index].cpu() for x in (ids, lengths, stopped, context))
            rows = Sequences(own, n, eos, where, self.lm.prompts, self.lm.decode)
            if not ended or self.lm.spelling.additive:
                rows.__dict__["text"] = [self._text(spelled[i], ended) for i in index.tolist()]
            value[index] = function(rows).to(value)
        return value

    def _text(self, prefix: Spelled, ended: bool) -> str:
        """What is settled of a row that goes on; the text of one that has ended."""
        if ended:
            text = self.lm.spelling.whole(prefix)
            cuts = [at for at in (text.find(s) for s in self.stop) if at >= 0]
            return text[: min(cuts)] if cuts else text
        if not self.lm.spelling.additive:
            return ""
        return held_back(prefix.text, self.stop)


def held_back(text: str, stop: Sequence[str]) -> str:
    """`text` without the longest end that a stop string begins with: what stays if that string is completed."""
    longest = max((len(s) for s in stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(len(s) > size and s.startswith(text[-size:]) for s in stop):
            return text[:-size]
    return text


def automaton_form(automaton: Automaton, lm: LanguageModel) -> Incremental:
    """The form of 1[automaton accepts x] for prefixes of `lm`: a table where tokens add up to text, else a reader."""
    return _AutomatonForm(automaton, lm)


class _AutomatonForm:
    """Chooses on first use, since knowing whether tokens add up to text takes decoding the vocabulary."""

    def __init__(self, automaton: Automaton, lm: LanguageModel) -> None:
        self.automaton, self.lm = automaton, lm

    @cached_property
    def form(self) -> AutomatonPrefixes | PrefixReader:
        """The table, or the reader."""
        whole = self.lm.ends_by_eos_alone
        tabulated = whole and (self.automaton.over == "tokens" or self.lm.spelling.additive)
        return AutomatonPrefixes(self.automaton, self.lm) if tabulated else self._reader()

    @property
    def fingerprint(self) -> str:
        """Of the automaton."""
        return hashlib.sha256(repr(self.automaton.to_dict()).encode()).hexdigest()[:16]

    @property
    def needs(self) -> Collection[Literal["text", "ids", "hidden"]]:
        """As `Incremental.needs`: text only where prefixes are read, which is slow for all V tokens."""
        return self.form.needs

    def start(self, contexts: Tensor, step: Step | None = None) -> Any:
        """As `Incremental.start`."""
        return self.form.start(contexts)

    def weigh(self, state: Any, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`."""
        return self.form.weigh(state, candidates)

    def advance(self, state: Any, tokens: Tensor, step: Any = None) -> Any:
        """As `Incremental.advance`."""
        return self.form.advance(state, tokens, step)

    def potential(self, state: Any) -> Tensor:
        """As `Incremental.potential`."""
        return self.form.potential(state)

    def select(self, state: Any, index: Tensor) -> Any:
        """As `Incremental.select`."""
        return self.form.select(state, index)

    def crop(self, state: Any, lengths: Tensor) -> Any:
        """As `Incremental.crop`."""
        return self.form.crop(state, lengths)

    def __repr__(self) -> str:
        return f"automaton_form({self.automaton!r})"

    def _reader(self) -> PrefixReader:
        automaton, live = self.automaton, self.automaton.live()

        def verdict(good: Tensor, rows: Sequences) -> Tensor:
            words: Sequence[Any] = rows.text if automaton.over == "characters" else rows.token_lists()
            passed = good[automaton.run(words)]
            return torch.zeros(len(rows), dtype=torch.float64).masked_fill_(~passed, -torch.inf)

        going, ending = (lambda rows: verdict(live, rows)), (lambda rows: verdict(automaton.accept, rows))
        return PrefixReader(self.lm, going, ending, lambda: self.fingerprint)


def prefix_closed_form(factor: Factor, lm: LanguageModel, log_factor: LogFactor | None) -> PrefixReader:
    """The form of a constraint whose violated prefixes cannot be mended: log ψ(x_≤t) = log φ of the settled text.

    Parameters
    ----------
    factor : Factor
        With one feature, of texts or ids.
    lm : LanguageModel
    log_factor : callable, optional
        log φ of sequences, cached and counted by whoever runs the factor; by default with a cache of its own.

    Notes
    -----
    That no violated prefix can be mended is checked at run time where it costs little: the empty text must be allowed,
    and a few violated texts are tried with other texts behind them, all of which must be forbidden.
    """

    def content() -> str:
        functions = [(f.on, f.fingerprint or content_digest(f.fn)) for f in factor.features]
        return hashlib.sha256(repr((functions, content_digest(factor.log_factor))).encode()).hexdigest()[:16]

    return PrefixReader(lm, _Watched(factor, lm, log_factor), _evaluator(factor, lm, log_factor), content)


def _evaluator(factor: Factor, lm: LanguageModel, log_factor: LogFactor | None) -> LogFactor:
    if log_factor is not None:
        return log_factor
    own: list[Any] = []

    def evaluated(rows: Sequences) -> Tensor:
        from lmppl.modeling.model import Model
        from lmppl.modeling.target import Target

        if not own:
            own.append(Target(Model(lm, (factor,))))
        values: Tensor = own[0].log_factors(rows)[factor.name]
        return values

    return evaluated


class _Watched:
    """log φ of prefixes, with an eye on texts that a violated prefix begins."""

    def __init__(self, factor: Factor, lm: LanguageModel, log_factor: LogFactor | None) -> None:
        self.factor, self.evaluate = factor, _evaluator(factor, lm, log_factor)
        self.on_text = all(f.on == "text" and not f.reads_prompts for f in factor.features)
        self.probes = PROBES if self.on_text else 0

    def __call__(self, rows: Sequences) -> Tensor:
        values = self.evaluate(rows)
        if self.on_text and "" in rows.text and bool(values[rows.text.index("")] == -torch.inf):
            raise FactorError(
                f"factor {self.factor.name!r}: it is declared prefix_closed=True and forbids the empty text, with "
                "which every text begins, so that nothing would be allowed; leave prefix_closed out unless what is "
                "forbidden stays forbidden whatever follows"
            )
        if self.probes:
            self._probe(rows, values)
        return values

    def _probe(self, rows: Sequences, values: Tensor) -> None:
        violated = list(dict.fromkeys(t for t, v in zip(rows.text, values.tolist(), strict=True) if v == -torch.inf))
        if not violated:
            return
        others = list(dict.fromkeys(t for t in reversed(rows.text) if t))
        pairs = [(v, w) for w in others for v in violated][: self.probes]
        self.probes -= len(pairs)
        texts = [v + w for v, w in pairs]
        tried = rows.select([0] * len(texts))
        tried.__dict__["text"] = texts
        for (prefix, _), text, value in zip(pairs, texts, self.evaluate(tried).tolist(), strict=True):
            if value > -torch.inf:
                raise FactorError(
                    f"factor {self.factor.name!r}: it is declared prefix_closed=True, but forbids {prefix!r} and "
                    f"allows {text!r}, which begins with it; leave prefix_closed out"
                )
