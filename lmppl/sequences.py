"""Token sequences, weighted draws, estimates and costs: the plain data that every layer passes on.

Shape glossary: N draws, C contexts, T tokens (the cap), V vocabulary, H hidden size. Ids are int64; log-probabilities
are float32 or float64, in nats; `num_draws` is always per context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import torch
from torch import Tensor

from lmppl.errors import ModelError, ShapeError

if TYPE_CHECKING:
    import datasets
    import pandas
    import pyarrow

__all__ = ["Cost", "Draws", "Estimate", "Sequences", "concatenate"]

EstimateKind = Literal["exact", "unbiased", "consistent", "own_law", "unbiased_Z", "lower_bound", "upper_bound"]


@dataclass(frozen=True, eq=False, repr=False)
class Sequences:
    """N completions, one a row, each an *outcome*: it ends at EOS (or a stop string), or at the cap T.

    Parameters
    ----------
    ids : Tensor (N, T), int64
        Completion tokens, the final EOS included; entries at and after `lengths` hold the LM's pad id.
    lengths : Tensor (N,), int64
        Number of tokens of each row, the final EOS included.
    finished : Tensor (N,), bool
        True where the row ended by EOS or a stop string, False where it was cut by the cap.
    context : Tensor (N,), int64
        Index of the context that each row continues.
    prompts : tuple of str
        The text of the C contexts.
    decoder : callable, optional
        Maps a `Sequences` to its N completion texts, special tokens removed; the LM that made the rows supplies it.
    """

    ids: Tensor
    lengths: Tensor
    finished: Tensor
    context: Tensor
    prompts: tuple[str, ...] = ("",)
    decoder: Callable[[Sequences], list[str]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.ids.dim() != 2:
            raise ShapeError(f"Sequences.ids: got shape {tuple(self.ids.shape)}, expected (N, T)")
        for name in ("lengths", "finished", "context"):
            value = getattr(self, name)
            if value.shape != (len(self.ids),):
                raise ShapeError(f"Sequences.{name}: got shape {tuple(value.shape)}, expected ({len(self.ids)},)")

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def __repr__(self) -> str:
        """One line: how many rows, and what is known of them."""
        contexts = "1 context" if self.num_contexts == 1 else f"{self.num_contexts} contexts"
        known = [item.name for item in fields(self)[6:] if isinstance(getattr(self, item.name), Tensor)]
        known += [name for column in ("features", "log_factors", "columns") for name in getattr(self, column, ())]
        shown = f"; {', '.join(dict.fromkeys(known))}" if known else ""
        return f"{type(self).__name__}({len(self):,} rows of {contexts}, up to {self.ids.shape[1]} tokens{shown})"

    @property
    def num_contexts(self) -> int:
        """C, the number of contexts (rows may be missing for some of them)."""
        return len(self.prompts)

    @property
    def mask(self) -> Tensor:
        """(N, T) bool: True where a token belongs to the row."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    @cached_property
    def text(self) -> list[str]:
        """The N completion texts, special tokens removed; decoded once, on first use."""
        if self.decoder is None:
            return [" ".join(str(t) for t in row) for row in self.token_lists()]
        return self.decoder(self)

    @property
    def full_text(self) -> list[str]:
        """Context and completion, joined, for each row."""
        return [self.prompts[c] + t for c, t in zip(self.context.tolist(), self.text, strict=True)]

    def token_lists(self) -> list[list[int]]:
        """The N rows as plain lists, padding left out."""
        return [row[:n] for row, n in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]

    def keys(self) -> list[tuple[int, bool, tuple[int, ...]]]:
        """A hashable key for each row, equal exactly where context, tokens and finished agree."""
        flags = self.finished.tolist()
        return [(c, f, tuple(t)) for c, f, t in zip(self.context.tolist(), flags, self.token_lists(), strict=True)]

    def select(self, index: Tensor | Sequence[int] | slice) -> Self:
        """The rows at `index` (int64 (M,), bool (N,) or a slice), every column with them."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.ids.device)
            if index.numel() == 0:
                index = index.long()
        changes: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changes[item.name] = value[index]
            elif isinstance(value, dict) and item.name != "meta":
                changes[item.name] = {k: v[index] for k, v in value.items()}
        chosen = replace(self, **changes)
        if "text" in self.__dict__:
            rows = (
                range(len(self))[index] if isinstance(index, slice) else torch.arange(len(self))[index.cpu()].tolist()
            )
            chosen.__dict__["text"] = [self.text[i] for i in rows]
        return chosen

    def with_columns(self, **changes: Any) -> Self:
        """The same rows with other columns: `dataclasses.replace` that keeps texts which are decoded already."""
        other = replace(self, **changes)
        if "text" in self.__dict__:
            other.__dict__["text"] = self.text
        return other

    def to(self, device: torch.device | str) -> Self:
        """Every tensor on `device`."""
        changes: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changes[item.name] = value.to(device)
            elif isinstance(value, dict) and item.name != "meta":
                changes[item.name] = {k: v.to(device) for k, v in value.items()}
        return self.with_columns(**changes)


@dataclass(frozen=True, eq=False, repr=False)
class Draws(Sequences):
    """Sequences with what was computed on the way: weights, log-densities, raw features, factor values.

    The rows of one context stand for the posterior when weighted by w = exp(`log_weight`), normalised in each context.

    Parameters
    ----------
    log_weight : Tensor (N,), optional
        log w; −inf is a first-class weight. None means equally weighted.
    log_prior, log_q : Tensor (N,), optional
        log π0(x|c) and log q(x|c) where known.
    features : dict of Tensor (N, ...)
        Raw feature columns by name: what the user's functions returned, so that β can be changed afterwards.
    log_factors : dict of Tensor (N,)
        log φ_k(x) of each factor by name.
    columns : dict of Tensor (N,)
        Where a draw came from: `shard`, `chain`, `step`, `sweep`, `parent`, as the engine has them.
    meta : dict
        Seed, engine, spec hash and versions.
    """

    log_weight: Tensor | None = None
    log_prior: Tensor | None = None
    log_q: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    log_factors: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def sequences(self) -> Sequences:
        """The bare sequences, decoded text kept."""
        bare = Sequences(self.ids, self.lengths, self.finished, self.context, self.prompts, self.decoder)
        if "text" in self.__dict__:
            bare.__dict__["text"] = self.text
        return bare

    @property
    def weights(self) -> Tensor:
        """(N,) self-normalised weights w̄, summing to 1 within each context; all zero where every w is zero.

        Raises
        ------
        ModelError
            On a log-weight that is nan or +inf.
        """
        log_w = self.log_weight
        if log_w is None:
            log_w = torch.zeros(len(self), dtype=torch.float64, device=self.ids.device)
        log_w = log_w.double()
        broken = torch.nonzero(log_w.isnan() | (log_w == torch.inf))
        if len(broken):
            row = int(broken[0, 0])
            raise ModelError(f"weights: log_weight[{row}] is {float(log_w[row])}, expected a finite number or −inf")
        rows_of = self._rows_of_contexts()
        # Not by index_add, which adds one by one: logsumexp sums in blocks, with smaller rounding errors.
        total = torch.stack([torch.logsumexp(log_w[rows], 0) for rows in rows_of])
        total = total.masked_fill(total == -torch.inf, 0.0)  # no mass: exp(−inf − 0) is its weights
        return torch.exp(log_w - total[self.context])

    def _rows_of_contexts(self) -> tuple[Tensor, ...]:
        """The rows of each of the C contexts, in their order."""
        counts = torch.bincount(self.context, minlength=self.num_contexts)
        rows: tuple[Tensor, ...] = torch.argsort(self.context, stable=True).split(counts.tolist())
        return rows

    def resample(self, num_draws: int | None = None, *, generator: torch.Generator | None = None) -> Draws:
        """Equally weighted draws: `num_draws` rows per context, drawn from the weights by systematic resampling.

        Parameters
        ----------
        num_draws : int, optional
            Rows per context; by default as many as the context has now.
        generator : torch.Generator, optional
            The source of randomness; the global one if None.

        Raises
        ------
        ModelError
            Where a context has no row of positive weight.
        """
        if num_draws is not None and num_draws < 1:
            raise ModelError(f"resample: got num_draws={num_draws}, expected at least 1")
        weights, chosen = self.weights, []
        source = torch.device("cpu") if generator is None else generator.device
        for c, rows in enumerate(self._rows_of_contexts()):
            if len(rows) == 0 or float(weights[rows].sum()) == 0.0:
                raise ModelError(f"resample: context {c} has no draw of positive weight")
            n = len(rows) if num_draws is None else num_draws
            start = torch.rand((), generator=generator, dtype=torch.float64, device=source).to(rows.device)
            points = (torch.arange(n, dtype=torch.float64, device=rows.device) + start) / n
            edges = weights[rows].cumsum(0)
            index = torch.searchsorted(edges / edges[-1], points, right=True)
            last_positive = torch.nonzero(weights[rows] > 0)[-1, 0]
            chosen.append(rows[torch.minimum(index, last_positive)])
        return self.select(torch.cat(chosen)).with_columns(log_weight=None)

    def save(self, path: str | Path) -> Path:
        """Write to `path`; the suffix chooses: `.jsonl` (for people), `.safetensors` (complete), `.parquet`."""
        from lmppl.storage import save_draws

        return save_draws(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Draws:
        """Read what `save` wrote; texts come back as they were, without the LM."""
        from lmppl.storage import load_draws

        return load_draws(Path(path))

    def to_pandas(self) -> pandas.DataFrame:
        """One row a draw; needs the extra `data`."""
        from lmppl.storage import to_pandas

        return to_pandas(self)

    def to_arrow(self) -> pyarrow.Table:
        """One row a draw, as an Arrow table; needs the extra `data`."""
        from lmppl.storage import to_arrow

        return to_arrow(self)

    def to_dataset(self) -> datasets.Dataset:
        """One row a draw, as a Hugging Face dataset; needs the extra `data`."""
        from lmppl.storage import to_dataset

        return to_dataset(self)


S = TypeVar("S", bound=Sequences)


def _pad_to(ids: Tensor, width: int, pad_id: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=pad_id)


def concatenate(parts: Sequence[S], pad_id: int = 0) -> S:
    """Stack the rows of `parts` (same LM, same prompts); optional columns must be present in all or in none."""
    if not parts:
        raise ModelError("concatenate: got no parts, expected at least one")
    first = parts[0]
    if any(p.prompts != first.prompts for p in parts):
        raise ModelError(
            "concatenate: parts differ in their prompts, so that equal context indices mean different ones"
        )
    width = max(p.ids.shape[1] for p in parts)
    changes: dict[str, Any] = {}
    for item in fields(first):
        values = [getattr(p, item.name) for p in parts]
        if item.name == "ids":
            changes["ids"] = torch.cat([_pad_to(v, width, pad_id) for v in values])
        elif isinstance(values[0], Tensor) or any(isinstance(v, Tensor) for v in values):
            if any(v is None for v in values):
                raise ModelError(f"concatenate: column {item.name!r} is missing in some parts")
            changes[item.name] = torch.cat(values)
        elif isinstance(values[0], dict) and item.name != "meta":
            names = [set(v) for v in values]
            if any(n != names[0] for n in names):
                raise ModelError(f"concatenate: parts differ in their {item.name}: {sorted(set.union(*names))}")
            changes[item.name] = {k: torch.cat([v[k] for v in values]) for k in values[0]}
    whole = replace(first, **changes)
    # Rows without a decoder (loaded from a file) have no other source of text.
    if first.decoder is None or all("text" in p.__dict__ for p in parts):
        whole.__dict__["text"] = [t for p in parts for t in p.text]
    return whole


@dataclass(frozen=True, eq=False)
class Estimate:
    """A figure with its error.

    Parameters
    ----------
    value : Tensor (C,) or (C, ...)
        The estimate, one per context. For a normaliser it is log Ẑ, in nats.
    interval : Tensor (C, 2), optional
        Confidence interval at `level`; None where no honest one exists, nan ends for single contexts without
        one. Equal ends where the value is exact.
    level : float
        Nominal coverage of the interval.
    kind : str
        "exact"; an expectation "unbiased" (of independent draws), "consistent" (of self-normalised weights, of
        chains) or "own_law" (under an engine's law, which is not π*); "unbiased_Z" (E Ẑ = Z, so E log Ẑ ≤ log Z);
        "lower_bound"; "upper_bound".
    standard_error : Tensor (C,), optional
        Of `value` (for a normaliser: of log Ẑ, by the delta method).
    replicates : int
        Independent draws or sweeps behind the figure.
    note : str
        What a reader must know: why an interval is missing, which assumption it rests on.
    """

    value: Tensor
    interval: Tensor | None
    level: float = 0.95
    kind: EstimateKind = "unbiased"
    standard_error: Tensor | None = None
    replicates: int = 1
    note: str = ""

    @property
    def log_value(self) -> Tensor:
        """(C,) log Ẑ of a normaliser: the same tensor as `value`, under the name that says it is a logarithm."""
        return self.value

    def __repr__(self) -> str:
        parts = []
        for c, v in enumerate(self.value.reshape(-1).tolist()):
            if self.kind == "exact" or self.interval is None:
                parts.append(f"{v:.4f}")
            else:
                low, high = self.interval.reshape(-1, 2)[c].tolist()
                parts.append(f"{v:.4f} [{low:.4f}, {high:.4f}]")
        level = "" if self.kind == "exact" else f", level={self.level:g}"
        return f"Estimate({'; '.join(parts)}, kind={self.kind}{level})"


@dataclass
class Cost:
    """What a run has spent: a mutable counter that belongs to one run.

    `lm_tokens` counts positions sent through an LM (padding left out), `lm_forwards` calls of the network (one batch is
    one), `backward_tokens` positions differentiated, `factor_calls` texts handed to user functions, `cache_hits` texts
    whose value was known already, `seconds` wall-clock time.
    """

    lm_tokens: int = 0
    lm_forwards: int = 0
    backward_tokens: int = 0
    factor_calls: int = 0
    cache_hits: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def add(self, other: Cost) -> None:
        """Count what was spent elsewhere."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    def copy(self) -> Cost:
        """A snapshot, for later subtraction."""
        return replace(self)

    def as_dict(self) -> Mapping[str, float]:
        """Field names to values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
