"""A belief as plain data and back: tensors keep every bit."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lmppl.modeling.evidence.preference.features import Featuriser, Standardised
from lmppl.modeling.evidence.preference.posteriors import DrawnHead, GaussianHead, HeadDraws, HeadPosterior

if TYPE_CHECKING:
    from lmppl.modeling.evidence.preference.head_belief import HeadBelief

__all__ = ["read_belief_data", "read_tensor", "write_belief_data", "write_tensor"]


def write_belief_data(belief: HeadBelief) -> dict[str, Any]:
    """JSON data of all but the featuriser."""
    head = belief.posterior
    data: dict[str, Any] = {
        "centre": write_tensor(belief.features.centre),
        "scale": write_tensor(belief.features.scale),
        "annotators": list(belief.annotators),
        "facts": dict(belief.facts),
        "noise": head.noise,
    }
    if isinstance(head, GaussianHead):
        return data | {
            "location": write_tensor(head.location),
            "spread": write_tensor(head.spread),
            "dim": head.dim,
            "annotator_scale": head.annotator_scale,
        }
    assert isinstance(head, DrawnHead)
    return data | {name: one if one is None else write_tensor(one) for name, one in head.sample._asdict().items()}


def read_belief_data(
    data: Mapping[str, Any], fn: Featuriser
) -> tuple[Standardised, HeadPosterior, tuple[str, ...], dict[str, Any]]:
    """Features, posterior, annotators and facts."""
    features = Standardised(fn, read_tensor(data["centre"]), read_tensor(data["scale"]))
    annotators, noise = tuple(data["annotators"]), float(data["noise"])
    head: HeadPosterior
    if "location" in data:
        head = GaussianHead(
            read_tensor(data["location"]),
            read_tensor(data["spread"]),
            int(data["dim"]),
            len(annotators),
            float(data["annotator_scale"]),
            noise,
        )
    else:
        parts = {name: None if data[name] is None else read_tensor(data[name]) for name in HeadDraws._fields}
        head = DrawnHead(HeadDraws(**parts), noise)  # type: ignore[arg-type]
    return features, head, annotators, dict(data["facts"])


def write_tensor(values: Tensor) -> dict[str, Any]:
    """Shape and little-endian float64 bytes, in base64."""
    array = np.ascontiguousarray(values.detach().cpu().numpy(), dtype="<f8")
    return {"shape": list(array.shape), "float64": base64.b64encode(array.tobytes()).decode("ascii")}


def read_tensor(data: Mapping[str, Any]) -> Tensor:
    """What `write_tensor` wrote."""
    array = np.frombuffer(base64.b64decode(data["float64"]), dtype="<f8").reshape(data["shape"])
    return torch.from_numpy(array.astype(np.float64))
