"""Prompt files: read right, or refused with one line; never a wrong prompt, never a traceback."""

import codecs
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.prompts import load_prompts


@pytest.fixture
def load(tmp_path):
    """Write a file of this name and content, and read it: [(id, prompt, tag)]."""

    def read(content, name="file.xyz"):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        return [(row["id"], row["prompt"], row["tag"]) for row in load_prompts(tmp_path / name)]

    return read


@pytest.fixture
def refused(load, capsys):
    """The one line that refuses this file, with exit code 2."""

    def message(content, name="file.xyz"):
        with pytest.raises(SystemExit) as stop:
            load(content, name)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and name in err and err.count("\n") == 1
        return err

    return message


def numbered(*prompts):
    return [(str(i), prompt, "") for i, prompt in enumerate(prompts)]


FILES = {
    "T2I-R1: JSONL called .json": (
        '{"prompt": "a car", "nouns": ["car"], "task_type": "object"}\n'
        '{"prompt": "b", "task_type": "color"}',
        [("0", "a car", "object"), ("1", "b", "color")],
    ),
    "GenEval: JSONL": (
        '{"tag": "counting", "include": [], "prompt": "two cats"}\n',
        [("0", "two cats", "counting")],
    ),
    "WISE: a JSON list of objects": (
        '[{"Prompt": "p", "Subcategory": "time", "prompt_id": 831}]',
        [("831", "p", "time")],
    ),
    "HPDv2: a JSON list of texts": ('["x", "y"]', numbered("x", "y")),
    "GenAI-Bench: a JSON object, id -> object": (
        '{"00000": {"id": "00000", "prompt": "a", "models": {}}, "00007": {"prompt": "b"}}',
        [("00000", "a", ""), ("00007", "b", "")],
    ),
    "a JSON object, id -> text": ('{"0": "x", "7": "y"}', [("0", "x", ""), ("7", "y", "")]),
    "one object in several lines, and another": (
        '{\n"prompt": "a"\n}\n{\n"prompt": "b"\n}',
        numbered("a", "b"),
    ),
    "NaN, which pandas writes": ('[{"prompt": "a", "tag": NaN}]', numbered("a")),
    "T2I-CompBench: lines, CRLF": (
        "a red bag\r\na dog, a cat\r\n",
        numbered("a red bag", "a dog, a cat"),
    ),
    "lines of an old Mac": ("a\rb\r", numbered("a", "b")),
    "Parti: TSV": (
        "Prompt\tCategory\tChallenge\tNote\na cube\tShapes\tBasic\t\n",
        [("0", "a cube", "Shapes")],
    ),
    "DrawBench: CSV": (
        'Prompts,Category\n"a dog, sitting",Colors\n',
        [("0", "a dog, sitting", "Colors")],
    ),
    "UniGenBench: CSV": (
        'index,prompt_en,sub_dims_en\n5,"two pandas, ink","{""style"": ""ink""}"\n',
        [("5", "two pandas, ink", "")],
    ),
    "a German Excel": ("Prompt;Category\na, b;x\n", [("0", "a, b", "x")]),
    "Excel names its delimiter": ("sep=;\nid;Prompt\n7;a, b\n", [("7", "a, b", "")]),
    "two tables joined": (
        "Prompts,Category\na,x\nPrompts,Category\nb,y\n",
        [("0", "a", "x"), ("1", "b", "y")],
    ),
    "column names with blanks": ("id,prompt,prompt in Chinese\n7,a,b\n", [("7", "a", "")]),
    "pandas' index, and empty cells at the end": (",prompt\n0,a,\n,,\n", numbered("a")),
    "one column: commas are a part of it": (
        'prompt\na cat, sitting\n"b, c"\n',
        numbered("a cat, sitting", "b, c"),
    ),
    "plain text with brackets": (
        "[anime style] a girl\n{red|blue} car\n[[bad]] x\n",
        numbered("[anime style] a girl", "{red|blue} car", "[[bad]] x"),
    ),
    "a tab in plain text": (
        "Backlit,\tBold colors,\tbeer\na cat\n",
        numbered("Backlit,\tBold colors,\tbeer", "a cat"),
    ),
    "text that begins like a header": (
        "text, neon sign, night\na cat\n",
        numbered("text, neon sign, night", "a cat"),
    ),
    "text of single words": (
        "text, neon, night\na cat, dog, bird\n",
        numbered("text, neon, night", "a cat, dog, bird"),
    ),
    "text with a word like a header's": (
        "texture, wood\na cat\n",
        numbered("texture, wood", "a cat"),
    ),
    "quotes in plain text": ('"Hello"\n', numbered('"Hello"')),
    "a line longer than csv allows": ("x" * 200_000, numbered("x" * 200_000)),
}


@pytest.mark.parametrize("layout", FILES)
def test_prompt_files_are_recognised_by_their_content(layout, load):
    text, expected = FILES[layout]
    assert load(text) == expected


def test_other_columns_of_a_prompt_file_are_kept(tmp_path):
    (tmp_path / "f").write_text('{"prompt": "a", "nouns": ["a"], "spatial_info": {"obj1": 1}}')
    assert load_prompts(tmp_path / "f")[0]["spatial_info"] == {"obj1": 1}


