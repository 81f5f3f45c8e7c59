"""Pages as Chromium draws them.

seen = draw(folder / "report.html", tmp_path, width=800)
assert not seen.errors
text = document("http://127.0.0.1:8080", tmp_path)

Set SPARSERAMP_SHOTS to a folder to keep pictures of what `draw` draws, in light and dark.
"""

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium to draw the page with")

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

# Put into a page before its own scripts; what has its own scroll bar may be as wide as it likes.
LOOK = """<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
addEventListener("securitypolicyviolation", event => errors.push(event.blockedURI));
addEventListener("load", () => setTimeout(() => {
  const wide = [...document.querySelectorAll("body *")].filter(element =>
    !element.closest(".scroll, pre, svg") && element.getBoundingClientRect().right > innerWidth);
  if (document.documentElement.scrollWidth > innerWidth) wide.push(document.body);
  const drawn = plot => plot.querySelector(".scatterlayer .trace, .barlayer .trace");
  const found = {errors, too_wide: wide.map(element => element.outerHTML.slice(0, 200)),
    hidden_px: Math.max(0, ...[...document.querySelectorAll(".scroll")].map(
      box => box.scrollWidth - box.clientWidth)),
    num_plots: [...document.querySelectorAll(".plot")].filter(drawn).length,
    links: [...document.querySelectorAll("main a[href]")].map(a => a.getAttribute("href"))};
  document.documentElement.dataset.found = JSON.stringify(found);
}, 500));
</script>"""


@dataclass(frozen=True)
class Seen:
    """What a page made of itself.

    `too_wide` leaves the window; `hidden_px` is the most that a table with its own scroll bar
    hides; plots are those in which something is drawn.
    """

    errors: list[str]
    too_wide: list[str]
    hidden_px: int
    num_plots: int
    links: list[str]


def document(url: str, profile: Path, *flags: str, budget_ms: int = 3000) -> str:
    """The page as its scripts have made it after a time, which stands still while it loads."""
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile / 'profile'}", *flags]
    run = subprocess.run(
        [*command, "--dump-dom", f"--virtual-time-budget={budget_ms}", url],
        capture_output=True,
        timeout=100,
        # It keeps a socket in the temporary folder, whose path may have 107 characters.
        env={name: value for name, value in os.environ.items() if name != "TMPDIR"},
    )
    return run.stdout.decode()


def draw(page: Path, folder: Path, width: int) -> Seen:
    """A file as a window of that width shows it; `folder` is for the browser's own files."""
    looked_at = folder / page.name
    looked_at.write_text(page.read_text(encoding="utf-8").replace("<head>", f"<head>{LOOK}", 1))
    text = document(looked_at.as_uri(), folder, f"--window-size={width},2000")
    if shots := os.environ.get("SPARSERAMP_SHOTS"):
        for name, flag in (("light", ""), ("dark", "--blink-settings=preferredColorScheme=0")):
            shot = f"--screenshot={Path(shots) / f'{page.stem}-{width}-{name}.png'}"
            size = f"--window-size={width},4000"
            document(page.as_uri(), folder, shot, size, *filter(None, [flag]))
    answer = re.search(r'data-found="([^"]*)"', text)
    assert answer, text[-2000:]
    return Seen(**json.loads(html.unescape(answer[1])))
