"""A real headless Chromium, driven over its DevTools pipe. No package is needed beside the browser."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_or_install() -> tuple[str | None, str]:
    """(path of the browser or None, why there is none). As root on Debian it is installed from the distribution."""
    for name in NAMES:
        if found := shutil.which(name):
            return found, ""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return None, "no chromium, and it cannot be installed here (not root, or no apt-get)"
    command = "apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-liberation"
    try:
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=500, check=False)
    except subprocess.TimeoutExpired:
        return None, "no chromium, and installing it took longer than 500 s"
    found = shutil.which("chromium")
    return found, "" if found else f"no chromium, and installing it failed: {done.stderr[-300:]}"


class Page:
    """One tab. Everything it asks of the network and every error it reports is kept."""

    def __init__(self, executable: str, *, width: int = 1400, height: int = 1000) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe"
        flags += f" --window-size={width},{height}"
        script = f'exec "$0" {flags} --user-data-dir="$1" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, executable, self._profile.name],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number = b"", 0
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, fragment: str = "", timeout_s: float = 120) -> float:
        """Loads a file and waits until the page says that it is ready; milliseconds from navigation to that."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=f"{path.resolve().as_uri()}{fragment}")
        self.until("document.documentElement?.dataset.ready !== undefined", timeout_s)
        return float(self.js("document.documentElement.dataset.ready"))

    def js(self, expression: str) -> Any:
        """Value of an expression; promises are waited for. AssertionError with the page's own error."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str, timeout_s: float = 60) -> None:
        """Waits until the expression is true; one that fails (its element or the page is not there yet) is not."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if value := self.js(expression):
                    return
            except AssertionError as error:
                value = error
            assert time.monotonic() < deadline, f"never came true: {expression}: {value}; errors: {self.errors}"
            time.sleep(0.05)

    def choose(self, selector: str, text: str) -> None:
        """Picks the option of a <select> whose text starts with `text`."""
        self.js(
            f"""(() => {{
              const s = document.querySelector({json.dumps(selector)});
              const i = [...s.options].findIndex((o) => o.textContent.startsWith({json.dumps(text)}));
              if (i < 0) throw new Error("no such option among " + [...s.options].map((o) => o.textContent));
              s.selectedIndex = i;
              s.dispatchEvent(new Event("change", {{bubbles: true}}));
            }})()"""
        )

    def type(self, selector: str, text: str) -> None:
        """Puts text into an input."""
        self.js(
            f"""(() => {{
              const e = document.querySelector({json.dumps(selector)});
              e.value = {json.dumps(text)};
              e.dispatchEvent(new Event("input", {{bubbles: true}}));
            }})()"""
        )

    def move_to(self, selector: str) -> None:
        """Moves the mouse onto the middle of an element."""
        box = self.js(
            f"""(() => {{
              const e = document.querySelector({json.dumps(selector)});
              e.scrollIntoView({{block: "center"}});
              const b = e.getBoundingClientRect();
              return [b.left + b.width / 2, b.top + b.height / 2];
            }})()"""
        )
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    def screenshot(self, path: Path) -> Path:
        """A PNG of what is in sight."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))
        return path

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._profile.cleanup()

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session and not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 120
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._note(answer)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._in, 1 << 20)
            assert part, f"the browser ended with {self._process.wait()}"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:2000])
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
