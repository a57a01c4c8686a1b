"""PrefixTreeLM: a weighted list of outcomes as a language model, through the tree of their prefixes.

With γ(u) = Σ_{x extends u} γ(x) the mass below prefix u, π*(x_t|x_<t) = γ(x_≤t) / γ(x_<t): the mass at the root is Z,
and the conditionals telescope to π*(x) = γ(x)/Z. Everything is in log space.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from lmppl.inference.posterior_lm import PosteriorLM
from lmppl.lm.base import LanguageModel
from lmppl.sequences import Sequences
from lmppl.storage import hash_tensors

__all__ = ["PrefixTreeLM"]


class PrefixTreeLM(PosteriorLM):
    """The law ∝ γ on the given outcomes.

    Parameters
    ----------
    prior : LanguageModel
        π0, whose outcomes these are.
    outcomes : Sequences
        Distinct outcomes, in any order, of every context.
    log_gamma : Tensor (N,), float64
        log γ of each, in nats; −inf leaves an outcome out.

    Attributes
    ----------
    log_normalizer : Tensor (C,), float64
        log Z(c), in nats; −inf where every outcome has γ = 0.
    """

    def __init__(self, prior: LanguageModel, outcomes: Sequences, log_gamma: Tensor) -> None:
        # On the CPU, where sums have one order, so that the same table gives the same bits.
        possible = torch.nonzero(log_gamma > -torch.inf).squeeze(1)
        kept, log_mass = outcomes.select(possible).to("cpu"), log_gamma[possible].double().cpu()
        num_contexts, vocab = prior.num_contexts, prior.vocab_size
        super().__init__(prior, torch.arange(num_contexts))

        root_mass = _segment_logsumexp(log_mass, kept.context, num_contexts)
        node, parent_mass = kept.context, root_mass
        keys, log_probs = [node[:0]], [log_mass[:0]]
        first, total = 0, num_contexts
        for t in range(kept.ids.shape[1]):
            rows = torch.nonzero(kept.lengths > t).squeeze(1)
            edge, child = torch.unique(node[rows] * vocab + kept.ids[rows, t], return_inverse=True)
            mass = _segment_logsumexp(log_mass[rows], child, len(edge))
            keys.append(edge)
            log_probs.append(mass - parent_mass[edge // vocab - first])
            node = node.index_put((rows,), total + child)
            first, parent_mass, total = total, mass, total + len(edge)
        # Nodes are numbered breadth first: edge i, with the key node·V + token, leads to node C + i; keys grow with i,
        # so that the edges of one node are neighbours; and past the last edge comes the node off the tree.
        edges = torch.cat(keys)
        degree = torch.bincount(edges // vocab, minlength=total + 1)
        self.log_normalizer = root_mass
        self._keys = torch.cat([edges, torch.tensor([-1])])
        self._log_probs = torch.cat(log_probs)
        self._degree = degree
        self._start = degree.cumsum(0) - degree
        self._off = total

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """As `PosteriorLM.advance`."""
        wanted = states * self.vocab_size + tokens
        edge = torch.searchsorted(self._keys[:-1], wanted)
        return torch.where(self._keys[edge] == wanted, self.num_contexts + edge, self._off)

    def next_log_probs(self, states: Tensor) -> Tensor:
        """As `PosteriorLM.next_log_probs`."""
        degree = self._degree[states]
        scores = torch.full((len(states), self.vocab_size), -torch.inf, dtype=torch.float64, device=states.device)
        row = torch.repeat_interleave(torch.arange(len(states), device=states.device), degree)
        within = torch.arange(len(row), device=row.device) - (degree.cumsum(0) - degree)[row]
        edge = self._start[states][row] + within
        scores[row, self._keys[edge] % self.vocab_size] = self._log_probs[edge]
        return torch.where(degree[:, None] > 0, scores, -math.log(self.vocab_size))

    @property
    def fingerprint(self) -> str:
        """As `LanguageModel.fingerprint`."""
        tree = hash_tensors({"keys": self._keys, "log_probs": self._log_probs})
        return hashlib.sha256(f"{self.prior.fingerprint}{tree}".encode()).hexdigest()[:16]


def _segment_logsumexp(values: Tensor, segment: Tensor, size: int) -> Tensor:
    """(size,) log Σ exp of the finite `values` (N,) of each segment; −inf for an empty one."""
    top = torch.full((size,), -torch.inf, dtype=values.dtype, device=values.device)
    top = top.scatter_reduce(0, segment, values, "amax")
    sums = torch.zeros_like(top).index_add(0, segment, (values - top[segment]).exp())
    return sums.log() + top
