"""The pages in a real browser, wide and narrow, light and dark: nothing is wider than the page, and nothing complains.

Skipped where no Chromium is installed (``apt-get install chromium``).
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from embrag_ds.cli.main import main
from tests.reports.runs import PROFILE, write_run
from tests.reports.test_imputed_report import NAMES, imputed_at, many_sites
from tests.variants.imputed_files import write

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WIDTHS = (1400, 768, 390, 320)
# Measures each page in a frame of its own, as it is and with everything unfolded.
MEASURE = """<!DOCTYPE html><body><script>
const found = [];
const pages = %s;
addEventListener("load", () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const inside = frame.contentDocument, view = inside.documentElement;
    for (const each of inside.querySelectorAll("details")) each.open = true;
    const wide = [...inside.querySelectorAll("body *")].filter((each) => !each.closest(".box, .plot")
      && each.getBoundingClientRect().right > view.clientWidth + 1).map((each) => each.outerHTML.slice(0, 80));
    const texts = [...inside.querySelectorAll("figure svg")].flatMap((drawing) => {
      const all = drawing.getBoundingClientRect();
      return [...drawing.querySelectorAll("text")].filter((each) => {
        const own = each.getBoundingClientRect();
        return own.left < all.left - 1 || own.right > all.right + 1 || own.bottom > all.bottom + 1;
      }).map((each) => each.textContent);
    });
    // Numbers and names beside the axes; names of dots may cover each other.
    const overlaps = [...inside.querySelectorAll("figure svg")].flatMap((drawing) => {
      const beside = [...drawing.querySelectorAll("text")].filter((each) => each.matches(":not(.name), [transform]"));
      const boxes = beside.map((each) => each.getBoundingClientRect());
      return beside.flatMap((each, one) => beside.slice(one + 1).filter((_, more) => {
        const a = boxes[one], b = boxes[one + 1 + more];
        return a.left < b.right && b.left < a.right && a.top + 1 < b.bottom && b.top + 1 < a.bottom;
      }).map((other) => each.textContent + " | " + other.textContent));
    });
    found.push({width: frame.width, scroll: view.scrollWidth, client: view.clientWidth, wide, texts, overlaps,
      drawings: [...inside.querySelectorAll("figure svg[role=img]")].filter((each) => each.clientHeight > 20).length});
  }
  document.title = JSON.stringify(found);
});
for (const width of %s) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.srcdoc = pages;
  document.body.append(frame);
}
</script></body>"""

pytestmark = [pytest.mark.long, pytest.mark.skipif(BROWSER is None, reason="no Chromium (apt-get install chromium)")]


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Open a file; returns its elements as the browser has them after scripts, and what the browser says."""

    def run(page: Path, *options: str) -> tuple[str, str]:
        command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--enable-logging=stderr"]
        command += [
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=20000",
            *options,
            f"file://{page}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout, done.stderr

    return run


@pytest.fixture(params=["run", "imputed"])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A page of either kind, with long names."""
    out = tmp_path / "page.html"
    if request.param == "run":
        source = write_run(tmp_path / ("a_very_long_name_without_a_blank_" * 4), "failed", "/long/path" * 30)
        (source / "profile.json").write_text(json.dumps(PROFILE))
    else:
        sites = many_sites(scale=2_400)
        samples = [*NAMES[:-1], "sample_" * 12]
        source = write(tmp_path / "out.vcf.gz", sites, imputed_at(sites, "some", True), step=50, samples=samples)
    main(arguments=["report", str(source), f"--out={out}"])
    return out


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_is_wider_than_its_window_and_no_text_leaves_its_drawing(
    browse: Callable[..., tuple[str, str]], page: Path, tmp_path: Path, scheme: str
) -> None:
    content = page.read_text(encoding="utf-8")
    measure = tmp_path / "measure.html"
    text = json.dumps(content).replace("<", "\\u003c")
    measure.write_text(MEASURE % (text, json.dumps(WIDTHS)), encoding="utf-8")
    shown, _ = browse(measure, *(["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []))
    (title,) = re.findall(r"<title>(.*?)</title>", shown.split("<body")[0])
    found = json.loads(html.unescape(title))
    assert [int(each["width"]) for each in found] == list(WIDTHS)
    drawings = content.count('role="img"')
    for each in found:
        assert each["scroll"] <= each["client"] and each["wide"] == [] and each["texts"] == [], each
        assert each["overlaps"] == [], each["overlaps"]
        assert each["drawings"] == drawings > 3


def test_the_browser_has_nothing_to_say(browse: Callable[..., tuple[str, str]], page: Path, tmp_path: Path) -> None:
    _, said = browse(page)
    assert "CONSOLE" not in said, said
    # What would be loaded is refused, and that is said: so the check above can fail.
    faulty = tmp_path / "faulty.html"
    faulty.write_text(page.read_text(encoding="utf-8").replace("</main>", '<img src="x.png"></main>'), encoding="utf-8")
    assert "CONSOLE" in browse(faulty)[1]
