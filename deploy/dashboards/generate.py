"""Writes the dashboards beside this file, or with --check tells which differ from what would be written."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.dashboards import pages

FOLDER = Path(__file__).resolve().parent


def wanted() -> dict[str, str]:
    """Contents by name of file."""
    return {f"{page.name}.json": page.text() for page in pages.all_pages()}


def check() -> int:
    present = {file.name: file.read_text(encoding="utf-8") for file in FOLDER.glob("*.json")}
    texts = wanted()
    wrong = sorted(name for name in texts.keys() | present.keys() if texts.get(name) != present.get(name))
    for name in wrong:
        how = "differs" if name in texts and name in present else "missing or left over"
        print(f"deploy/dashboards/{name}: {how}")
    if wrong:
        print("run `make dashboards` and commit the result")
    return int(bool(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        return check()
    for name, text in wanted().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
