"""The progress bar: what is still there in a narrow terminal."""

import pytest

from lmppl.inference.engine import Request
from lmppl.inference.progress import progress_bar
from lmppl.inference.smc import SMC
from lmppl.sequences import Cost


def test_the_time_is_whole_in_eighty_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    figures = {"ESS": "4.1", "log Ẑ": "5.44", "acceptance": "77 %", "ancestors": "1,000 of 1,000", "more": "12,000"}
    with progress_bar(SMC(1000), Request(10, None, 0), True) as bar:
        bar.shown = 0.0
        bar.within(None, 0.5, figures, Cost(lm_tokens=10))
    assert "0:00:0" in capsys.readouterr().err
