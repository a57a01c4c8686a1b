"""PPLM: gradient steps on the LM's own past, towards differentiable factors, before each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lmppl.errors import ModelError
from lmppl.inference.engine import Request, Shard
from lmppl.inference.perturbed_lm import PerturbedLM, place_of
from lmppl.inference.steered_decoding import DecodingEngine
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target, TargetForm

__all__ = ["PPLM"]

PLACES = ("auto", "cache", "hidden")


@dataclass(frozen=True)
class PPLM(DecodingEngine):
    """Plug-and-play decoding: before each token the past is moved along the gradient of the soft factors, a heuristic.

    With H the keys and values of all tokens but the last one, ΔH = 0 at first, p the unmodified next-token law and p̃
    the one over H + ΔH, `num_steps` times

        ΔH ← ΔH + α g/‖g‖^ν,   g = ∇_ΔH [ Σ_k log φ̃_k(p̃, h̃) − κ KL(p̃‖p) ],

    with the norm over keys and values of one layer and row; then the token is drawn from q ∝ p̃^s p^{1−s}. q is a
    function of the prefix alone: each token starts from the LM's own past again, where the published program goes on
    from the changed one. So q is a language model, log q is kept, and weights correct it.

    What is steered towards are the *soft* forms of factors (`Factor.soft`), step by step, and not log φ of whole texts:
    the law is not π*. Other factors are not looked at while decoding (`info["not_decoded"]`).

    Parameters
    ----------
    num_steps : int
        Gradient steps for each token; each costs one forward and one backward pass of one token a row.
    step_size : float
        α; 0 is π0.
    kl_scale : float
        κ ≥ 0.
    fusion : float
        s in [0, 1]: the share of p̃ in the geometric mean.
    norm_power : float
        ν; 1 moves each layer by α, the published program has 1.5.
    perturb : {"auto", "cache", "hidden"}
        What is moved: the cache, where the architecture's is plain keys and values; or the last hidden state, for any
        LM that has one (`info["perturbed"]` says which). A context of one token has no past to move.
    factors : sequence of str, optional
        Names of the factors that steer; by default all that have a soft form.
    num_draws : int
        Draws per context where `infer` does not say.

    Raises
    ------
    UnsupportedModel
        Where the LM has neither an open cache nor hidden states, or is declared truncated: the gradient of log 0 is
        none.
    ModelError
        Where an argument is wrong, or a soft form gives something that is not finite.

    References
    ----------
    dathathri2020
    """

    num_steps: int = 3
    step_size: float = 0.1
    kl_scale: float = 0.01
    fusion: float = 0.9
    norm_power: float = 1.0
    perturb: str = "auto"
    factors: Sequence[str] | None = None
    num_draws: int = 64

    name: ClassVar[str] = "pplm"
    references: ClassVar[tuple[str, ...]] = ("dathathri2020",)

    def unsupported_reason(self, form: TargetForm) -> str | None:
        """As `Engine.unsupported_reason`; wrong arguments are told first."""
        self.check_arguments()
        if not form.soft:
            named = f"factor {form.factor_names[0]!r} has none" if form.factor_names else "this model has no factor"
            return (
                f"{self.name} needs a differentiable form: {named}; multiply by lmppl.BagOfWords(words) or "
                "lmppl.Classifier(head), or pass Factor(soft=...)"
            )
        if form.tabular:
            return f"{self.name} needs a network to differentiate, and the prior is a table; use weighted_decoding"
        return super().unsupported_reason(form)

    def check_arguments(self) -> None:
        """Raise `ModelError` where an argument is wrong."""
        if isinstance(self.num_steps, bool) or self.num_steps < 0:
            raise ModelError(f"PPLM: got num_steps={self.num_steps!r}, expected at least 0")
        for name, value, good in (
            ("step_size", self.step_size, self.step_size >= 0),
            ("kl_scale", self.kl_scale, self.kl_scale >= 0),
            ("fusion", self.fusion, 0 <= self.fusion <= 1),
            ("norm_power", self.norm_power, self.norm_power >= 0),
        ):
            if not good:
                expected = "in [0, 1]" if name == "fusion" else "of at least 0"
                raise ModelError(f"PPLM: got {name}={value!r}, expected a number {expected}")
        if isinstance(self.factors, str):
            raise ModelError(f"PPLM: got factors={self.factors!r}, expected a list of names")
        if self.perturb not in PLACES:
            raise ModelError(f"PPLM: got perturb={self.perturb!r}, expected one of {', '.join(map(repr, PLACES))}")

    def plan(self, target: Target, request: Request) -> list[Shard]:
        """As `Engine.plan`, arguments checked."""
        self.language_model(target.model)
        return super().plan(target, request)

    def language_model(self, model: Model) -> PerturbedLM:
        """q for `model`."""
        self.check_arguments()
        return PerturbedLM(model.prior, [model[name] for name in self._names(model)], self)

    def facts(self, target: Target) -> dict[str, Any]:
        """As `DecodingEngine.facts`."""
        used = self._names(target.model)
        place = place_of(self.perturb, target.prior)
        return {"perturbed": place, "not_decoded": tuple(n for n in target.form.factor_names if n not in used)}

    def _names(self, model: Model) -> tuple[str, ...]:
        if self.factors is None:
            return tuple(f.name for f in model.factors if f.soft is not None)
        return tuple(self.factors)
