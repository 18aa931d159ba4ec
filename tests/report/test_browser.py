"""The report as a browser shows it: Chromium lays it out in a frame as wide as a phone or a desk, and measures it."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from rowcol_edge.device.profile import Profile
from rowcol_edge.report import reading
from rowcol_edge.report.page import page

from ..profiles import make_operators, make_profile, with_arms
from .test_page import HOSTILE, rich_profile, written

pytestmark = pytest.mark.system("chromium")

WIDTHS = (320, 390, 1280)
POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""

# Runs in the copy of a page that a test shows. What lies in a region that scrolls by itself may be wider than the page,
# what lies in a picture has to stay inside that.
PROBE = """
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (c) => c.slice(0, 3).map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (element) => {
  const circle = element.previousElementSibling;
  if (circle && circle.tagName === "circle") return rgb(getComputedStyle(circle).fill);
  for (let e = element; e; e = e.parentElement) {
    const colour = rgb(getComputedStyle(e).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
addEventListener("load", () => {
  const outside = [], texts = [];
  for (const e of document.body.querySelectorAll("*:not(script)")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const svg = e.closest("svg");
    const box = e.getBoundingClientRect();
    if (svg && e !== svg) {
      const around = svg.getBoundingClientRect();
      const off = box.left < around.left - 1 || box.right > around.right + 1 || box.bottom > around.bottom + 1;
      const others = [...svg.querySelectorAll("text:not(.number)")].map((other) => other.getBoundingClientRect());
      const over = others.filter((o) => o.left < box.right && box.left < o.right
        && o.top + 3 < box.bottom && box.top + 3 < o.bottom);
      // each lies over itself
      if (e.matches("text:not(.number)") && (off || over.length > 1)) outside.push(e.textContent);
    } else if (!e.parentElement.closest(".scroll") && (box.left < -1 || box.right > innerWidth + 1)) {
      outside.push(e.outerHTML.slice(0, 100));
    }
    if (!own || e.matches("title, desc")) continue;
    const style = getComputedStyle(e), drawn = e.tagName === "text";
    const pair = [light(rgb(drawn ? style.fill : style.color)), light(behind(e))].sort((a, b) => b - a);
    const scale = drawn ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    texts.push({
      text: e.textContent.trim().slice(0, 40),
      contrast: (pair[0] + 0.05) / (pair[1] + 0.05),
      pixels: parseFloat(style.fontSize) * scale,
    });
  }
  parent.document.getElementById("told").textContent = JSON.stringify({
    width: innerWidth,
    needed: document.documentElement.scrollWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    paper: light(rgb(getComputedStyle(document.body).backgroundColor)),
    loaded: performance.getEntriesByType("resource").map((entry) => entry.name),
    scripts: document.scripts.length, outside, texts,
  });
});
"""


def chromium(folder: Path, *arguments: str) -> str:
    """Standard output of a run that finds no network."""
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={folder / 'user'}", "--host-resolver-rules=MAP * ~NOTFOUND", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def measure(text: str, folder: Path, width: int, dark: bool) -> dict[str, Any]:
    """What PROBE says of a page in a frame: a window of Chromium's is never as narrow as a phone."""
    framed = text.replace(POLICY, "").replace("</body>", f"<script>{PROBE}</script></body>")
    outer = (
        "<!doctype html><meta charset=utf-8><style>:root { color-scheme: light dark }</style><pre id=told></pre>"
        f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{escape(framed)}"></iframe>'
    )
    (folder / "outer.html").write_text(outer, encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    shown = chromium(folder, scheme, "--window-size=1400,1000", "--dump-dom", f"file://{folder / 'outer.html'}")
    told = re.search(r'<pre id="told">(.*?)</pre>', shown, re.DOTALL)
    assert told, shown[:500]
    found: dict[str, Any] = json.loads(unescape(told[1]))
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report with everything in it, names that are long or hostile, and seven arms."""
    profile = rich_profile()
    arm = profile.arms["factored@int8"]
    names = [HOSTILE, "long-" * 30, "another@fp16", "one-more@int8-dynamic"]
    arms = {**profile.arms, **{name: replace(arm, name=name) for name in names}}
    operators = make_operators(layers=20)
    layers = [HOSTILE, "long-" * 30, *(f"body.{i}" for i in range(18))]
    timed = {
        name: replace(of_arm, layers=tuple(replace(t, layer=n) for t, n in zip(of_arm.layers, layers, strict=True)))
        for name, of_arm in operators.arms.items()
    }
    full: Profile = replace(
        profile, arms=arms, operators=with_arms(operators, timed), target="a" * 80,
        warnings=("w" * 200, *profile.warnings),
    )  # fmt: skip
    return written(tmp_path_factory.mktemp("report"), full, make_profile(evidence="proxy"))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_every_text_is_legible_and_nothing_is_loaded(
    text: str, tmp_path: Path, width: int, dark: bool
) -> None:
    found = measure(text, tmp_path, width, dark)
    assert (found["width"], found["dark"], found["scripts"]) == (width, dark, 1)  # the probe itself
    assert (found["paper"] < 0.05) is dark
    assert found["needed"] <= width
    assert found["outside"] == []
    assert found["loaded"] == []
    assert len(found["texts"]) > 200
    assert [each for each in found["texts"] if each["contrast"] < 4.5] == []
    assert [each for each in found["texts"] if each["pixels"] < 9] == []


def test_the_probe_finds_what_it_looks_for(tmp_path: Path) -> None:
    bad = (
        "<!doctype html><html><body><p style='width: 900px; color: #999'>pale</p>"
        "<img src='http://example.invalid/x.png'></body></html>"
    )
    found = measure(bad, tmp_path, 390, dark=False)
    assert found["needed"] > 390
    assert any("900px" in each for each in found["outside"])
    assert found["loaded"] == ["http://example.invalid/x.png"]
    assert [each["text"] for each in found["texts"] if each["contrast"] < 4.5] == ["pale"]


def test_the_page_itself_runs_no_script(tmp_path: Path) -> None:
    """Its policy holds, whatever a name might smuggle in."""
    (tmp_path / "p.json").write_text(make_profile().to_json(), encoding="utf-8")
    text = page(reading.load([tmp_path / "p.json"]))
    script = "<script>document.body.dataset.ran = 1</script></body>"
    (tmp_path / "with.html").write_text(text.replace("</body>", script), encoding="utf-8")
    (tmp_path / "without.html").write_text(text.replace(POLICY, "").replace("</body>", script), encoding="utf-8")
    ran = [chromium(tmp_path, "--dump-dom", f"file://{tmp_path / name}") for name in ("with.html", "without.html")]
    assert ['data-ran="1"' in shown for shown in ran] == [False, True]
