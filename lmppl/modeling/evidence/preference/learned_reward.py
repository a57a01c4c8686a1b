"""LearnedReward: what rewards learned from pairs share as declarations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from lmppl.errors import ModelError
from lmppl.modeling.evidence.attitudes import Attitude, Mean
from lmppl.modeling.evidence.uncertain import UncertainReward, attitude_of
from lmppl.modeling.factors import Feature

__all__ = ["LearnedReward"]


class LearnedReward(UncertainReward, ABC):
    """An `UncertainReward` whose function was learned from preference pairs by the subclass's `fit`.

    A reward learned from pairs has a free constant in each context, which an attitude may not be indifferent to: it
    then asks for `num_references`, and 0 says that the constant is meant as it is.

    Parameters
    ----------
    learned : object
        What `fit` makes: texts → beliefs.
    beta, attitude, name, fingerprint
        As in `UncertainReward`.
    num_references : int, optional
        As in `UncertainReward`; 0 leaves the free constant as it is.
    on : {"text", "full"}
        Whether features read the completion or context + completion.

    Raises
    ------
    ModelError
        Where `learned` is something else, or the attitude needs `num_references`; as `UncertainReward`.
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
        who = type(self).__name__
        if not isinstance(learned, self.kind_of_learned):
            raise ModelError(f"{who}: got {type(learned).__name__}, expected what {who}.fit(pairs, features) makes")
        self.check_centre(attitude, num_references)
        centre = None if num_references == 0 and num_references is not False else num_references
        super().__init__(learned, beta, attitude, num_references=centre, name=name, on=on, fingerprint=fingerprint)
        object.__setattr__(self, "learned", learned)
        object.__setattr__(self, "num_references", num_references)

    @classmethod
    @abstractmethod
    def is_indifferent(cls, attitude: Attitude) -> bool:
        """Whether the free constant of what was learned changes no posterior under the attitude."""

    @classmethod
    def check_centre(cls, attitude: Attitude | None, num_references: int | None) -> None:
        """Raise `ModelError` where the attitude needs a centre and none is declared."""
        stated = Mean() if attitude is None else attitude
        if num_references is None and isinstance(stated, Attitude) and not cls.is_indifferent(stated):
            raise ModelError(
                f"{cls.__name__}: {stated!r} needs num_references=, such as 64: a reward learned from pairs has a free "
                "constant in each context, which draws of the prior take out; num_references=0 keeps it as it is"
            )

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
    @abstractmethod
    def read_learned(cls, data: Mapping[str, Any], feature: Feature) -> Any:
        """What was learned, from what `describe` wrote."""

    @property
    def _on(self) -> Literal["text", "full"]:
        on: Any = getattr(self.features[0].fn, "on", self.features[0].on)
        return on  # type: ignore[no-any-return]
