"""`check_language_model`, which users run on their own LMs, on every architecture here."""

import pytest

from lmppl.testing import check_language_model
from tests.lm.random_models import KINDS, random_lm

OPTIONS = {
    "plain": {},
    "truncated": {"top_k": 3, "top_p": 0.9, "temperature": 0.8},
    "stopped": {"stop": ["ca"]},
    "pad": {"pad": "<pad>"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_options(kind, options):
    check_language_model(random_lm(kind, **options), num_draws=500)


@pytest.mark.parametrize("kind", [k for k in (*KINDS, "gemma2", "granite") if k not in ("llama", "mistral")])
def test_architectures(kind):
    tolerance = {"qwen3_next": 1e-4, "gemma2": 1e-5, "granite": 1e-5}.get(kind)
    check_language_model(random_lm(kind), num_draws=500, tolerance=tolerance)
