"""The report in a browser: playing, switching, sorting, the blind test, keys, sizes and colours."""

from __future__ import annotations

import csv
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import scipy.stats
import soundfile

from benchmarks.browser import chromium
from tests.helpers import speechlike
from tests.test_report import EVIL_KEYS, EVIL_SYSTEM, data_of, evaluate_and_report

pytest.importorskip("jinja2", reason="needs the extra report: just extras")
selenium = pytest.importorskip("selenium", reason="needs the group extras-tests: just extras")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("needs a browser: apt-get install chromium chromium-driver", allow_module_level=True)

from selenium.webdriver import Chrome, Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402

# What sounds, and when sources were started: the page itself knows nothing of this.
SPY = """
window.starts = []; window.gains = [];
const start = AudioBufferSourceNode.prototype.start;
AudioBufferSourceNode.prototype.start = function (when, offset) {
  window.starts.push([when, offset]); return start.call(this, when, offset);
};
const connect = AudioNode.prototype.connect;
AudioNode.prototype.connect = function (to, ...more) {
  if (to instanceof AudioDestinationNode && this instanceof GainNode) {
    window.analyser ??= new AnalyserNode(this.context, { fftSize: 8192 });
    window.gains.push(this);
    connect.call(this, window.analyser);
  }
  return connect.call(this, to, ...more);
};
window.heard = () => {
  const wave = new Float32Array(8192);
  window.analyser.getFloatTimeDomainData(wave);
  return Math.sqrt(wave.reduce((sum, x) => sum + x * x, 0) / wave.length);
};
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    still = "--force-prefers-reduced-motion"  # no smooth scrolling under the pointer
    with chromium("--disable-gpu", "--hide-scrollbars", still, "--window-size=1280,900") as driver:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": SPY})
        folder = str(tmp_path_factory.mktemp("downloads"))
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": folder})
        driver.downloads = Path(folder)
        yield driver


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips of two seconds, whose names are as unkind as names can be."""
    folder = tmp_path_factory.mktemp("browser")
    for number, key in enumerate(EVIL_KEYS):
        path = folder / "audio" / f"{key}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, speechlike(2.0, 48_000, number), 48_000)
    shutil.copytree(folder / "audio", folder / "other")
    return evaluate_and_report([f"audio={folder / 'audio'}", f"systems.{EVIL_SYSTEM}={folder / 'other'}"], folder)


@pytest.fixture
def page(browser: Chrome, file: Path) -> Iterator[Chrome]:
    """Freshly opened; afterwards the console must be silent and nothing may have been asked of a network."""
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(file.as_uri())
    until(browser, "document.readyState === 'complete'")  # on a busy machine get() has come back while it was loading
    yield browser
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("file://", "data:", "blob:"))] == []
    assert browser.execute_script("return window.hacked") is None


def until(page: Chrome, condition: str, seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := page.execute_script(f"return {condition}")):
        assert time.monotonic() < end, f"never: {condition}"
        time.sleep(0.05)
    return found


def css(page: Chrome, selector: str) -> WebElement:
    return page.find_element("css selector", selector)


def texts(page: Chrome, selector: str) -> list[str]:
    found: list[str] = page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent)", selector
    )
    return found


def keys(page: Chrome, *words: str) -> None:
    for word in words:
        page.switch_to.active_element.send_keys(word)


def position(page: Chrome, clip: int = 0) -> float:
    return float(page.execute_script(f"return document.querySelectorAll('.seek')[{clip}].value"))


def pressed(page: Chrome, clip: int = 0) -> str:
    script = f"return document.querySelectorAll('.clip')[{clip}].querySelector('[aria-pressed=true]').dataset.system"
    return str(page.execute_script(script))


def audible(page: Chrome) -> int:
    return int(page.execute_script("return window.gains.filter((node) => node.gain.value > 0).length"))


# Where the first clip is shown to be, and where it is, by the clock of what sounds and in one frame.
RUNNING = """
const done = arguments[0], { context } = window.gains[0], [when, offset] = window.starts[0];
requestAnimationFrame(() =>
  done([Number(document.querySelector(".seek").value), (offset + context.currentTime - when) % 2]));
"""


