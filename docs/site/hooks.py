"""MkDocs hooks: pages and files from outside docs/, their links, and the messages of lesa.

The pages are written for a reader of the repository, where a link leads from file to file. Here
each file outside docs/ that a page links is published too, at its place in the repository, programs
as pages, and a link to README leads to the first page.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from messages import write_messages  # noqa: E402  # beside this file, which is no package
from programs import PROGRAMS, page_uri, program_page  # noqa: E402

ROOT = Path(__file__).parents[2]
MESSAGES = "troubleshooting.md"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
HOME = "README.md", "index.md"  # in the repository, on the site


def site_path(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path.endswith(PROGRAMS):
        return page_uri(path)
    return HOME[1] if path == HOME[0] else path.removeprefix("docs/")


def source(uri: str) -> str:
    """Where a page of the site is in the repository."""
    return uri if (ROOT / uri).exists() else f"docs/{uri}"


def linked(uri: str, text: str) -> list[str]:
    """The files of the repository that a page links."""
    folder = posixpath.dirname(source(uri))
    return [posixpath.normpath(posixpath.join(folder, target)) for target in LINK.findall(text)]


def on_files(files: Files, config: Any) -> Files:
    """Adds what pages and the navigation name and docs/ does not hold."""
    named = re.findall(r"[\w./-]+\.md", str(config.nav))
    open_ends = [uri for uri in named if files.get_file_from_path(uri) is None]
    for file in files.documentation_pages():
        open_ends += linked(file.src_uri, file.content_string)
    while open_ends:
        path = open_ends.pop()
        uri, place = site_path(path), ROOT / path
        if not place.is_file() or files.get_file_from_path(uri):
            continue
        if path.endswith(PROGRAMS):
            made = {"content": program_page(path, place.read_text(encoding="utf-8"))}
        else:
            made = {"abs_src_path": str(place)}
        file = File.generated(config, uri, **made)
        files.append(file)
        if file.is_documentation_page() and not path.endswith(PROGRAMS):
            open_ends += linked(uri, file.content_string)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files become links between pages; details may hold tables."""
    uri = page.file.src_uri
    if page.file.abs_src_path is None:  # the page of a program
        return markdown
    folder, here = posixpath.dirname(source(uri)), posixpath.dirname(uri)

    def moved(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, found[0]))
        return posixpath.relpath(site_path(path), here or ".")

    text = LINK.sub(moved, markdown).replace("<details>", '<details markdown="1">')
    if uri != MESSAGES:
        return text
    page.meta["search"] = {"boost": 4}  # who searches for a sentence has got it from lesa
    return write_messages(text)
