"""LearnedReward: what rewards learned from pairs share as declarations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from lmppl.errors import ModelError
from lmppl.modeling.evidence.attitudes import Attitude
from lmppl.modeling.evidence.uncertain import UncertainReward, attitude_of
from lmppl.modeling.factors import Feature

__all__ = ["LearnedReward"]


class LearnedReward(UncertainReward):
    """An `UncertainReward` whose function was learned from preference pairs by the subclass's `fit`.

    Parameters
    ----------
    learned : object
        What `fit` makes: texts → beliefs.
    beta, attitude, num_references, name, fingerprint
        As in `UncertainReward`.
    on : {"text", "full"}
        Whether features read the completion or context + completion.

    Raises
    ------
    ModelError
        Where `learned` is something else; as `UncertainReward`.
    """

    kind_of_learned: ClassVar[type[Any]]
    learned: Any

    def __init__(
        self,
        learned: Any,
        beta: float = 1.0,
        attitude: Attitude | None = None,
        *,
        num_references: int | None = None,
        name: str | None = None,
        on: Literal["text", "full"] = "text",
        fingerprint: str | None = None,
    ) -> None:
        if not isinstance(learned, self.kind_of_learned):
            who = type(self).__name__
            raise ModelError(f"{who}: got {type(learned).__name__}, expected what {who}.fit(pairs, features) makes")
        super().__init__(
            learned, beta, attitude, num_references=num_references, name=name, on=on, fingerprint=fingerprint
        )
        object.__setattr__(self, "learned", learned)

    def with_attitude(
        self,
        attitude: Attitude,
        *,
        beta: float | None = None,
        num_references: int | None = None,
        name: str | None = None,
    ) -> Self:
        """What was learned in another declaration; what is not given stays."""
        return type(self)(
            self.learned,
            self.beta if beta is None else beta,
            attitude,
            num_references=self.num_references if num_references is None else num_references,
            name=name or (self.name if self.named else None),
            on=self._on,
            fingerprint=self.features[0].fingerprint,
        )

    @classmethod
    def from_description(
        cls, data: Mapping[str, Any], features: Sequence[Feature], functions: Mapping[str, Any]
    ) -> Self:
        """The factor that `describe` described; the feature's function is the featuriser, or what was fitted."""
        return cls(
            cls.read_learned(data, features[0]),
            float(data["beta"]),
            attitude_of(data),
            num_references=data["num_references"],
            name=data["name"],
            on=data["on"],
            fingerprint=features[0].fingerprint,
        )

    @classmethod
    def read_learned(cls, data: Mapping[str, Any], feature: Feature) -> Any:
        """What was learned, from what `describe` wrote."""
        raise NotImplementedError

    @property
    def _on(self) -> Literal["text", "full"]:
        on: Any = getattr(self.features[0].fn, "on", self.features[0].on)
        return on  # type: ignore[no-any-return]
