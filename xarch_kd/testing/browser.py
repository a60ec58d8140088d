"""Headless Chromium over a pipe, for tests of pages: no driver, no port, no network."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final

NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT: Final = 90.0
# Chromium reads from descriptor 3 and writes to 4; shells have no way to duplicate one above 9.
START: Final = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, wanted in zip(ends, (3, 4)):
    os.dup2(end, wanted)
os.execv(sys.argv[3], sys.argv[3:])
"""
# Extra space that a page takes beside its window, and elements that are described for readers who do not see them.
MEASURE: Final = """
(() => {
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  const figures = [...document.querySelectorAll("svg, img, canvas")];
  const bare = figures.filter(each => !(each.getAttribute("aria-label") || each.getAttribute("alt")));
  const empty = figures.filter(each => each.getBoundingClientRect().width < 50);
  return {wide, figures: figures.length, bare: bare.length, empty: empty.length, title: document.title,
          width: window.innerWidth, background: getComputedStyle(document.body).backgroundColor,
          text: document.body.innerText};
})()
"""


def find_browser() -> str | None:
    """Return the path of an installed Chromium, None without one."""
    return next((found for name in NAMES if (found := shutil.which(name)) is not None), None)


class Browser:
    """One headless Chromium; `visit` opens a page and measures it at a width and in a color scheme."""

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        command = [
            program,
            *("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"),
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", START, str(to_browser), str(from_browser), *command],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None

    def __enter__(self) -> Browser:
        try:
            target = self._call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(timeout=TIMEOUT)
        os.close(self._in)
        os.close(self._out)

    def visit(self, page: Path, *, width: int, dark: bool = False) -> dict[str, Any]:
        """Return what `MEASURE` finds on the page, and its `requests`, and `errors` of the console."""
        self.events.clear()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self._call("Emulation.setEmulatedMedia", features=scheme)
        self._call("Page.navigate", url=page.as_uri())
        deadline = time.monotonic() + TIMEOUT
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read(deadline))
        found = self._call("Runtime.evaluate", expression=MEASURE, returnByValue=True)["result"]["value"]
        requests = [
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]
        noise = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        errors = [event["params"] for event in self.events if event["method"] in noise]
        return {**found, "requests": requests, "errors": errors}

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + TIMEOUT
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            if "method" in answer:
                self.events.append(answer)

    def _read(self, deadline: float) -> dict[str, Any]:
        """Return the next message. Raises TimeoutError."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._in, 1 << 16) if ready else b""
            if not data:
                raise TimeoutError("Chromium does not answer.")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
