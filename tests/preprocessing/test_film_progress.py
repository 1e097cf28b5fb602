"""How far `shots` is: a bar on a terminal, and lines with the time left in a log."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from preprocessing import film_progress
from preprocessing.film_progress import FilmProgress


class Work:
    """Films that are done, and a clock, both of which a test turns on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.films = 0
        self.seconds = 0.0
        patch.setattr(film_progress, "time", SimpleNamespace(monotonic=lambda: self.seconds))
        # Its thread asks only when the test does.
        patch.setattr(film_progress, "ASKED_EVERY_SECONDS", 1e6)

    def done(self) -> int:
        return self.films

    def go_on(self, progress: FilmProgress, films: int, seconds: float) -> None:
        self.films += films
        self.seconds += seconds
        progress._tell()


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


def test_a_log_has_a_line_a_tenth_with_the_time_left(
    work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    # What an earlier run has done says nothing of how fast this one is.
    work.films = 1000
    with FilmProgress(work.done, 2000) as progress:
        work.go_on(progress, 0, 100)
        work.go_on(progress, 50, 100)
        work.go_on(progress, 49, 98)
        assert capsys.readouterr().out == ""
        work.go_on(progress, 101, 102)
        assert capsys.readouterr().out == "shots: 1,200 of 2,000 films, 0:26:40 left\n"
        work.films = 2000
    assert capsys.readouterr().out == "shots: 2,000 of 2,000 films, 0:00:00 left\n"


def test_a_log_of_days_has_a_line_every_ten_minutes(
    work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    with FilmProgress(work.done, 10_000) as progress:
        work.go_on(progress, 1, 590)
        assert capsys.readouterr().out == ""
        work.go_on(progress, 1, 10)
        assert capsys.readouterr().out == "shots: 2 of 10,000 films, 34 days, 17:10:00 left\n"
        work.go_on(progress, 1, 599)
        work.go_on(progress, 0, 0)
        assert capsys.readouterr().out == ""


def test_a_terminal_has_a_bar(
    work: Work, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with FilmProgress(work.done, 10) as progress:
        work.go_on(progress, 3, 30)
    told = capsys.readouterr()
    assert "3/10" in told.err
    assert "0:01:10 left" in told.err
    assert told.out == ""


def test_its_thread_asks_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = iter(range(10**9))
    monkeypatch.setattr(film_progress, "ASKED_EVERY_SECONDS", 0.001)
    monkeypatch.setattr(film_progress, "TOLD_EVERY_SECONDS", 0.0)
    with FilmProgress(lambda: min(3, next(asked)), 3) as progress:
        deadline = time.monotonic() + 60
        while progress._told < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert progress._told == 3
    assert capsys.readouterr().out.count("\n") == 3


def test_a_folder_that_does_not_answer_is_asked_again(
    work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    with FilmProgress(work.done, 2) as progress:
        progress._done = fails
        progress._tell()
        progress._done = lambda: 2
    assert capsys.readouterr().out == "shots: 2 of 2 films, 0:00:00 left\n"


def fails() -> int:
    raise OSError(5, "Input/output error")
