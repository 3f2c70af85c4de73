"""Prompt files."""

import pytest

from tests.bad_inputs.cases import Case


def of_file(name: str, content: str | bytes | None, sentence: str) -> Case:
    """Training on a prompt file."""
    return Case(f"train RECIPE prompts.train=HERE/{name}", sentence, {} if content is None else {name: content})


CASES = [
    Case(
        "train RECIPE prompts.train=HERE/a.txt",
        "something else entirely",
        {"a.txt": "something else entirely"},
        begun=True,
    ),
    of_file("empty.txt", "", "has no prompts"),
    of_file("blank.txt", "\n  \n", "blank.txt has no prompts"),
    of_file("latin.txt", b"a caf\xe9\n", "is not UTF-8 (byte 5)"),
    of_file("odd.md", "a\n", "must end in .txt, .jsonl, .csv, .parquet"),
    of_file("keyless.csv", "text,n\na,1\n", 'line 2 must be an object with a text under "prompt"'),
    of_file("long.csv", "prompt,n\na,1,2\n", "line 2 has another number of fields"),
    of_file("short.csv", "prompt,n\na\n", "short.csv line 2 has another number of fields"),
    of_file("header.csv", "prompt,n\n", "header.csv has no prompts"),
    of_file("bad.parquet", "PAR0", "bad.parquet"),
    of_file("bad.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 is no JSON"),
    of_file("keyless.jsonl", '{"text": "a"}\n', 'line 1 must be an object with a text under "prompt"'),
    of_file(
        "\u2028.jsonl", '\ufeff{"prompt": "a\u2028b", "n": 1}\n{"prompt": "b"}\n', "jsonl prompt 2 has other columns"
    ),
    of_file("uneven.jsonl", '{"prompt": "a", "n": 1}\n{"prompt": "b"}\n', "prompt 2 has other columns"),
    of_file("missing.txt", None, "cannot be read: no such file"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompts(refuse, case):
    refuse(case)
