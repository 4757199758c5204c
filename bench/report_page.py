"""The report of a large model in a browser: its size, how long it takes to open, and pictures. See README.md here.

python bench/report_page.py --chromium /usr/bin/chromium [--pictures docs]

It needs chromium. The model is DeepSeek-V4-Flash by its recorded headers, with errors that are made up: 69,187 tensors
of its source, 35,020 rows; and the same rows once more under other names, so that there are 60,000.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

import shardq
from shardq.html_report.facts import Facts, read_facts
from shardq.html_report.names import place_of
from shardq.html_report.page import draw_report

TESTS: Final = Path(__file__).parents[1] / "tests"
ROWS: Final = 60_000
RUNS: Final = 5
FLAGS: Final = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--hide-scrollbars",
)  # fmt: skip
DARK: Final = "--blink-settings=preferredColorScheme=0"
CLOCK: Final = (
    "<script>addEventListener('load',()=>setTimeout(()=>{document.body.dataset.ms=performance.now();"
    "document.body.dataset.rows=document.querySelectorAll('#table tbody tr').length},0))</script></body>"
)
PICTURES: Final = (
    ("report.png", (1100, 1500), False),
    ("report-dark.png", (1100, 1500), True),
    ("report-phone.png", (400, 1100), False),
)


def read_large(work: Path) -> Facts:
    """Facts of an output of the recorded model."""
    sys.path.insert(0, str(TESTS / "unit"))
    from hollow_outputs import write_hollow

    dump = TESTS / "data" / "hub_index" / "deepseek-v4-flash"
    plan = shardq.plan_headers(dump, shardq.make_recipe("W4A16", group_size=32))
    write_hollow(plan, work / "DeepSeek-V4-Flash-W4A16")
    return read_facts(str(work / "DeepSeek-V4-Flash-W4A16"))


def grow(facts: Facts) -> Facts:
    """ROWS of them."""
    more = tuple(replace(r, name=f"more.{r.name}", place=place_of(f"more.{r.name}")) for r in facts.rows)
    return replace(facts, rows=(facts.rows + more)[:ROWS])


def run(chromium: str, *words: str) -> str:
    """What chromium prints."""
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, *FLAGS, f"--user-data-dir={profile}", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def main() -> None:
    """Print the figures, and make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shardq-bench-") as temporary:
        work = Path(temporary)
        facts = read_large(work)
        for name, chosen in (("model", facts), ("60000", grow(facts))):
            began = time.process_time()
            text = draw_report(chosen)
            drawn_s = time.process_time() - began
            page = work / f"{name}.html"
            page.write_text(text, encoding="utf-8")
            timed = work / f"{name}-timed.html"
            timed.write_text(text.replace("</body>", CLOCK), encoding="utf-8")
            shown = [run(args.chromium, "--dump-dom", timed.as_uri()) for _ in range(RUNS)]
            found = [re.search(r'data-ms="([\d.]+)" data-rows="(\d+)"', text) for text in shown]
            opened = [float(m[1]) for m in found if m and m[2] == "200"]
            assert len(opened) == RUNS, "a page did not fill its table"
            print(
                f"{len(chosen.rows)} rows: {len(text.encode()) / 1e6:.2f} MB, drawn in {drawn_s:.1f} CPU-s, opened in "
                f"{statistics.median(opened):.0f} ms ({min(opened):.0f} to {max(opened):.0f})"
            )
        for name, (width, height), dark in PICTURES if args.pictures else ():
            shot = f"--screenshot={(args.pictures / name).resolve()}"
            words = [shot, f"--window-size={width},{height}", *([DARK] if dark else [])]
            run(args.chromium, *words, (work / "model.html").as_uri())


if __name__ == "__main__":
    main()
