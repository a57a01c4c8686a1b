"""Engines whose runs take many small forwards, on every reference posterior that they support."""

import pytest

from lmppl.inference import AIS, MCMC, SMC, Engine, Splitting, Tempered, TemperedSMC
from lmppl.testing import check_engine


@pytest.mark.parametrize("kind", [SMC, MCMC, Tempered, AIS, TemperedSMC, Splitting], ids=lambda kind: kind.name)
def test_an_engine_keeps_its_guarantee(kind: type[Engine]) -> None:
    report = check_engine(kind())
    assert "expectations are within 4.5 standard errors" in report.held
    assert report.error_rate < 5e-3
