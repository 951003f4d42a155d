"""For mkdocs: pages stand where they stand in the repository, with all that they lead to, so that their links hold."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
BEGIN = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    *(f"fpo_kernels/{room}/README.md" for room in ("products", "direction", "sketch")),
)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)[^)]*\)")


def on_files(files: Files, *, config: Any) -> Files:
    """The theme's files, the pages below docs/ and those of `BEGIN`, and every file that a page has a link to."""
    own = Path(config.docs_dir)
    pages = [path.relative_to(ROOT).as_posix() for path in own.rglob("*.md")]
    found = Files([file for file in files if Path(file.src_dir or "") != own])
    left, seen = [*BEGIN, *sorted(pages)], set[str]()
    while left:
        if (place := left.pop(0)) in seen:
            continue
        seen.add(place)
        found.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
        if place.endswith(".md"):
            left += led_to(ROOT / place)
    return found


def led_to(page: Path) -> list[str]:
    """The files that a page's links name, from the root; mkdocs itself complains of what is missing."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    there = [(page.parent / link).resolve() for link in LINK.findall(text)]
    return [path.relative_to(ROOT).as_posix() for path in there if path.is_file() and path.is_relative_to(ROOT)]
