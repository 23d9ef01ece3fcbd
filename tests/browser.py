"""A headless Chromium through chromedriver's plain HTTP interface, for tests of pages."""

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

DRIVER, CHROMIUM = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
MISSING = None if DRIVER and CHROMIUM else "no chromium with chromedriver (Debian: apt install chromium-driver)"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--disable-dev-shm-usage",
)  # fmt: skip


class Browser:
    """One window. A context manager: its processes and its profile end with it."""

    def __enter__(self) -> "Browser":
        if MISSING:
            raise FileNotFoundError(MISSING)
        self.profile = tempfile.mkdtemp(prefix="saccade-browser-")
        # Port 0 lets the driver take a free one, so that two test processes do not meet.
        self.process = subprocess.Popen(
            [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.port, self.session = "", ""
        try:
            for line in self.process.stdout:
                if found := re.search(r"started successfully on port (\d+)", line):
                    self.port = found[1]
                    break
            options = {"args": [*FLAGS, f"--user-data-dir={self.profile}"], "binary": CHROMIUM}
            wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
            self.session = self._post("/session", wanted)["sessionId"]
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._send("DELETE", f"/session/{self.session}")
        finally:
            self._end()

    def open(self, page: Path | str, width: int, scheme: str = "light", scale: float = 1) -> None:
        """Show a file or a URL in a window `width` CSS pixels wide, in a colour scheme."""
        metrics = {"width": width, "height": 800, "deviceScaleFactor": scale, "mobile": width < 600}
        self._tools("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._tools("Emulation.setEmulatedMedia", {"features": features})
        self._post(f"/session/{self.session}/url", {"url": page if isinstance(page, str) else page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self._post(f"/session/{self.session}/execute/sync", {"script": script, "args": arguments})

    def type(self, selector: str, keys: str) -> None:
        """Type into the element of a CSS selector; the paths of files, for an input of files."""
        found = self._post(f"/session/{self.session}/element", {"using": "css selector", "value": selector})
        (element,) = found.values()
        self._post(f"/session/{self.session}/element/{element}/value", {"text": keys})

    def click(self, selector: str) -> None:
        """Click on the element of a CSS selector."""
        found = self._post(f"/session/{self.session}/element", {"using": "css selector", "value": selector})
        (element,) = found.values()
        self._post(f"/session/{self.session}/element/{element}/click", {})

    def wait(self, script: str, *arguments: Any, seconds: float = 60) -> Any:
        """What a script returns as soon as that is true.

        Raises:
            TimeoutError: if it is not in time; it has the text of the page.
        """
        end = time.monotonic() + seconds
        while not (found := self.run(script, *arguments)):
            if time.monotonic() > end:
                raise TimeoutError(f"{script}\n{self.run('return document.body.innerText')}")
            time.sleep(0.1)
        return found

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        width, height = self.run("const e = document.documentElement; return [e.clientWidth, e.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        taken = self._tools("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(taken["data"]))

    def _tools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._post(f"/session/{self.session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._send("POST", path, body)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        # Without the proxies of the environment: the driver is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def _end(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)
        shutil.rmtree(self.profile, ignore_errors=True)
