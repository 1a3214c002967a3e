"""Checks that relative links in Markdown files lead to files and headings that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Anchors of headings as code hosts make them."""
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(FENCE.sub("", text)))
    return {heading.strip().replace(" ", "-") for heading in kept}


def broken(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    wrong = []
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        missing_anchor = False
        if anchor and goal.suffix == ".md" and goal.exists():
            missing_anchor = anchor not in anchors(goal.read_text(encoding="utf-8"))
        if missing_anchor or not goal.exists():
            wrong.append(f"{page.relative_to(ROOT)}: {target}")
    return wrong


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    wrong = [line for name in listed if (ROOT / name).exists() for line in broken(ROOT / name)]
    print("\n".join(wrong) if wrong else f"links of {len(listed)} pages are fine")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
