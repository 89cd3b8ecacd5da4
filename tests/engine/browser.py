"""Headless Chromium, driven through pipes: real layout, real keys."""

import base64
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40}


class Browser:
    """One page.

    Args:
        profile: An empty folder for the browser's own files.
    """

    def __init__(self, profile: Path) -> None:
        asked, self._ask = os.pipe()
        self._told, told = os.pipe()
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            "--no-first-run",
        ]
        # The browser reads commands on 3 and answers on 4.
        wired = f'exec "$0" "$@" 3<&{asked} 4>&{told}'
        self._process = subprocess.Popen(
            ["bash", "-c", wired, CHROMIUM, *options, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(asked, told),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(asked), os.close(told)
        self._rest, self._numbers, self._session = b"", itertools.count(1), {}
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        found = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": found["sessionId"]}

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **self._session}
        os.write(self._ask, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                piece = os.read(self._told, 1 << 16)
                assert piece, "the browser is gone"
                self._rest += piece
            first, self._rest = self._rest.split(b"\0", 1)
            answer = json.loads(first)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path: Path, width: int, height: int = 900) -> None:
        """Show a file in a window of so many pixels, and wait until it is laid out."""
        mobile = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        self.call("Page.navigate", url=path.resolve().as_uri())
        loaded = "new Promise(r => document.readyState == 'complete' ? r(1) : addEventListener('load', () => r(1)))"
        while self.ask("location.protocol") != "file:" or not self.ask(loaded):
            pass

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys by name; others are typed as text."""
        for key in keys:
            if key not in KEYS:
                self.call("Input.insertText", text=key)
                continue
            code = {"key": key, "windowsVirtualKeyCode": KEYS[key]}
            text = {"Enter": {"text": "\r"}, " ": {"text": " "}}.get(key, {})
            self.call("Input.dispatchKeyEvent", type="keyDown", **code, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ask), os.close(self._told)
