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
    of_file("comments.txt", "# a\n#b\n", "comments.txt has no prompts"),
    of_file("wide.txt", "a".encode("utf-16"), "is not UTF-8 (byte 0); save it as UTF-8"),
    of_file("nul.txt", "a\0 \0c\0\n", "line 1 holds a NUL character"),
    of_file("keyless.csv", "text,n\na,1\n", "has no column prompt in its first line, only text, n"),
    of_file("semicolon.csv", "prompt;n\na;1\n", "has no column prompt in its first line, only prompt;n"),
    of_file("twice.csv", "prompt,n,n\na,1,2\n", "has two columns 'n'"),
    of_file("quote.csv", 'prompt,n\n"a,1\nb,2\n', "line 3 is no CSV: unexpected end of data"),
    of_file("empty.csv", "prompt,n\n,2\n", 'empty.csv line 2 must be an object with a text under "prompt"'),
    of_file("long.csv", "prompt,n\na,1,2\n", "line 2 has another number of fields"),
    of_file("short.csv", "prompt,n\na\n", "short.csv line 2 has another number of fields"),
    of_file("header.csv", "prompt,n\n", "header.csv has no prompts"),
    of_file("bad.parquet", "PAR0", "bad.parquet"),
    of_file("bad.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 is no JSON"),
    of_file("keyless.jsonl", '{"text": "a"}\n', 'line 1 must be an object with a text under "prompt"'),
    of_file(
        "\u2028.jsonl", '\ufeff{"prompt": "a\u2028b", "n": 1}\n{"prompt": 2}\n', "line 2 must be an object with a text"
    ),
    of_file(
        "half.jsonl",
        '{"prompt": "a"}\n{"prompt": "a \\ud83d b"}\n',
        "line 2 is no JSON: it holds \\ud83d, half of a character",
    ),
    of_file(
        "column.jsonl",
        '{"prompt": "a", "n": [{"\\udc00": 1}]}\n',
        "line 1 is no JSON: it holds \\udc00, half of a character",
    ),
    of_file("null.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', "null.jsonl line 2 must be an object with a text"),
    of_file("zero.jsonl", '{"prompt": "a\\u0000b"}\n', "zero.jsonl line 1 holds a NUL character"),
    of_file("keys.jsonl", '{"prompt": "a", "prompt": "b"}\n', "line 1 is no JSON: the key 'prompt' is there twice"),
    of_file("deep.jsonl", '{"prompt": "a", "n": ' + "[" * 100_000 + "\n", "line 1 is no JSON"),
    of_file("nested.jsonl", '{"prompt": "a", "n": ' + "[" * 60 + "]" * 60 + "}\n", "nested more than 50 deep"),
    of_file("digits.jsonl", '{"prompt": "a", "n": ' + "1" * 5000 + "}\n", "digits.jsonl line 1 is no JSON"),
    of_file("array.jsonl", '[{"prompt": "a"}]\n', 'array.jsonl line 1 must be an object with a text under "prompt"'),
    of_file("videos.jsonl", '{"prompt": "a", "videos": 1}\n', "has a column 'videos', an argument that every"),
    of_file("folder.txt/a", "", "folder.txt/a must end in"),
    Case("train RECIPE prompts.train=HERE/d.txt", "d.txt cannot be read: is a directory", {"d.txt/a": ""}),
    of_file("missing.txt", None, "cannot be read: no such file"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompts(refuse, case):
    refuse(case)
