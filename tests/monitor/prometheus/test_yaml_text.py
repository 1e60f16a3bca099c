"""YAML text: what an independent parser reads is what was written."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from equipoise.monitor.prometheus.yaml_text import to_yaml

ASCII = st.text(st.characters(max_codepoint=127), max_size=20)
SCALARS = ASCII | st.integers() | st.booleans()
DATA = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ASCII, inner, max_size=4))


@given(DATA)
def test_it_reads_as_it_was_written(data):
    assert yaml.safe_load(to_yaml(data)) == data


@pytest.mark.parametrize(
    "text", ["no", "1e3", "2024-01-01", "~", "", "a: b", "# a", "- a", '"', "\n", "\t", "{{ $x }}"]
)
def test_text_stays_text(text):
    assert yaml.safe_load(to_yaml({text: [text, {text: text}]})) == {text: [text, {text: text}]}


def test_how_it_looks():
    text = to_yaml({"groups": [{"name": "a", "rules": [{"for": "5m"}, {"labels": {}}]}], "size": 3})
    assert text == ('groups:\n  - name: "a"\n    rules:\n      - for: "5m"\n      - labels: {}\nsize: 3\n')


@pytest.mark.parametrize(
    ("data", "got"), [([1.5], "got 1.5; write it as text"), ({"a": "\u00e9"}, "write it in ASCII")]
)
def test_what_it_does_not_write(data, got):
    with pytest.raises(ValueError, match=f"yaml: expected .*{got}"):
        to_yaml(data)
