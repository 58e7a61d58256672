"""The page in a real browser decodes as torch does, from a server and from file://, without a network."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.browser import WAIT_SECONDS, Handler, chromium, served, wait_for
from codec.snac import snac_levels
from shards.contract import COARSE_48K, flatten_codes, npy_bytes
from shards.errors import UserError
from tests.training_helpers import call
from trainer import web
from trainer.checkpoint import load_codec

for needed in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(needed, reason="`just extras` installs it")

CODES = np.random.default_rng(0).integers(0, 4096, (30, 7)).astype(np.int16)  # three windows of the page
NASTY = "<img src=x onerror=alert(1)> & 'quoted'.npy"


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """onnxruntime-web from npm's cache: tests download nothing."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("npm")
    words = ["npm", "pack", web.PACKAGE, "--silent", "--offline", "--pack-destination", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip(f"{web.PACKAGE} is not in npm's cache: `just web` once puts it there")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def page(untrained: Path, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("web") / "page"
    code, output = call("web", f"model={untrained}", f"out={out}", f"package={package}")
    assert code == 0, output
    assert "stand-in" in output
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium that resolves no host but loopback."""
    pytest.importorskip("selenium", reason="`just extras` installs it")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromium-driver are not installed")
    with chromium("--window-size=1000,1000") as driver:
        yield driver


@pytest.fixture(scope="module", params=["http", "file"])
def opened(request: pytest.FixtureRequest, page: Path, browser: Any) -> Iterator[Any]:
    if request.param == "file":
        browser.get((page / "index.html").as_uri())
        yield ready(browser)
        return
    with served(page, Handler) as url:
        browser.get(url)
        yield ready(browser)


def test_a_package_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is unpacked is what was hashed, whatever lies there by then."""
    package = tmp_path / "ort.tgz"
    with tarfile.open(package, "w:gz") as archive:
        for name in (web.RUNTIME, web.GLUE, web.WASM):
            archive.addfile(tarfile.TarInfo(f"package/dist/{name}"))
    digest = hashlib.sha512(package.read_bytes()).digest()
    monkeypatch.setattr(web, "SHA512", base64.b64encode(digest).decode())

    def hash_and_swap(data: bytes) -> Any:
        package.write_bytes(b"another")
        return sha512(data)

    sha512 = hashlib.sha512
    monkeypatch.setattr(hashlib, "sha512", hash_and_swap)
    assert web.fetch_runtime(package, tmp_path).keys() == {web.RUNTIME, web.GLUE, web.WASM}


def ready(browser: Any) -> Any:
    assert wait_for(browser, {"The decoder is being loaded …"}) == "Ready."
    return browser


def choose(browser: Any, path: Path) -> str:
    """The page's message once it has done with the file."""
    browser.execute_script("say('waiting')")
    browser.find_element("id", "file").send_keys(str(path))
    return wait_for(browser, {"waiting", "Decoding …"})


def test_it_decodes_as_torch_does_and_loads_nothing_else(
    opened: Any, untrained: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    (tmp_path / NASTY).write_bytes(npy_bytes(flatten_codes(CODES)))
    said = choose(opened, tmp_path / NASTY)
    assert "real-time factor" in said, said
    found = np.array(opened.execute_script("return Array.from(window.result.samples)"), np.float32)
    codec = load_codec(untrained)
    with torch.inference_mode():
        expected = codec.decoder(codec.snac.quantizer.from_codes(snac_levels(CODES)))[0, 0].numpy()
    assert len(found) == len(CODES) * COARSE_48K
    assert np.abs(found - expected).max() <= 1e-4
    record_property("real_time_factor", opened.execute_script("return window.result.took / window.result.seconds"))

    assert opened.find_element("id", "name").text == NASTY, "a file's name is text, not markup"
    assert opened.execute_script("return document.images.length") == 0
    assert "stand-in" in opened.find_element("id", "about").text
    colours = "const c = document.getElementById('picture'); return new Set(c.getContext('2d').getImageData(0, 0, "
    assert opened.execute_script(colours + "c.width, c.height).data).size") > 50, "the spectrogram is drawn"
    loaded = opened.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert not [name for name in loaded if not name.startswith(("http://127.0.0.1", "file:", "blob:"))]
    assert not [entry for entry in opened.get_log("browser") if entry["level"] == "SEVERE"]


def test_it_plays_from_the_keyboard_and_saves_a_wav(opened: Any, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    (tmp_path / "a.npy").write_bytes(npy_bytes(flatten_codes(CODES[:2])))
    choose(opened, tmp_path / "a.npy")
    wav = opened.execute_async_script(
        "const done = arguments[0]; fetch(document.getElementById('save').href).then(answer => answer.arrayBuffer())"
        ".then(data => done(Array.from(new Int16Array(data.slice(44)))), error => done(String(error)))"
    )
    samples = np.array(opened.execute_script("return Array.from(window.result.samples)"))
    assert np.abs(np.array(wav) - np.clip(np.round(samples * 32768), -32768, 32767)).max() <= 1
    assert opened.find_element("id", "save").get_attribute("download") == "a.48k.wav"
    player = opened.find_element("id", "player")
    player.send_keys(" ")
    WebDriverWait(opened, WAIT_SECONDS).until(lambda _: player.get_property("ended"))
    assert player.get_property("currentTime") == pytest.approx(2 * COARSE_48K / 48_000, abs=1e-3)
    tabbed = "return document.querySelectorAll('input, audio[controls], a[href]').length"
    assert opened.execute_script(tabbed) == 3
    assert opened.execute_script("return [...document.querySelectorAll('*')].every(e => e.tabIndex <= 0)")


DROP = """
const [name, bytes] = arguments, carried = new DataTransfer();
carried.items.add(new File([Uint8Array.from(bytes)], name));
element("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: carried, cancelable: true }));
"""


def test_of_files_dropped_at_once_the_last_is_shown(opened: Any) -> None:
    opened.execute_script("say('waiting')")
    for length in (30, 2):
        opened.execute_script(DROP, f"{length}.npy", list(npy_bytes(flatten_codes(CODES[:length]))))
    opened.execute_async_script("const done = arguments[0]; work.then(() => done())")
    shown = "return [element('name').textContent, window.result.seconds.toFixed(2), element('seconds').textContent]"
    assert opened.execute_script(shown) == ["2.npy", "0.17", "0.17 s"]
    assert opened.execute_script("return document.querySelector('progress').hidden")


def test_what_plays_stops_when_its_controls_go(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(npy_bytes(flatten_codes(CODES)))
    (tmp_path / "wrong.npy").write_bytes(b"no codes")
    choose(opened, tmp_path / "a.npy")
    opened.execute_script("element('player').loop = true")  # a busy machine may need longer than it lasts
    opened.find_element("id", "player").send_keys(" ")
    assert opened.execute_script("return !element('player').paused")
    assert "not a .npy file" in choose(opened, tmp_path / "wrong.npy")
    assert opened.execute_script("return element('player').paused && element('result').hidden")
    opened.execute_script("element('player').loop = false")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy_bytes(flatten_codes(CODES).astype(np.int64)), "codes are of type <i8, expected <i2 (int16)"),
        (npy_bytes(CODES), "codes are of shape (30, 7), expected one row"),
        (npy_bytes(flatten_codes(CODES)[:-1]), "209 tokens are not T + 2T + 4T"),
        (npy_bytes(flatten_codes(CODES))[:-2], "holds 418 bytes of codes, its header promises 420"),
        (npy_bytes(flatten_codes(np.full_like(CODES, 4096))), "token 4096 found, expected 0 to 4095"),
        (npy_bytes(flatten_codes(np.full_like(CODES, -1))), "token -1 found, expected 0 to 4095"),
        (b"not codes at all", "this is not a .npy file"),
    ],
)
def test_a_wrong_file_is_refused_by_name(
    browser: Any, opened: Any, tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "wrong <b>.npy").write_bytes(content)
    said = choose(opened, tmp_path / "wrong <b>.npy")
    assert said.startswith("wrong <b>.npy: ")
    assert reason in said


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(opened: Any, scheme: str) -> None:
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 360
        back = opened.execute_script("return getComputedStyle(document.body, null).color")
        bright = sum(int(part) for part in back.removeprefix("rgb(").removesuffix(")").split(",")) > 384
        assert bright == (scheme == "dark"), "light text on dark, dark text on light"
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_another_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tgz").write_bytes(b"something else")
    with pytest.raises(UserError, match="it is not the published onnxruntime-web"):
        web.fetch_runtime(tmp_path / "a.tgz", tmp_path)


def test_without_npm_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"npm is not installed: install Node\.js, or name the \.tgz"):
        web.fetch_runtime(None, tmp_path)
