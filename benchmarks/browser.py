"""How fast does the page decode, and does it say what torch says? At the true size (random weights), in Chromium.

Needs chromium and chromium-driver. Served plainly the page has one thread, with the headers that isolate it up to four.
Beside it: the step decoder of `just decode`.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch

from benchmarks.decoding import true_size_48k
from benchmarks.harness import report
from codec.snac import snac_levels
from shards.contract import CODEBOOK_SIZE, TOKENS, flatten_codes, npy_bytes
from trainer.decode import StreamingDecoder
from trainer.inference import StepDecoder
from trainer.web import write_page

COARSE = 47  # 4 s
WAIT_SECONDS = 120


class Handler(SimpleHTTPRequestHandler):
    isolated = False

    def log_message(self, *_: Any) -> None:
        pass

    def end_headers(self) -> None:
        if self.isolated:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


class IsolatedHandler(Handler):
    isolated = True


@contextmanager
def served(folder: Path, handler: type[Handler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()


@contextmanager
def chromium(*arguments: str) -> Iterator[Any]:
    """Headless, by its driver; resolves no host but loopback."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", *arguments):
        options.add_argument(argument)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options, Service(shutil.which("chromedriver")))
    driver.set_script_timeout(WAIT_SECONDS)
    try:
        yield driver
    finally:
        driver.quit()


def wait_for(browser: Any, passing: set[str]) -> str:
    """The page's message once it is none of `passing`."""
    from selenium.webdriver.support.ui import WebDriverWait

    def message(driver: Any) -> str:
        return str(driver.execute_script("return document.getElementById('message').textContent"))

    WebDriverWait(browser, WAIT_SECONDS).until(lambda driver: message(driver) not in passing)
    return message(browser)


def decoded(browser: Any, url: str, codes: Path) -> tuple[float, float, np.ndarray[Any, Any]]:
    """Seconds until the page was ready, seconds of decoding, samples."""
    began = time.perf_counter()
    browser.get(url)
    assert wait_for(browser, {"The decoder is being loaded …"}) == "Ready."
    loaded = time.perf_counter() - began
    for _ in range(2):  # the first time warms up
        browser.execute_script("say('waiting')")
        browser.find_element("id", "file").send_keys(str(codes))
        said = wait_for(browser, {"waiting", "Decoding …"})
        assert "real-time factor" in said, said
        browser.execute_script("document.getElementById('file').value = ''")
    took = float(browser.execute_script("return window.result.took"))
    return loaded, took, np.array(browser.execute_script("return Array.from(window.result.samples)"), np.float32)


@click.command(help=__doc__)
@click.option("--runtime", type=click.Path(exists=True, path_type=Path), help="onnxruntime-web's .tgz")
def main(runtime: Path | None) -> None:
    codec = true_size_48k()
    codes = np.random.default_rng(0).integers(0, CODEBOOK_SIZE, (COARSE, TOKENS)).astype(np.int16)
    with torch.inference_mode():
        expected = codec.decoder(codec.snac.quantizer.from_codes(snac_levels(codes)))[0, 0].numpy()
    seconds = len(expected) / 48_000
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as temporary, chromium() as browser:
        page, path = Path(temporary) / "page", Path(temporary) / "codes.npy"
        write_page(codec, page, runtime)
        path.write_bytes(npy_bytes(flatten_codes(codes)))
        for way, handler in (("page, one thread", Handler), ("page, isolated", IsolatedHandler)):
            with served(page, handler) as url:
                loaded, took, samples = decoded(browser, url, path)
            difference = float(np.abs(samples - expected).max())
            rows.append({"way": way, "ready_seconds": loaded, "real_time_factor": took / seconds, "apart": difference})
    model = StepDecoder(codec.snac, codec.decoder)
    for _ in range(2):
        began = time.perf_counter()
        stream = StreamingDecoder(model)
        samples = np.concatenate([stream.push(codes)[0], stream.finish()[0]])
        took = time.perf_counter() - began
    difference = float(np.abs(samples - expected).max())
    rows.append({"way": "just decode stream=true", "real_time_factor": took / seconds, "apart": difference})
    report("browser", rows, seconds_of_audio=seconds, peak=float(np.abs(expected).max()))


if __name__ == "__main__":
    main()
