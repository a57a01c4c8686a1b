"""What a run's `info` says in one line a figure, for people: agreement of sweeps and chains, acceptance, distance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["findings", "plain_info"]

MAX_ENTRIES = 1000  # of one tensor in machine output
MAX_CONTEXTS = 4  # up to which each has its own figure


def findings(info: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each figure that the run has, over all contexts."""
    for name, read in READERS.items():
        if name in info:
            text = read(info)
            if text:
                yield LABELS[name], text


def plain_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """`info` as JSON data; numbers that are not finite become strings, tensors of over 1,000 entries their shapes."""
    return {str(name): _plain(value) for name, value in info.items()}


def _sweeps(info: Mapping[str, Any]) -> str:
    """How many, and the spread of their log Ẑ: of each context, or of the one where it is largest."""
    log_z: Tensor = info["log_z_sweeps"]
    contexts, sweeps = log_z.shape
    dead = int(info["zero_sweeps"].sum()) if "zero_sweeps" in info else 0
    tail = f"; {dead} found nothing with γ > 0" if dead else ""
    if sweeps == 1:
        return f"1: without a spread, so no error is stated{tail}"
    ranges = [(float(row.min()), float(row.max())) for row in log_z]
    if contexts > MAX_CONTEXTS:
        low, high = max(ranges, key=lambda ends: _width(*ends))
        return f"{sweeps} a context, log Ẑ of each from {low:z.2f} to {high:z.2f} where they differ most{tail}"
    shown = "; ".join(f"from {low:z.2f} to {high:z.2f}" for low, high in ranges)
    return f"{sweeps}{' a context' * (contexts > 1)}, log Ẑ of each {shown}{tail}"


def _width(low: float, high: float) -> float:
    return 0.0 if low == high else high - low


def _ess_history(info: Mapping[str, Any]) -> str:
    history = info["ess_history"]
    if not isinstance(history, Tensor):
        return ""
    known = history[~history.isnan()]  # sweeps that end early have no ESS afterwards
    return f"{float(known.min()):,.1f}" if len(known) else ""


def _ancestors(info: Mapping[str, Any]) -> str:
    counts = info["distinct_ancestors"]
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _khat(info: Mapping[str, Any]) -> str:
    values = info["khat"][~info["khat"].isnan()]
    return f"{float(values.max()):.2f}" if len(values) else ""


def _extreme(name: str, worst: Callable[[Tensor], Tensor], form: str) -> Callable[[Mapping[str, Any]], str]:
    """The worst of a figure over scalars and contexts, with the scalar's name; scalars that never vary say nothing."""

    def read(info: Mapping[str, Any]) -> str:
        notes = [str(note) for note in info.get("chain_notes", ())]
        constant = {note.partition(" in context ")[0] for note in notes if ": constant:" in note}
        known = {label: v[~v.isnan()] for label, v in info[name].items() if label not in constant}
        found = {label: float(worst(values)) for label, values in known.items() if len(values)}
        if not found:
            return "" if constant else "too few steps"
        label = (max if worst is torch.max else min)(found, key=lambda key: found[key])
        return f"{found[label]:{form}} ({label})"

    return read


def _acceptance(info: Mapping[str, Any]) -> str:
    rates = info["acceptance"]
    if not isinstance(rates, Mapping):
        return ""
    return ", ".join(f"{kernel} {float(rate.double().mean()):.0%}" for kernel, rate in rates.items())


def _swaps(info: Mapping[str, Any]) -> str:
    rates = info["swap_rates"]
    return ", ".join(f"{float(rate):.0%}" for rate in torch.as_tensor(rates).flatten())


def _stuck(info: Mapping[str, Any]) -> str:
    return f"{sum(len(chains) for chains in info['stuck'].values())} chains never moved" if info["stuck"] else ""


def _shares(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda info: ", ".join(f"{float(x):.3g}" for x in torch.as_tensor(info[name]).flatten())


def _certificate(info: Mapping[str, Any]) -> str:
    values = torch.as_tensor(info["certificate"]).flatten()
    if bool(values.isnan().any()):
        return next((str(n) for n in info.get("chain_notes", ()) if str(n).startswith("no certificate")), "")
    vacuous = " (1: nothing is certain yet; take more steps)" if bool((values > 0.9995).any()) else ""
    return ", ".join(f"{float(x):.3g}" for x in values) + vacuous


def _measured(info: Mapping[str, Any]) -> str:
    """TV as quasi-rejection measured it, for each context."""
    values, errors = (torch.as_tensor(info[k]).flatten() for k in ("total_variation", "total_variation_error"))
    shown = ", ".join(f"{float(v):.3f} ±{float(e):.3f}" for v, e in zip(values, errors, strict=True))
    return f"at least {shown}: {info['distances_note']}" if "distances_note" in info else shown


def _not_decoded(info: Mapping[str, Any]) -> str:
    names = info["not_decoded"]
    return f"{', '.join(map(str, names))}: the draws were made without a look at it" if names else ""


def _searched(info: Mapping[str, Any]) -> str:
    return f"the prior's probability{''.join(f' · {name}' for name in info['searched'])}"


def _violating(info: Mapping[str, Any]) -> str:
    shares = torch.as_tensor(info["violating_share"]).double().flatten()
    if not bool((shares > 0).any()):
        return ""
    return f"{100 * float(shares.mean()):.1f} % of the draws have γ = 0"


READERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "searched": _searched,
    "not_decoded": _not_decoded,
    "violating_share": _violating,
    "log_z_sweeps": _sweeps,
    "ess_history": _ess_history,
    "distinct_ancestors": _ancestors,
    "khat": _khat,
    "rhat": _extreme("rhat", torch.max, ".3f"),
    "bulk_ess": _extreme("bulk_ess", torch.min, ",.0f"),
    "acceptance": _acceptance,
    "swap_rates": _swaps,
    "stuck": _stuck,
    "certificate": _certificate,
    "acceptance_rate": _shares("acceptance_rate"),
    "total_variation": _measured,
    "total_variation_bound": _shares("total_variation_bound"),
}
LABELS = {
    "searched": "searched by",
    "not_decoded": "not decoded",
    "violating_share": "violating",
    "log_z_sweeps": "sweeps",
    "ess_history": "lowest ESS",
    "distinct_ancestors": "ancestors left",
    "khat": "worst k̂",
    "rhat": "worst R̂",
    "bulk_ess": "lowest bulk ESS",
    "acceptance": "accepted",
    "swap_rates": "swapped",
    "stuck": "stuck",
    "certificate": "TV at most",
    "acceptance_rate": "acceptance",
    "total_variation": "TV measured",
    "total_variation_bound": "TV at most",
}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist()) if value.numel() <= MAX_ENTRIES else {"shape": list(value.shape)}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