def test_playing_sounds_and_switching_keeps_the_position(page: Chrome) -> None:
    assert css(page, "h1").text == "Recordings of audio"
    assert set(texts(page, "h3[id^=clip]")) == {f"{key}.wav" for key in EVIL_KEYS}
    css(page, ".play").click()
    until(page, "window.analyser && window.heard() > 0.01")
    assert pressed(page) == "stock"
    until(page, "document.querySelector('.seek').value > 0.1")
    starts = page.execute_script("return window.starts")
    assert len(starts) == 4
    assert all(start == starts[0] for start in starts), "all versions start together"
    assert audible(page) == 1
    buttons = page.find_elements("css selector", ".clip:first-of-type .version")
    for button in (buttons[3], buttons[1], buttons[2]):
        button.click()
        until(page, "window.gains.filter((node) => node.gain.value > 0).length === 1")
        assert pressed(page) == button.get_attribute("data-system")
        until(page, "window.heard() > 0.005")
    assert page.execute_script("return window.starts.length") == 4, "switching starts nothing anew"
    shown, heard = page.execute_async_script(RUNNING)
    assert abs((shown - heard + 1) % 2 - 1) < 0.05, "it ran on"
    css(page, ".play").click()
    stopped = position(page)
    time.sleep(0.2)
    assert position(page) == stopped


def test_everything_works_from_the_keyboard(page: Chrome) -> None:
    body = css(page, "body")
    body.send_keys(" ")
    until(page, "window.analyser && document.querySelector('.clip').classList.contains('playing')")
    body.send_keys("4")
    assert pressed(page) == "target"
    body.send_keys("2")
    assert pressed(page) == "warm_start"
    body.send_keys(" ")
    until(page, "!document.querySelector('.clip').classList.contains('playing')")
    page.execute_script(
        "document.querySelector('.seek').value = 1; document.querySelector('.seek').dispatchEvent(new Event('input'))"
    )
    body.send_keys(Keys.ARROW_RIGHT)
    assert position(page) == pytest.approx(1.5, abs=0.02)
    body.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert position(page) == pytest.approx(0.5, abs=0.02)
    body.send_keys("n")
    keys(page, "3")
    assert pressed(page, 1) == EVIL_SYSTEM
    assert pressed(page, 0) == "warm_start"
    assert page.switch_to.active_element.get_attribute("aria-label") == f"Play {sorted(EVIL_KEYS)[1]}.wav"


