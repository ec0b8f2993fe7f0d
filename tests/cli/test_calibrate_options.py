from __future__ import annotations

import pytest
from typer.testing import CliRunner

from rksc_sgl.cli import app
from rksc_sgl.cli.calibrate import DEFAULT_RISKS, risks_of
from rksc_sgl.errors import OptionError


def test_the_name_that_risk_had_before_goes_on_working_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert risks_of([0.05, 0.01, 0.05], None) == (0.01, 0.05)
    assert risks_of(None, None) == DEFAULT_RISKS
    assert capsys.readouterr().err == ""
    assert risks_of(None, [0.05, 0.01]) == (0.01, 0.05)
    assert "--delta is called --risk now" in capsys.readouterr().err
    with pytest.raises(OptionError, match="give --risk only"):
        risks_of([0.01], [0.01])


def test_help_names_the_option_by_its_name_of_today() -> None:
    shown = CliRunner().invoke(app, ["calibrate", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
    assert "--risk" in shown and "0.005, 0.01, 0.02, 0.05" in shown and "--delta" not in shown


def test_both_names_reach_the_command() -> None:
    for name in ("--risk", "--delta"):
        result = CliRunner().invoke(app, ["calibrate", name, "0.01", "--model-path", "m", "--url", "u"])
        assert isinstance(result.exception, OptionError) and "give one of the two" in str(result.exception)