def test_a_folder_of_texts_is_a_prompt_file(tmp_path):
    (tmp_path / "whoops1.txt").write_text("a long prompt\n")
    (tmp_path / "._whoops1.txt").write_bytes(b"\0\5\x16\7")  # macOS adds such files
    (tmp_path / "2.TXT").write_text("another")
    assert [row["id"] for row in load_prompts(tmp_path)] == ["2", "whoops1"]


def test_a_folder_of_lists_is_not_taken_for_a_folder_of_prompts(tmp_path, capsys):
    """T2I-CompBench keeps a folder of such files."""
    (tmp_path / "color_val.txt").write_text("a red bag\na blue cat\n")
    for folder, word in ((tmp_path, "color_val.txt has 2 lines"), (tmp_path / "none", "no .txt")):
        folder.mkdir(exist_ok=True)
        with pytest.raises(SystemExit) as stop:
            load_prompts(folder)
        assert stop.value.code == 2 and word in capsys.readouterr().err


# --- quotes ---------------------------------------------------------------------------------------

ROWS = '"Hello" on a wall\tx\n"No way out, on a door\ty\na "quoted" dog\tz\na bird"\tw\n'


def test_in_a_tsv_quotes_are_letters(load):
    prompts = [prompt for _, prompt, _ in load("Prompt\tCategory\n" + ROWS, "parti.tsv")]
    assert prompts == [line.split("\t")[0] for line in ROWS.splitlines()]


@pytest.mark.parametrize(
    "text, prompt",
    [
        ('Prompt\tTag\n"a ""red"" cat"\tx\nb\ty\n', 'a "red" cat'),  # doubled
        ('Prompt\tTag\n"a\ncat"\tx\nb\ty\n', "a\ncat"),  # or lines would be too short
        ('"Prompt"\t"Tag"\n"a cat"\t"x"\n"b"\t"y"\n', "a cat"),  # or in the header, too
    ],
)
def test_unless_only_quotes_make_sense_of_the_table(text, prompt, load):
    assert load(text) == [("0", prompt, "x"), ("1", "b", "y")]


def test_in_a_csv_quotes_enclose_a_cell(load):
    text = '"id","prompt"\n1,"a cat, ""fluffy"", sits"\n2,"line one\nline two"\n'
    assert load(text) == [("1", 'a cat, "fluffy", sits', ""), ("2", "line one\nline two", "")]


@pytest.mark.parametrize("row", ['"Hello" on a wall,x\n', '"No way out,x\na cat,y\n'])
def test_a_quote_in_a_csv_never_swallows_rows(row, refused):
    assert "each quote is doubled" in refused("Prompts,Category\n" + row, "a.csv")


# --- what only resembles a line end ---------------------------------------------------------------


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85"])
def test_a_line_ends_at_a_line_end_only(letter, load):
    prompt = f"a{letter}b"
    assert load(prompt + "\nc\n") == numbered(prompt, "c")
    line = json.dumps({"prompt": prompt}, ensure_ascii=False)
    assert load(f'{line}\n{{"prompt": "c"}}\n') == numbered(prompt, "c")
    assert load(f"prompt,n\n{prompt},1\n") == numbered(prompt)


# --- encodings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_an_encoding_with_a_mark_is_read(encoding, load):
    assert load("un café 🎨\r\nb\r\n".encode(encoding)) == numbered("un café 🎨", "b")
    assert load("Prompts,Tag\nun café,x\n".encode(encoding)) == [("0", "un café", "x")]


def test_joined_files_keep_no_byte_order_marks(load):
    mark = codecs.BOM_UTF8
    assert load(mark + b"a\n" + mark + b"b\n") == numbered("a", "b")
    line = mark + b'{"prompt": "a"}\n'
    assert load(line + line) == numbered("a", "a")


