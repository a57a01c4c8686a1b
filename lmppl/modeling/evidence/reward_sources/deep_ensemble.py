"""Deep ensembles: several reward functions, each a member."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.modeling.declared_functions import function_name, to_feature
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.evidence.reward_sources.members import rewards_of

__all__ = ["DeepEnsemble"]


@dataclass(frozen=True)
class DeepEnsemble:
    """M reward functions as one belief: texts → (B, M), member m being what function m says.

    Functions that were trained apart, from other starts or on other data, agree where the data decide and differ
    elsewhere. Source: `lakshminarayanan2017`; of reward models: `coste2024`.

    Parameters
    ----------
    functions : sequence of M ≥ 2 callables
        Each a list of texts → one number for each, in the same units. Rewards learned from comparisons have a free
        constant each: see `num_references` of `UncertainReward`.

    Raises
    ------
    ModelError
        Where there is one member, or one is no function of a list of texts.
    FactorError, ShapeError
        When called: nan, ±inf, another number of values than texts; the error names the member.

    Examples
    --------
    >>> DeepEnsemble([lambda texts: [len(t) for t in texts], lambda texts: [t.count("a") for t in texts]])(["aab"])
    tensor([[3., 2.]], dtype=torch.float64)
    """

    functions: Sequence[Callable[[list[str]], Any]]
    # `content_digest` counts what is inside a partial as a function, with its attributes, and other values by type.
    _calls: tuple[Callable[[list[str]], Any], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        functions = tuple(self.functions)
        if len(functions) < 2:
            raise ModelError(
                f"DeepEnsemble: got {len(functions)} member(s), expected two or more; a single function has no "
                "spread: declare it as Reward"
            )
        for m, fn in enumerate(functions):
            if to_feature(fn, kind=f"DeepEnsemble, member {m}").reads_prompts:
                raise ModelError(
                    f"DeepEnsemble, member {m}: it takes prompts and completions, expected a function of a list of "
                    "texts; with on='full' they are context + completion"
                )
        object.__setattr__(self, "functions", functions)
        object.__setattr__(self, "_calls", tuple(functools.partial(fn) for fn in functions))

    @classmethod
    def from_pretrained(cls, models: Sequence[Any], tokenizer: Any = None, **options: Any) -> Self:
        """Sequence classifiers as members: names, paths or loaded models.

        Parameters
        ----------
        models : sequence of str or transformers models
        tokenizer, **options
            As in `Reward.from_pretrained`, for every member.
        """
        if "beta" in options:
            raise ModelError("DeepEnsemble.from_pretrained: got beta=, which belongs to UncertainReward")
        return cls([Reward.from_pretrained(model, tokenizer, **options).features[0].fn for model in models])

    def __call__(self, texts: list[str]) -> Tensor:
        """(B, M) rewards, float64."""
        columns = []
        for m, fn in enumerate(self._calls):
            who = f"member {m} ({function_name(fn) or 'lambda'})"
            columns.append(rewards_of(who, functools.partial(fn, texts), texts))
        return torch.stack(columns, 1)