def test_keys_belong_to_the_clip_that_has_the_focus(page: Chrome) -> None:
    page.execute_script("document.querySelectorAll('.play')[2].focus()")
    keys(page, "4")
    assert [pressed(page, clip) for clip in range(4)] == ["stock", "stock", "target", "stock"]
    page.execute_script("document.querySelectorAll('.seek')[1].focus()")
    keys(page, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert [position(page, clip) for clip in range(4)] == pytest.approx([0, 1, 0, 0]), "half a second each"


def test_switching_draws_no_more_often(page: Chrome) -> None:
    page.execute_script("""
        const request = window.requestAnimationFrame;
        window.drawn = 0;
        window.requestAnimationFrame = (draw) => request((time) => { window.drawn += 1; draw(time); });
    """)
    css(page, ".play").click()
    until(page, "window.drawn > 0")
    page.execute_script("for (let n = 0; n < 50; n++) document.querySelector('.version').click()")
    script = """
        const done = arguments[0], before = window.drawn;
        let frames = 0;
        const count = () => (++frames < 10 ? requestAnimationFrame(count) : done((window.drawn - before) / frames));
        requestAnimationFrame(count);
    """
    assert page.execute_async_script(script) < 3, "once a frame, and this count itself"


def test_without_loop_it_ends(page: Chrome) -> None:
    css(page, "#loop").click()
    css(page, ".play").click()
    until(page, "window.starts.length")
    until(page, "!document.querySelector('.clip').classList.contains('playing')")
    assert position(page) == pytest.approx(2.0, abs=0.01)


def test_audio_that_cannot_be_played_says_so(page: Chrome) -> None:
    page.execute_script("""
        const audio = document.getElementById("audio-0");
        const versions = JSON.parse(audio.textContent);
        for (const name of Object.keys(versions)) versions[name] = btoa("no audio at all");
        audio.textContent = JSON.stringify(versions);
    """)
    assert not css(page, "#trouble").is_displayed()
    css(page, ".play").click()
    until(page, "document.getElementById('trouble').textContent.startsWith('This browser cannot play the audio')")
    assert css(page, "#trouble").is_displayed()
    page.get_log("browser")  # it reports the same


def test_one_clip_at_a_time(page: Chrome) -> None:
    first, second = page.find_elements("css selector", ".play")[:2]
    first.click()
    until(page, "document.querySelector('.clip').classList.contains('playing')")
    second.click()
    until(page, "document.querySelectorAll('.clip')[1].classList.contains('playing')")
    assert len(page.find_elements("css selector", ".clip.playing")) == 1


def column(page: Chrome, table: str, place: int) -> list[float]:
    rows = f"[...document.querySelector('{table}').tBodies[0].rows]"
    return [
        float(value) for value in page.execute_script(f"return {rows}.map((r) => r.children[{place}].dataset.value)")
    ]


@pytest.mark.parametrize("table", ["#means", "#by-clip"])
def test_headings_sort(page: Chrome, table: str) -> None:
    heading = page.find_elements("css selector", f"{table} thead th")[1]
    values = column(page, table, 1)
    heading.find_element("css selector", "button").click()
    assert column(page, table, 1) == sorted(values)
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.find_element("css selector", "button").click()
    assert column(page, table, 1) == sorted(values, reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"
    css(page, f"{table} thead th button").click()
    assert css(page, f"{table} thead th").get_attribute("aria-sort") == "ascending"
    assert heading.get_attribute("aria-sort") == "none"


def test_the_table_of_clips_shows_the_chosen_metric(page: Chrome) -> None:
    assert set(texts(page, "#by-clip tbody th")) == {f"{key}.wav" for key in EVIL_KEYS}
    lsd = column(page, "#by-clip", 1)
    css(page, "#clip-metric option[value=level_db]").click()
    assert column(page, "#by-clip", 1) != lsd
    assert texts(page, "#by-clip thead th")[3] == EVIL_SYSTEM


def test_a_blind_test_keeps_score_and_saves_it(page: Chrome) -> None:
    page.execute_script("localStorage.clear()")
    page.refresh()
    css(page, "#blind-one option[value=stock]").click()
    css(page, "#blind-two option[value=target]").click()
    css(page, "#blind-start").click()
    assert not css(page, ".vote[data-choice=a]").is_enabled()
    answers = [(Keys.ARROW_LEFT, "a"), (Keys.ARROW_RIGHT, "b"), (Keys.ARROW_DOWN, "none"), (Keys.ARROW_LEFT, "a")]
    for number, (key, _) in enumerate(answers, start=1):
        assert css(page, "#blind-state").text.startswith(f"Trial {number}.")
        keys(page, key)
        assert css(page, "#blind-state").text.startswith(f"Trial {number}."), "no answer before both were heard"
        keys(page, "a")
        until(page, "document.getElementById('blind-a').getAttribute('aria-pressed') === 'true'")
        keys(page, "t", "b")
        until(page, "!document.querySelector('.vote').disabled")
        until(page, "window.heard() > 0.001")
        keys(page, key)
        assert not css(page, ".score").is_displayed(), "it would tell which was which"
    css(page, "#blind-result summary").click()
    score = css(page, ".score").text
    page.refresh()
    css(page, "#blind-result summary").click()
    assert css(page, ".score").text == score, "answers outlive the page"
    css(page, "#blind-csv").click()
    path = page.downloads / "blind_test.csv"  # type: ignore[attr-defined]
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end, "nothing was saved"
        time.sleep(0.05)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["choice"] for row in rows] == [choice for _, choice in answers]
    assert {row["clip"].removeprefix("'") for row in rows} == set(EVIL_KEYS), "each clip once before any twice"
    assert any(row["clip"] == "'=1+1" for row in rows), "no formula for a spreadsheet"
    for row in rows:
        assert {row["a"], row["b"]} == {"stock", "target"}
        assert row["preferred"] == {"a": row["a"], "b": row["b"], "none": ""}[row["choice"]]
        assert row["target_heard"] == "true"
    wins = {name: sum(row["preferred"] == name for row in rows) for name in ("stock", "target")}
    labels = {"stock": "stock 24 kHz + sinc", "target": "target: the recording"}
    counted = ", ".join(f"{label} {wins[name]}" for name, label in labels.items())
    by_clips = " to ".join(str(number) for number in wins.values())
    p = scipy.stats.binomtest(wins["stock"], 3).pvalue
    assert score == f"Preferred: {counted}; no difference 1 · by clips {by_clips}, sign test p = {p:.3f}"
    css(page, "#blind-reset").click()
    assert not page.find_elements("css selector", ".score")


def test_a_blind_test_takes_clips_that_hold_both_versions(page: Chrome, file: Path, tmp_path: Path) -> None:
    text = file.read_text()
    held = data_of(text)
    for clip in held["clips"][1:]:
        del clip["versions"][0]  # stock
    pattern = re.compile(r'(<script type="application/json" id="data">).*?(?=</script>)', re.DOTALL)
    partly = tmp_path / "report.html"
    partly.write_text(pattern.sub(lambda m: m[1] + json.dumps(held).replace("<", "\\u003c"), text))
    page.get(partly.as_uri())
    page.execute_script("localStorage.clear()")
    css(page, "#blind-start").click()
    for _ in range(3):
        keys(page, "a", "b")
        until(page, "!document.querySelector('.vote').disabled")
        keys(page, Keys.ARROW_LEFT)
    answers = page.execute_script("return JSON.parse(Object.values(localStorage)[0])")
    assert [answer["clip"] for answer in answers] == 3 * [held["clips"][0]["key"]]
    css(page, "#blind-result summary").click()
    score = css(page, ".score").text
    assert score.endswith((" · by clips 1 to 0, sign test p = 1.000", " · by clips 0 to 1, sign test p = 1.000")), score
    css(page, "#blind-one option[value=warm_start]").click()
    css(page, "#blind-start").click()
    assert css(page, "#blind-state").text.startswith("Trial 4.")


def test_a_choice_amid_a_blind_test_waits_for_start(page: Chrome) -> None:
    page.execute_script("localStorage.clear()")
    page.refresh()
    css(page, "#blind-start").click()
    chosen = [css(page, f"#blind-{place}").get_attribute("value") for place in ("one", "two")]
    css(page, f"#blind-two option[value={chosen[0]}]").click()
    for _ in range(2):
        css(page, "#blind-a").click()
        css(page, "#blind-b").click()
        until(page, "!document.querySelector('.vote').disabled")
        css(page, ".vote[data-choice=none]").click()
    answers = page.execute_script("return JSON.parse(Object.values(localStorage)[0])")
    assert [{answer["a"], answer["b"]} for answer in answers] == 2 * [set(chosen)]


def test_the_same_version_is_not_compared_with_itself(page: Chrome) -> None:
    css(page, "#blind-two option[value=stock]").click()
    css(page, "#blind-start").click()
    assert css(page, "#blind-state").text == "Choose two different versions."
    assert not css(page, "#blind-a").is_displayed()


def test_every_control_and_picture_has_a_name(page: Chrome) -> None:
    css(page, "#blind-start").click()
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "slider", "combobox", "checkbox", "image", "link", "region", "table"}
    found = [node for node in nodes if node.get("role", {}).get("value") in roles and not node.get("ignored")]
    assert len(found) > 40
    assert [node for node in found if not node["name"]["value"] and node["role"]["value"] != "table"] == []


