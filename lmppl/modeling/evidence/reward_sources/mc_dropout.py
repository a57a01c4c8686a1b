"""Monte Carlo dropout with fixed masks: each member is one thinned network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lmppl.errors import ModelError
from lmppl.modeling.evidence.sequence_classifier import SequenceClassifier

__all__ = ["MCDropout"]

PROBES = ["a", "a a a"]  # of other lengths, so that a layer that sees the length can be told


class MCDropout(SequenceClassifier):
    """A sequence-classification model with dropout as M members: texts → (B, M).

    Member m is the network in evaluation mode in which each `torch.nn.Dropout` of probability p multiplies the features
    of its input, the last dimension, by a mask that is fixed: its entries are independent, 0 with probability p and
    1/(1 − p) otherwise. A layer has one mask a member, for every text, row, position and call, so that a member is one
    function of the text, and a text's belief is the same in every batch. (Dropout as it is in training draws anew for
    each row and position: its samples are of no function.) Dropout that a model applies by
    `torch.nn.functional.dropout`, as many do inside attention, stays off. The masks are drawn on the CPU from `seed`,
    the member and the layer's name; the model, its hooks and the state of all random generators are left as they are.
    Source: `gal2016`; of fixed masks: `durasov2021`.

    Parameters
    ----------
    model, tokenizer
        A `...ForSequenceClassification` in evaluation mode, and what it reads with.
    num_masks : int
        M ≥ 2.
    seed : int
    layers : sequence of str, optional
        Names of the dropout layers to use, as in `model.named_modules()`; by default all that the model calls.
    label, log_prob, batch_size, max_length
        As in `Reward.from_pretrained`.

    Raises
    ------
    ModelError
        Where the model calls no dropout layer with p > 0; where one sees an input whose last dimension changes with the
        text (attention weights), or drops whole channels; and as `Reward.from_pretrained`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        num_masks: int = 16,
        seed: int = 0,
        layers: Sequence[str] | None = None,
        label: str | None = None,
        log_prob: bool = False,
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> None:
        super().__init__(model, tokenizer, label, log_prob, batch_size, max_length, owner="MCDropout")
        if isinstance(num_masks, bool) or not isinstance(num_masks, int) or num_masks < 2:
            raise ModelError(f"MCDropout: got num_masks={num_masks!r}, expected two or more")
        self.num_masks, self.seed = num_masks, seed
        dropouts = _dropouts(model, layers)
        self.layers = {name: (width, dropouts[name].p) for name, width in self._widths(dropouts).items()}
        self.__name__ = type(model).__name__

    def __call__(self, texts: list[str]) -> Tensor:
        """(B, M) rewards, float64."""
        columns = []
        for m in range(self.num_masks):
            with self._thinned(m):
                columns.append(self.values(texts))
        return torch.stack(columns, 1)

    def masks(self, member: int) -> dict[str, Tensor]:
        """(H,) float64 factors of each layer's features, in one member."""
        return {name: _mask(f"{self.seed}/{member}/{name}", *layer) for name, layer in self.layers.items()}

    @contextmanager
    def _thinned(self, member: int) -> Iterator[None]:
        modules = dict(self.model.named_modules())
        hooks = []
        try:
            for name, mask in self.masks(member).items():
                hooks.append(modules[name].register_forward_hook(_times(mask)))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _widths(self, layers: dict[str, nn.Dropout]) -> dict[str, int]:
        """The size of the last dimension of what each layer sees, for the layers that are called."""
        seen: dict[str, list[torch.Size]] = {name: [] for name in layers}
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output, name=name: seen[name].append(output.shape))
            for name, module in layers.items()
        ]
        try:
            for text in PROBES:
                self.values([text])
        finally:
            for hook in hooks:
                hook.remove()
        called = {name: shapes for name, shapes in seen.items() if shapes}
        good = [name for name, shapes in called.items() if len({s[-1] for s in shapes}) == 1 and len(shapes[0]) <= 3]
        for name, shapes in called.items():
            if name not in good:
                raise ModelError(
                    f"MCDropout: the dropout layer {name!r} sees {[tuple(s) for s in shapes]} for two texts, whose "
                    f"last dimension are no features (attention weights): leave it out with layers={good}"
                )
        if not good:
            raise ModelError("MCDropout: the model calls none of its dropout layers in evaluation mode")
        return {name: called[name][0][-1] for name in good}


def _dropouts(model: nn.Module, wanted: Sequence[str] | None) -> dict[str, nn.Dropout]:
    named = {name: module for name, module in model.named_modules() if isinstance(module, _DropoutNd) and module.p > 0}
    if not named:
        raise ModelError(
            "MCDropout: the model has no dropout layer with p > 0, so that its members would be one and the same; use "
            "DeepEnsemble or LaplaceLastLayer"
        )
    if wanted is not None:
        if isinstance(wanted, str) or not wanted or not set(wanted) <= set(named):
            raise ModelError(f"MCDropout: got layers={wanted!r}, expected some of {list(named)}")
        named = {name: named[name] for name in wanted}
    found = {}
    for name, module in named.items():
        if not isinstance(module, nn.Dropout) or module.p >= 1:
            kept = [n for n, one in named.items() if isinstance(one, nn.Dropout) and one.p < 1]
            raise ModelError(
                f"MCDropout: layer {name!r} is {module}, expected torch.nn.Dropout with p < 1; choose others: "
                f"layers={kept}"
            )
        found[name] = module
    return found


def _mask(key: str, width: int, p: float) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    uniform = torch.rand(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (uniform >= p).double() / (1.0 - p)


def _times(mask: Tensor) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * mask.to(output)

    return hook
