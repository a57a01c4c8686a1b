"""The Laplace approximation of a reward model's last layer: a Gaussian belief about its linear head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lmppl.errors import ModelError
from lmppl.modeling.evidence.attitudes import check_number
from lmppl.modeling.evidence.sequence_classifier import SequenceClassifier

__all__ = ["LaplaceLastLayer", "gaussian_head"]

NEWTON_STEPS = 100
HALVINGS = 40
SETTLED = 1e-9  # of the gradient, relative to the largest entry of the design and of the prior's precision
LINEAR = 1e-4  # relative gap that rounding in float32 may leave


class LaplaceLastLayer(SequenceClassifier):
    """A reward model whose last layer is uncertain: texts → (means (B,), standard deviations (B,)), a Gaussian.

    r(x) = θ·h(x), h the features that the last linear layer reads, and p(θ | data) ≈ N(θ̂, Σ): θ̂ is the mode under
    θ ~ N(θ0, σ²I), and Σ⁻¹ = Σ_i p_i(1 − p_i) d_i d_iᵀ + I/σ² the curvature there, with p_i = σ(θ·d_i). So m = θ̂·h and
    s² = hᵀΣh. For pairs (chosen, rejected) d = h(chosen) − h(rejected) (Bradley and Terry), and θ has no bias, which no
    pair says anything about: centre the belief with `num_references`. For (text, label) d = ±(h, 1), logistic
    regression, and r is the log-odds. Make it by `fit`. Source: `mackay1992`, `kristiadi2020`; of reward models:
    `yang2024`.

    Parameters
    ----------
    model, tokenizer, batch_size, max_length
        As in `Reward.from_pretrained`; a model of one output.
    layer : str
        Name of the last linear layer.
    mean : Tensor (P,)
        θ̂; P = H, or H + 1 with a bias, which comes last.
    covariance : Tensor (P, P)
        Σ.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        layer: str,
        mean: Tensor,
        covariance: Tensor,
        *,
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> None:
        super().__init__(model, tokenizer, None, False, batch_size, max_length, owner="LaplaceLastLayer")
        if model.config.num_labels != 1:
            raise ModelError(f"LaplaceLastLayer: the model has {model.config.num_labels} outputs, expected one")
        size = len(mean)
        if mean.dim() != 1 or tuple(covariance.shape) != (size, size):
            shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise ModelError(f"LaplaceLastLayer: got mean and covariance of shapes {shapes}, expected (P,) and (P, P)")
        self.layer, self.mean, self.covariance = layer, mean.double().cpu(), covariance.double().cpu()
        self.__name__ = type(model).__name__

    @classmethod
    def fit(
        cls,
        model: Any,
        tokenizer: Any,
        data: Sequence[tuple[str, str] | tuple[str, bool]],
        *,
        prior_scale: float = 1.0,
        centre: Literal["zero", "model"] = "zero",
        layer: str | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> Self:
        """The belief of the last layer after `data`.

        Parameters
        ----------
        model, tokenizer, batch_size, max_length
            As in `Reward.from_pretrained`; the model is not changed.
        data : sequence of pairs
            (chosen text, rejected text), or (text, label) with labels True/False or 1/0.
        prior_scale : float
            σ > 0, in the units of the weights.
        centre : {"zero", "model"}
            θ0: zero, for the data that the layer was trained on, or the model's own weights, for data it has not seen.
        layer : str, optional
            By default `score` or `classifier`, where that is linear, or the last linear layer.

        Raises
        ------
        ModelError
            Where data are of neither kind, the layer is not the last one, or σ is out of range.
        """
        check_number(prior_scale, "LaplaceLastLayer.fit", "prior_scale", 0.0, math.inf, "a positive number")
        if centre not in ("zero", "model"):
            raise ModelError(f"LaplaceLastLayer.fit: got centre={centre!r}, expected 'zero' or 'model'")
        first, second = _read_data(data)
        name, linear = _last_linear(model, layer)
        options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
        width = linear.in_features
        reader = cls(model, tokenizer, name, torch.zeros(width), torch.eye(width), **options)
        reader.check_layer(linear, first[:4])
        weight = linear.weight.detach()[0].double().cpu()
        features = reader.features(first)
        if isinstance(second[0], str):
            design = features - reader.features([str(text) for text in second])
        else:
            signs = torch.tensor([1.0 if label else -1.0 for label in second], dtype=torch.float64)
            if linear.bias is not None:
                features = _with_one(features)
                weight = torch.cat([weight, linear.bias.detach().double().cpu()])
            design = signs[:, None] * features
        start = weight if centre == "model" else torch.zeros_like(weight)
        mean, covariance = gaussian_head(design, start, float(prior_scale))
        return cls(model, tokenizer, name, mean, covariance, **options)

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Means (B,) and standard deviations (B,) of r, float64."""
        features = self.features(texts)
        if len(self.mean) == features.shape[1] + 1:
            features = _with_one(features)
        # |Lᵀh| with Σ = LLᵀ, which rounding cannot make the root of a negative number.
        return features @ self.mean, (features @ torch.linalg.cholesky(self.covariance)).norm(dim=1)

    def features(self, texts: list[str]) -> Tensor:
        """(B, H) what the last layer reads, where the model reads its output: pooled as the model pools."""
        module = self.model.get_submodule(self.layer)
        # The layer hands its input on, and what the model then calls logits are the features.
        hook = module.register_forward_hook(lambda _module, inputs, _output: inputs[0])
        try:
            return self.logits(texts)
        finally:
            hook.remove()

    def check_layer(self, linear: nn.Linear, texts: list[str]) -> None:
        """Raise where the model's output is not this layer's, applied to the features."""
        features, wanted = self.features(texts), self.logits(texts)
        weight = linear.weight.detach().double().cpu()
        made = features @ weight.T if features.shape[-1] == weight.shape[1] else None
        if made is not None and linear.bias is not None:
            made = made + linear.bias.detach().double().cpu()
        scale = 1.0 + float(wanted.abs().max())
        if made is None or made.shape != wanted.shape or float((made - wanted).abs().max()) > LINEAR * scale:
            raise ModelError(
                f"LaplaceLastLayer.fit: the layer {self.layer!r} is not the model's last one: its output is not what "
                "the model returns; name the last linear layer with layer="
            )


def gaussian_head(design: Tensor, start: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """θ̂ = argmin Σ_i log(1 + e^{−θ·d_i}) + |θ − θ0|²/2σ² (P,), and the inverse (P, P) of its Hessian there.

    Parameters
    ----------
    design : Tensor (N, P), float64
        d_i, with the sign of what was seen: p(seen) = σ(θ·d_i).
    start : Tensor (P,)
        θ0.
    scale : float
        σ.
    """
    precision = 1.0 / scale**2
    identity = torch.eye(design.shape[1], dtype=torch.float64)

    def loss(theta: Tensor) -> Tensor:
        return softplus(-(design @ theta)).sum() + 0.5 * precision * (theta - start).square().sum()

    def hessian(theta: Tensor) -> Tensor:
        p = torch.sigmoid(design @ theta)
        return design.T @ ((p * (1.0 - p))[:, None] * design) + precision * identity

    theta, value = start, loss(start)
    allowed = SETTLED * (precision + float(design.abs().max()) * len(design))
    for _ in range(NEWTON_STEPS):
        gradient = precision * (theta - start) - design.T @ torch.sigmoid(-(design @ theta))
        if float(gradient.abs().max()) <= allowed:
            return theta, torch.cholesky_inverse(torch.linalg.cholesky(hessian(theta)))
        step = torch.linalg.solve(hessian(theta), gradient)
        for _ in range(HALVINGS):
            if float(loss(theta - step)) <= float(value):
                break
            step = 0.5 * step
        else:
            break  # rounding hides the way down
        theta = theta - step
        value = loss(theta)
    raise ModelError(
        f"LaplaceLastLayer.fit: Newton's method has not settled in {NEWTON_STEPS} steps; lower prior_scale={scale:g}, "
        "or check the features for values of very different size"
    )


def _with_one(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[:, :1])], 1)


def _read_data(data: Sequence[Any]) -> tuple[list[str], list[Any]]:
    """First texts, and the rejected texts or the labels (bool)."""
    expected = "expected pairs (chosen, rejected) of texts, or (text, label) with labels True or False"
    pairs = list(data)
    if not pairs:
        raise ModelError(f"LaplaceLastLayer.fit: got no data, {expected}")
    for i, pair in enumerate(pairs):
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ModelError(f"LaplaceLastLayer.fit: got {pair!r} as item {i}, {expected}")
    second = [pair[1] for pair in pairs]
    if all(isinstance(one, str) for one in second):
        return [pair[0] for pair in pairs], second
    wrong = next((i for i, one in enumerate(second) if isinstance(one, str) or one not in (0, 1)), None)
    if wrong is not None:
        raise ModelError(f"LaplaceLastLayer.fit: got {pairs[wrong]!r} as item {wrong}, {expected}")
    return [pair[0] for pair in pairs], [bool(one) for one in second]


def _last_linear(model: nn.Module, name: str | None) -> tuple[str, nn.Linear]:
    linears = {n: module for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    if name is None:
        name = next((n for n in ("score", "classifier") if n in linears), next(reversed(linears), None))
    if name is None or name not in linears:
        raise ModelError(
            f"LaplaceLastLayer.fit: got layer={name!r}, expected the name of a linear layer, such as "
            f"{list(linears)[-3:]}"
        )
    if linears[name].out_features != 1:
        raise ModelError(f"LaplaceLastLayer.fit: the layer {name!r} has {linears[name].out_features} outputs, not one")
    return name, linears[name]