def test_a_phone_needs_no_sideways_scrolling(page: Chrome) -> None:
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.refresh()
        long = "for (const option of document.querySelectorAll('option')) option.textContent += ' and on'.repeat(20);"
        assert page.execute_script(long + "return document.documentElement.scrollWidth") <= 360
        for button in page.find_elements("css selector", ".play, .version, #blind-start"):
            assert min(button.size["width"], button.size["height"]) >= 32, "large enough for a finger"
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


CONTRAST = """
const channels = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255);
const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const luminance = (colour) =>
  channels(colour).map(linear).reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
const behind = (element) => {
  const colour = getComputedStyle(element).backgroundColor;
  return colour !== "rgba(0, 0, 0, 0)" || !element.parentElement ? colour : behind(element.parentElement);
};
return [...document.querySelectorAll(arguments[0])].filter((element) => element.checkVisibility()).map((element) => {
  const [a, b] = [getComputedStyle(element).color, behind(element)].map(luminance).sort((x, y) => y - x);
  return [element.className || element.tagName, (a + 0.05) / (b + 0.05)];
});
"""
TEXTS = "h1, .lead, .note, .banner, nav a, .name, kbd, small, thead button, .primary, summary, .star"


def test_where_the_system_chooses_colours_controls_still_show(page: Chrome) -> None:
    """As with Windows' high contrast: it takes away backgrounds, of which a play button and a choice were made."""
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "forced-colors", "value": "active"}]})
    try:
        css(page, "#blind-start").click()
        css(page, "#blind-a").click()
        colours = "return [...document.querySelectorAll(arguments[0])].map((e) => getComputedStyle(e)[arguments[1]])"
        icon, button = (page.execute_script(colours, name, "backgroundColor")[0] for name in (".icon", ".play"))
        assert icon != button
        for chosen, other in (("#blind-a", "#blind-b"), (".version[aria-pressed=true]", ".version:last-child")):
            assert page.execute_script(colours, chosen, "border") != page.execute_script(colours, other, "border")
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_by_day_and_by_night(page: Chrome, scheme: str, tmp_path: Path) -> None:
    """Contrast of 4.5 to 1, as WCAG asks; and a screenshot that shows something."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    contrasts = page.execute_script(CONTRAST, TEXTS)
    assert len(contrasts) > 20
    assert [(name, ratio) for name, ratio in contrasts if ratio < 4.5] == []
    path = tmp_path / f"{scheme}.png"
    assert page.save_screenshot(str(path))
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] == 1280
    corner = picture[5, 5, :3].mean()
    assert corner > 0.9 if scheme == "light" else corner < 0.15
    assert picture[..., :3].std() > 0.05
