import pytest

from quickmerge.terminal import say
from quickmerge.training.metrics import shown


@pytest.mark.parametrize("visible", [True, False])
def test_the_bar_is_on_stderr_and_only_where_it_shall_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, visible: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with shown(3, 10, visible) as show:
        show(10, 0.25, 123.4)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("loss 0.25, 123 items/s" in err and "10/10" in err) if visible else err.strip() == ""


def test_a_sentence_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "warning: [bold] " + "long " * 60
    say(sentence)
    assert capsys.readouterr().err == sentence + "\n"
