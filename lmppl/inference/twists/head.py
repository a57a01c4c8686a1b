"""The small network of a learned twist: from what the LM knows of a prefix to the values of all V next tokens."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HeadShape", "TwistHead"]


@dataclass(frozen=True)
class HeadShape:
    """The sizes of a `TwistHead`; C contexts, T tokens, V vocabulary and H hidden size are the LM's.

    Parameters
    ----------
    num_contexts, horizon, vocab_size, hidden_size : int
        C, T, V, H.
    width : int
        Units of the two layers.
    rank : int
        The values of the V next tokens are a base plus a product of rank `rank`.
    memory : int
        Size of the vector that each token adds to the memory of its prefix; 0 for none.
    """

    num_contexts: int
    horizon: int
    vocab_size: int
    hidden_size: int
    width: int = 128
    rank: int = 32
    memory: int = 32

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for files."""
        return asdict(self)


class TwistHead(nn.Module):
    """log ψ(x_≤t) = base(z) + out(z)·E[x_t] + b[x_t] + s(c, t), with z of the prefix x_<t.

    z is a two-layer network of the LM's hidden state that predicts x_t, of the memory Σ_{u<t} U[x_u], and of t. The
    memory sees what an LM may forget, because its next token does not depend on it: a count of words, say. Tokens that
    were never seen in training have E = U = b = 0. s is a table of offsets, which training sets where its loss leaves
    the scale of ψ open.

    Parameters
    ----------
    shape : HeadShape
    generator : torch.Generator
        Of the first weights.
    dtype : torch.dtype
        The LM's, of its log-probabilities.
    """

    scale: Tensor

    def __init__(self, shape: HeadShape, *, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape = shape
        with torch.device("meta"):  # filled below, so that torch's global generator stays where it is
            self.norm = nn.LayerNorm(shape.hidden_size, dtype=dtype)
            self.first = nn.Linear(shape.hidden_size + shape.memory, shape.width, dtype=dtype)
            self.second = nn.Linear(shape.width, shape.width, dtype=dtype)
            self.base = nn.Linear(shape.width, 1, dtype=dtype)
            self.out = nn.Linear(shape.width, shape.rank, dtype=dtype)
        self.to_empty(device="cpu")
        for layer in (self.first, self.second, self.base, self.out):
            bound = 1.0 / math.sqrt(layer.in_features)
            for parameter in (layer.weight, layer.bias):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        nn.init.zeros_(self.base.weight)
        nn.init.ones_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)
        self.steps = nn.Parameter(torch.zeros(shape.horizon, shape.width, dtype=dtype))
        self.tokens = nn.Parameter(torch.zeros(shape.vocab_size, shape.rank, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(shape.vocab_size, dtype=dtype))
        self.memories = nn.Parameter(torch.zeros(shape.vocab_size, shape.memory, dtype=dtype))
        self.register_buffer("scale", torch.zeros(shape.num_contexts, shape.horizon, dtype=dtype))

    def features(self, hidden: Tensor, memory: Tensor, step: Tensor) -> Tensor:
        """(M, width) z, from hidden states (M, H), memories (M, R) and the number of tokens so far (M,)."""
        known = torch.cat([self.norm(hidden.to(self.bias.dtype)), memory], -1)
        z = nn.functional.gelu(self.first(known) + self.steps[step])
        return z + nn.functional.gelu(self.second(z))

    def values(self, z: Tensor, context: Tensor, step: Tensor) -> Tensor:
        """(M, V) log ψ of each next token, in nats."""
        shift: Tensor = self.base(z) + self.scale[context, step][:, None]
        return torch.addmm(self.bias, self.out(z), self.tokens.T).add_(shift)

    def values_at(self, z: Tensor, context: Tensor, step: Tensor, tokens: Tensor) -> Tensor:
        """(M,) or (M, k) log ψ of `tokens` (M,) or (M, k), in nats."""
        wide = tokens if tokens.dim() == 2 else tokens[:, None]
        shift = self.base(z) + self.scale[context, step][:, None]
        inner = torch.einsum("mr,mkr->mk", self.out(z), self.tokens[wide])
        value: Tensor = inner + self.bias[wide] + shift
        return value.view(tokens.shape)

    def memory_before(self, ids: Tensor) -> Tensor:
        """(B, T, R) memory of the prefix before each token of `ids` (B, T)."""
        total = self.memories[ids].cumsum(1)
        return nn.functional.pad(total, (0, 0, 1, 0))[:, :-1]