@pytest.mark.parametrize(
    "data, word",
    [
        ("Prompts,Tag\nun café,x\n".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8"),
        ("a cat".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        (codecs.BOM_UTF16_LE + b"a", "not UTF-16"),
        (b"a red\0circle\n", "NUL"),
        (b"PAR1\x15\x04\xff", "not UTF-8"),
        (b"\xed\xa0\x80", "not UTF-8"),
    ],
)
def test_another_encoding_is_named(data, word, refused):
    assert word in refused(data)


# --- what is refused ------------------------------------------------------------------------------

BAD = [
    ("", "no prompts in it"),
    (" \n\n", "no prompts in it"),
    ("[]", "no prompts in it"),
    ("\u200b\n", "a visible text"),
    ('{"caption": null}', "a visible text"),
    ('{"prompt": 3}', "a visible text"),
    ('{"prompt": "", "caption": "x"}', "a visible text"),
    ('{"prompt": "a\\u0000b"}', "a visible text"),
    ('{"prompt": "a", "nouns": ["\\ud83d"]}', "half a character"),
    ('{"prompts": ["a", "b"]}', "a visible text"),
    ('[{"idx": 1, "instruction": "a"}]', "'idx, instruction'; rename it to one of prompt,"),
    ('{"title": "x", "author": "y"}', "'title, author'"),
    ("[1, 2]", "a text or an object"),
    ('{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
    ('["a",\n"b",]', "line 2: not JSON"),
    ("['a', 'b']", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('{"prompt": "a", "prompt": "b"}', "'prompt' occurs twice"),
    ('[{"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"}]', "id '1' is taken"),
    ('[{"prompt": "a"}, {"id": "0", "prompt": "b"}]', "one without an id gets its place"),
    ('{"id": [1], "prompt": "a"}', "an id is"),
    ('# my prompts\n{"prompt": "a"}\n', "line 2 is JSON"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ("<!DOCTYPE html><html></html>", "a web page"),
    ("404: Not Found", "a web page"),
    ("Prompts,Category\na dog, sitting,Colors\n", "line 2: 3 cells where the header has 2"),
    ("id,prompt,tag\n0,a red\ncircle,x\n", "line 2: 2 cells"),
    ("Prompt,prompt\na,b\n", "two columns of one name"),
    ("Prompts,Category\n,Colors\n", "a visible text"),
    ("index,prompt_de\n0,eine Katze\n", "'index, prompt_de'"),
    ("prompt,tag\n" + "x" * 200_000 + ",1\n", "field larger"),
]


@pytest.mark.parametrize("text, word", BAD, ids=[repr(text)[:40] for text, _ in BAD])
def test_a_bad_prompt_file_is_one_clear_error(text, word, refused):
    assert word in refused(text)


@pytest.mark.parametrize(
    "name, text, word",
    [
        ("a.csv", "idx,beschreibung\n0,eine Katze\n", "'idx, beschreibung'"),
        ("a.tsv", "idx\tbeschreibung\n0\teine Katze\n", "'idx, beschreibung'"),
        ("a.json", "a red circle\n", "not JSON"),
        ("a.yaml", "- a red circle\n", ".yaml files are not read"),
    ],
)
def test_a_name_that_promises_more_than_lines_of_text_is_believed(name, text, word, refused, load):
    assert word in refused(text, name)
    assert load('"a red circle"', "a.jsonl") == numbered("a red circle")


def test_what_cannot_be_opened_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none", "a red circle " * 400, "a\0b", tmp_path / "pipe"):
        with pytest.raises(SystemExit) as stop:
            load_prompts(path)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# --- DPG-Bench's table ----------------------------------------------------------------------------

DPG = (
    "item_id,text,keywords,proposition_id,dependency,tuple\n"
    'p0,a red car,,1,0,entity - whole (car)\np0,{text},,2,1,"attribute - color (car, red)"\n'
    "s1,a dog,,1,0,entity - whole (dog)\n"
)


@pytest.mark.parametrize("text", ["a red car", ""])
def test_a_table_of_propositions_has_one_prompt_for_each_item(text, tmp_path):
    (tmp_path / "dpg.csv").write_text(DPG.format(text=text))
    first, second = load_prompts(tmp_path / "dpg.csv")
    assert (first["id"], first["prompt"]) == ("p0", "a red car") and second["id"] == "s1"
    assert first["propositions"][1] == {
        "proposition_id": "2",
        "dependency": "1",
        "tuple": "attribute - color (car, red)",
    }


def test_two_texts_of_one_item_are_refused(refused):
    assert "another text for item_id 'p0'" in refused(DPG.format(text="a blue car"))
    assert "does not name a prompt" in refused('{"item_id": [], "proposition_id": 1, "text": "a"}')


# --- at random ------------------------------------------------------------------------------------

PIECES = [
    *["a red circle", "prompt", "Prompts", "id", "text", "item_id", "proposition_id", "sep=;"],
    *[",", ";", "\t", '"', '""', "'", "[", "]", "{", "}", ":", "\n", "\n", "\r\n", "\r"],
    *["\u2028", "\ufeff", "\0", "\\ud83d", "\\u0000", "NaN", "1", "1e999", "null", "é", "🎨"],
    *['{"prompt": "a"}', '["a"]', '"id": 1', "<html", "#"],
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text()
    | st.sampled_from(["prompt", "a", 1, 2**70]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["prompt", "id", "tag", "item_id", "0", "x"]), inner)
    ),
    max_leaves=8,
).map(json.dumps)
DATA = st.one_of(
    st.binary(),
    TEXTS.map(str.encode),
    TEXTS.map(lambda text: text.encode("utf-16")),
    st.lists(JSON, max_size=3).map(lambda lines: "\n".join(lines).encode()),
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(data=DATA, suffix=st.sampled_from([".txt", ".csv", ".tsv", ".json", ""]))
def test_no_file_ends_in_a_traceback(tmp_path_factory, data, suffix):
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(data)
    try:
        rows = load_prompts(path)
    except SystemExit as stop:
        assert stop.code == 2
        return
    assert rows and all(row["prompt"].strip() and isinstance(row["tag"], str) for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    json.dumps(rows, ensure_ascii=False).encode()  # anything can be printed and written
