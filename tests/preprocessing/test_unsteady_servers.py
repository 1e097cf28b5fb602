"""Media at servers that stumble: what costs an attempt, and what costs an item."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from farm_media import CAPTIONS, tokenize_command, write_manifest
from farm_runs import contents

from preprocessing.__main__ import main

ALWAYS = 1 << 30
STUMBLES = ("refuses", "breaks off")


class UnsteadyServer(ThreadingHTTPServer):
    """Serves a folder; a name in `stumbles` is asked for so often in vain."""

    def __init__(self, folder: Path, stumble: str) -> None:
        self.folder, self.stumble = folder, stumble
        self.stumbles: Counter[str] = Counter()
        super().__init__(("127.0.0.1", 0), _Handler)

    def address(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(SimpleHTTPRequestHandler):
    server: UnsteadyServer

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, directory=str(arguments[2].folder))

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        if not self.server.stumbles[name]:
            super().do_GET()
            return
        self.server.stumbles[name] -= 1
        if self.server.stumble == "refuses":
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"half of it")
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@pytest.fixture(params=STUMBLES)
def server(
    media: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[UnsteadyServer]:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    folder = tmp_path_factory.mktemp("served")
    for n in range(6):
        shutil.copy(media / f"image{n}.png", folder)
    with UnsteadyServer(folder, request.param) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_server_that_stumbles_costs_attempts_and_one_that_is_down_its_items(
    server: UnsteadyServer, tools: Path, tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [
        {"id": f"i{n}", "media": server.address(f"image{n}.png"), "captions": CAPTIONS}
        for n in range(6)
    ]
    manifest = write_manifest(tmp_path / "images.jsonl", rows)

    def made(name: str, stumbles: int) -> dict[str, bytes]:
        server.stumbles["image3.png"] = stumbles
        command = tokenize_command(manifest, tmp_path / name, tools, "--items-per-shard", "2")
        assert main([*command, "--attempts", "3"]) == 0
        return contents(tmp_path / name)

    good = made("good", 0)
    assert good["failures.jsonl"] == b""
    assert made("unsteady", 2) == good
    (failure,) = map(json.loads, made("down", ALWAYS)["failures.jsonl"].splitlines())
    assert ALWAYS - server.stumbles["image3.png"] == 3
    assert failure["id"] == "i3"
    assert failure["reason"].startswith(f"{server.address('image3.png')} cannot be read: ")


def test_a_manifest_that_cannot_be_fetched_is_told_in_a_sentence(
    server: UnsteadyServer, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("jsonl", "csv", "parquet", "tar"):
        (server.folder / f"fetched.{kind}").touch()
        server.stumbles[f"fetched.{kind}"] = ALWAYS
        source = server.address(f"fetched.{kind}")
        assert main(tokenize_command(source, tmp_path / "corpus", tools)) == 2
        (told,) = capsys.readouterr().err.splitlines()
        # Of what has come before a server broke off, it may be another one.
        assert told.startswith("error: ")
        assert source in told
    assert list(tmp_path.iterdir()) == []
