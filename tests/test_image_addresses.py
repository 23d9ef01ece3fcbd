"""Images named by their address, fetched from a real server on loopback."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from saccade.cli.main import main
from saccade.data import addresses
from saccade.data.addresses import ImageAddresses
from saccade.errors import RecordError, SaccadeError
from saccade.training import ModelOptions
from saccade.training.sources import load_rows


class Handler(BaseHTTPRequestHandler):
    """Serves `a.png`, faults, and redirects; counts what is asked for."""

    asked: ClassVar[list[str]] = []
    png = b""

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name = self.path.rpartition("/")[2]
        failed = name == "once.png" and self.asked.count(self.path) == 1
        if name in ("page.png", "empty.png", "later.png"):
            self.send_response(202 if name == "later.png" else 200)
            self.end_headers()
            self.wfile.write({"page.png": b"<html>log in</html>", "empty.png": b""}.get(name, self.png))
            return
        if name == "missing.png" or failed:
            self.send_error(503 if failed else 404)
            return
        if name in ("away", "near"):
            self.send_response(302)
            host = "localhost" if name == "away" else "127.0.0.1"
            self.send_header("Location", f"http://{host}:{self.server.server_port}/pictures/a.png")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.png) + (7 if name == "short.png" else 0)))
        self.end_headers()
        self.wfile.write(self.png)

    def do_CONNECT(self) -> None:
        self.asked.append(f"CONNECT {self.path}")
        self.send_error(502)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch) -> Iterator[str]:
    """The beginning of the addresses of a server on loopback."""
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    Handler.png, Handler.asked = (tmp_path / "a.png").read_bytes(), []
    monkeypatch.setattr(addresses, "_PAUSE", 0.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/pictures/"
        running.shutdown()
        thread.join()


def rows_with(folder: Path, *images: str) -> Path:
    path = folder / "rows.json"
    turns = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
    path.write_text(json.dumps([{"image": image, "conversations": turns} for image in images]))
    return path


class TestRows:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_an_image_is_fetched_once(self, server: str, tmp_path: Path, streaming: bool) -> None:
        cache = tmp_path / "cache"
        options = ModelOptions(
            dataset=str(rows_with(tmp_path, f"{server}a.png", f"{server}a.png?v=2")),
            dataset_streaming=streaming,
            dataset_shuffle_buffer=0,
            image_urls=server,
            image_cache=str(cache),
        )
        for _ in range(2):
            found = [row["images"][0] for row in load_rows(options)]
            paths = [Path(image["path"] if isinstance(image, dict) else image) for image in found]
            assert all(path.name.endswith("-a.png") and cache in path.parents for path in paths)
            assert [Image.open(path).size for path in paths] == [(30, 20)] * 2
        assert sorted(Handler.asked) == ["/pictures/a.png", "/pictures/a.png?v=2"]

    def test_nothing_is_fetched_by_default(self, server: str, tmp_path: Path) -> None:
        (tmp_path / "b.png").write_bytes(Handler.png)
        path = rows_with(tmp_path, "b.png", f"{server}a.png")
        good, bad = load_rows(ModelOptions(dataset=str(path)))
        assert good["fault"] is None
        assert bad["kind"] == "outside_image_folders"
        assert "nothing is fetched by default: add the beginning of its address to image_urls" in bad["fault"]
        assert Handler.asked == []

    def test_a_wrong_beginning_is_told_first(self, tmp_path: Path) -> None:
        path = rows_with(tmp_path, "b.png")
        with pytest.raises(SaccadeError, match=r"image_urls='https://x.org' is not the beginning of addresses"):
            load_rows(ModelOptions(dataset=str(path), image_urls=["https://x.org"]))


class TestVerbs:
    def test_what_they_fetch_is_kept_where_it_is_said(self, server: str, tmp_path: Path, capsys) -> None:
        rows, cache = rows_with(tmp_path, f"{server}a.png"), tmp_path / "kept"
        fetching = ["--image-urls", server, "--image-cache", str(cache)]
        report = tmp_path / "report.json"
        assert main(["data", "check", str(rows), *fetching, "--jobs", "1", "--output", str(report)]) == 0
        assert [path.name[-6:] for path in cache.rglob("*.png")] == ["-a.png"]
        answers = ["--num-samples", "1", "--inference", "full", "--output", str(tmp_path / "eval.json")]
        assert main(["eval", "tiny", "--dataset", str(rows), *fetching, *answers]) == 0
        assert Handler.asked == ["/pictures/a.png"]
        alone = ["eval", "tiny", "--dataset", str(rows), "--image-cache", str(cache), *answers]
        assert main(alone) == 2
        assert "--image-cache goes with --image-urls" in capsys.readouterr().err


class TestPermission:
    @pytest.mark.parametrize(
        "address",
        [
            "https://good.org/set/a.png",
            "https://good.org:443/set/b/c.png?size=2",
            "HTTPS://GOOD.org/set/a.png",
            "https://good.org/set/a%20b.png",
        ],
    )
    def test_what_begins_with_it(self, address: str) -> None:
        assert ImageAddresses(["https://good.org/set/"]).allows(address)

    @pytest.mark.parametrize(
        "address",
        [
            "http://good.org/set/a.png",
            "https://good.org/setting/a.png",
            "https://good.org/set",
            "https://good.org:8443/set/a.png",
            "https://good.org.evil.org/set/a.png",
            "https://good.org@evil.org/set/a.png",
            "https://user:word@good.org/set/a.png",
            "https://evil.org/https://good.org/set/a.png",
            "https://good.org/set/../secret/a.png",
            "https://good.org/set/%2e%2e/secret/a.png",
            "https://good.org/set/%252e%252e/secret/a.png",
            "https://good.org\\@evil.org/set/a.png",
            "https://good.org/set/a.png\r\nHost: evil.org",
            "https://good.org:port/set/a.png",
            "https://good.org:0/set/a.png",
            "https://good.org/set/..;/secret/a.png",
            "https://good.org/set/..%5c../a.png",
            "https://good.org/set/%25252e%25252e/a.png",
            "https://gооd.org/set/a.png",  # noqa: RUF001 Cyrillic letters
            "file:///set/a.png",
            "ftp://good.org/set/a.png",
        ],
    )
    def test_what_does_not(self, address: str, tmp_path: Path) -> None:
        permitted = ImageAddresses(["https://good.org/set/"], tmp_path)
        assert not permitted.allows(address)
        with pytest.raises(RecordError, match="image_urls does not permit") as error:
            permitted.fetch(address)
        assert error.value.kind == "outside_image_folders"

    @pytest.mark.parametrize(
        "prefix",
        [
            5,
            "https://*.good.org/",
            "good.org/",
            "ftp://good.org/",
            "https://",
            "https://good.org",
            "https://good.org/?a=/",
            "/folder/",
        ],
    )
    def test_what_is_no_beginning(self, prefix: str) -> None:
        with pytest.raises(SaccadeError, match=r"^image_urls=.*ends with '/'"):
            ImageAddresses([prefix])


class TestFetch:
    @pytest.mark.parametrize(
        ("name", "reason", "attempts"),
        [
            ("missing.png", "404 Not Found", 1),
            ("short.png", r"\d+ of \d+ bytes arrived", 3),
            ("later.png", "the server answers 202", 3),
        ],
    )
    def test_what_is_not_there_whole_is_not_kept(
        self, server: str, tmp_path: Path, name: str, reason: str, attempts: int
    ) -> None:
        with pytest.raises(RecordError, match=reason) as error:
            ImageAddresses([server], tmp_path / "cache").fetch(server + name)
        assert error.value.kind == "missing_image"
        assert len(Handler.asked) == attempts
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]

    @pytest.mark.parametrize(("name", "kind"), [("page.png", "not_an_image"), ("empty.png", "zero_byte_image")])
    def test_what_is_not_an_image_is_not_kept(self, server: str, tmp_path: Path, name: str, kind: str) -> None:
        with pytest.raises(RecordError, match=f"image '{server}{name}' is ") as error:
            ImageAddresses([server], tmp_path / "cache").fetch(server + name)
        assert error.value.kind == kind
        assert not (tmp_path / "cache").exists()

    def test_every_attempt_through_a_proxy_is_encrypted(self, server: str, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setenv("https_proxy", server)
        monkeypatch.delenv("no_proxy", raising=False)
        addresses._opener.cache_clear()
        try:
            with pytest.raises(RecordError, match="502"):
                ImageAddresses(["https://good.org/"], tmp_path).fetch("https://good.org/a.png")
        finally:
            addresses._opener.cache_clear()
        assert Handler.asked == ["CONNECT good.org:443"] * 3

    @pytest.mark.parametrize("cache", ["", "{tmp}/file", "{tmp}/file/below"])
    def test_a_folder_that_cannot_be_written(self, tmp_path: Path, cache: str) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(SaccadeError, match="image_cache="):
            ImageAddresses(["https://good.org/"], cache.format(tmp=tmp_path))

    def test_a_server_that_fails_is_asked_again(self, server: str, tmp_path: Path) -> None:
        assert Path(ImageAddresses([server], tmp_path).fetch(f"{server}once.png")).read_bytes() == Handler.png

    def test_too_large(self, server: str, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(addresses, "MAX_BYTES", len(Handler.png) - 1)
        with pytest.raises(RecordError, match="it has more than"):
            ImageAddresses([server], tmp_path).fetch(f"{server}a.png")

    def test_a_redirect_within_what_is_permitted(self, server: str, tmp_path: Path) -> None:
        assert Path(ImageAddresses([server], tmp_path).fetch(f"{server}near")).read_bytes() == Handler.png

    def test_a_redirect_to_elsewhere(self, server: str, tmp_path: Path) -> None:
        with pytest.raises(RecordError, match=r"leads to 'http://localhost:\d+/pictures/a.png'") as error:
            ImageAddresses([server], tmp_path).fetch(f"{server}away")
        assert error.value.kind == "outside_image_folders"
        assert Handler.asked == ["/pictures/away"]

    def test_nobody_answers(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(addresses, "_PAUSE", 0.0)
        with pytest.raises(RecordError, match=r"cannot be fetched .*refused"):
            ImageAddresses(["http://127.0.0.1:9/"], tmp_path).fetch("http://127.0.0.1:9/a.png")
