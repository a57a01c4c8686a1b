"""The progress bar: what is still there in a narrow terminal."""

import pytest

from lmppl.inference.progress import rich_progress


def test_the_time_is_whole_in_eighty_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    with rich_progress(True) as bar:
        assert bar is not None
        figures = "step 12 · accepted (suffix) 62% · tokens/s 12,031"
        bar.add_task("mcmc(num_chains=64)", total=10, figures=figures)
    assert "0:00:00" in capsys.readouterr().err
