"""The rows of a prompt file: text is decoded, JSON, tables and lines are told apart.

The content decides. The extension decides only what the content leaves open: a .csv or .tsv is a
table even if none of its columns is known, a .json or .jsonl is JSON even if it looks like text.
What cannot be read for certain is refused: a wrong prompt is worse than an error.

Read next: prompts.py
"""

import codecs
import csv
import io
import json
import re

# Names of the prompt in the benchmarks' files, in any case; the first match wins.
PROMPT_NAMES = ("prompt", "prompts", "caption", "text", "prompt_en", "prompt_zh")
ID_NAMES = ("id", "prompt_id", "item_id", "index")
TAG_NAMES = ("tag", "task_type", "subcategory", "category", "challenge")
BOMS = {  # byte order marks; that of UTF-16 begins that of UTF-32, so it comes later
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
NO_PROMPTS = {  # how files begin that came instead of the prompts
    r"version https://git-lfs": "a Git LFS pointer, not the file itself; run git lfs pull",
    r"<!doctype|<html|<\?xml|404: not found": "a web page; download the raw file",
    r"\{\\rtf|%pdf": "a document; save it as plain text",
}
OTHER_SUFFIXES = {".yaml", ".yml", ".toml", ".xml", ".py"}
JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}
JSON_START = re.compile(r"""[\[{](\s*\n|[\s\[{]*["'])""")  # no plain text begins like this
JSON_LINE = re.compile(r'\s*\{\s*"[^"]*"\s*:')
JSON_BLANK = re.compile(r"[ \t\r\n]*")
LINE_END = re.compile(r"\r\n|\r|\n")  # str.splitlines() also splits at U+2028, form feeds, ...


class UnreadableError(ValueError):
    """Why this is no prompt file, and what to do."""


def read_rows(path):
    """The rows of a prompt file or folder, not yet checked: dicts or strings."""
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise UnreadableError("no such file or folder")
    text, suffix = decode(path.read_bytes()), path.suffix.lower()
    if suffix in OTHER_SUFFIXES:
        raise UnreadableError(
            f"{suffix} files are not read; save it as JSONL, CSV or lines of text"
        )
    for beginning, kind in NO_PROMPTS.items():
        if re.match(beginning, text.lstrip(), re.IGNORECASE):
            raise UnreadableError(kind)
    if suffix in JSON_SUFFIXES or is_json(text):
        rows = json_rows(text)
    else:
        rows = table_rows(text, suffix)
        rows = text_rows(text) if rows is None else rows
    propositions = [isinstance(row, dict) and "proposition_id" in row for row in rows]
    if rows and all(propositions) and all("item_id" in row for row in rows):
        return group_propositions(rows)
    return rows


def read_folder(path):
    """DPG-Bench: a folder of .txt files with one prompt each; the file's name is the id."""
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".txt")
    files = [file for file in files if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise UnreadableError(
            "no .txt file in this folder; give a file, or one prompt in each .txt"
        )
    rows = []
    for file in files:
        try:
            lines = lines_of(decode(file.read_bytes()))
        except UnreadableError as problem:
            raise UnreadableError(f"{file.name}: {problem}") from None
        if len(lines) != 1:
            raise UnreadableError(
                f"{file.name} has {len(lines)} lines; in a folder each .txt holds one prompt in "
                f"one line. For a prompt in each line: --prompts {file}"
            )
        rows.append({"id": file.stem, "prompt": lines[0][1]})
    return rows


def decode(data):
    """UTF-8, or UTF-16 and UTF-32 with a byte order mark. Nothing else can be told for certain."""
    encoding = next((name for bom, name in BOMS.items() if data.startswith(bom)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as problem:
        line = data[: problem.start].count(b"\n") + 1
        raise UnreadableError(
            f"line {line}: byte {data[problem.start]:#04x} is not {encoding.upper()}; save the "
            "file as UTF-8 (if it is Latin-1: iconv -f LATIN1 -t UTF-8 FILE > NEW)"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UnreadableError(
            f"line {line}: a NUL character, which no prompt has; it is a binary file, or UTF-16 "
            "without a byte order mark. Save it as UTF-8"
        )
    return re.sub(r"(^|[\r\n])\ufeff+", r"\1", text)  # joined files keep their byte order marks


def lines_of(text):
    """[(line number, line)] of the lines that are not blank."""
    lines = enumerate(LINE_END.split(text), 1)
    return [(number, line) for number, line in lines if line.strip()]


def text_rows(text):
    """One prompt in each line, the whole line."""
    for number, line in lines_of(text):
        if JSON_LINE.match(line):
            raise UnreadableError(
                f"line {number} is JSON, the lines before are text: {line[:60]!r}"
            )
    return [line for _, line in lines_of(text)]


# --- JSON -----------------------------------------------------------------------------------------


def is_json(text):
    """Whether this is meant as JSON: "[anime style] a girl" is not, and half a list is."""
    start = text.lstrip()
    if not start.startswith(("[", "{")):
        return False
    try:
        json.loads(start)
    except ValueError:
        return bool(JSON_START.match(start))
    except RecursionError:
        pass
    return True


def json_rows(text):
    """A JSON list, an object, or objects one after another (JSONL), as T2I-R1's .json file."""
    values = json_values(text)
    if len(values) == 1 and isinstance(values[0], dict):
        return object_rows(values[0])
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def json_values(text):
    """All JSON values of a text. NaN, which pandas writes for an empty cell, becomes None."""
    decoder = json.JSONDecoder(object_pairs_hook=unique_fields, parse_constant=lambda _: None)
    values, at = [], JSON_BLANK.match(text).end()
    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except UnreadableError as problem:
            raise UnreadableError(f"entry {len(values) + 1}: {problem}") from None
        except (ValueError, RecursionError) as problem:  # also too deep, and too many digits
            place = getattr(problem, "pos", at)
            line = len(LINE_END.findall(text, 0, place)) + 1
            excerpt = LINE_END.split(text[max(place - 30, at) : place + 30])
            reason = getattr(problem, "msg", str(problem))
            raise UnreadableError(
                f"line {line}: not JSON ({reason}), near {excerpt!r}; repair the line or remove it"
            ) from None
        values.append(value)
        at = JSON_BLANK.match(text, end).end()
    return values


def unique_fields(pairs):
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UnreadableError(f"the field {twice!r} occurs twice in one object; keep one of them")
    return fields


def object_rows(value):
    """One JSON object: a single prompt, or all of them by their ids, as GenAI-Bench's."""
    if not value or {name.strip().lower() for name in value} & set(PROMPT_NAMES):
        return [value]
    if all(isinstance(row, dict) for row in value.values()):
        return [{**row, "id": id_} for id_, row in value.items()]
    if all(isinstance(v, str) and re.search(r"\d", id_) for id_, v in value.items()):
        return [{"id": id_, "prompt": prompt} for id_, prompt in value.items()]
    raise UnreadableError(no_prompt_field(value))


def no_prompt_field(names):
    """The message for a table or an object whose prompt cannot be found."""
    names = ", ".join(map(str, names))
    known = ", ".join(PROMPT_NAMES)
    return f"no field for the prompt among {names[:200]!r}; rename it to one of {known}"


# --- tables ---------------------------------------------------------------------------------------


def table_rows(text, suffix):
    """The rows of a table as dicts; None if this is no table, but lines of text."""
    lines = lines_of(text)
    if lines and (excel := re.fullmatch(r"sep=(.)", lines[0][1])):  # Excel names its delimiter
        lines, text = lines[1:], text.split(lines[0][1], 1)[1]
    if not lines:
        return None
    headers = {}  # delimiter -> the cells of the first line
    for delimiter in "\t,;|":
        first = lines[0][1][:100_000]  # csv refuses longer cells
        cells = next(csv.reader([first], delimiter=delimiter, skipinitialspace=True))
        headers[delimiter] = [cell.strip() for cell in cells]
    is_table = suffix in {".csv", ".tsv"} or bool(excel)
    known = {
        delimiter: header
        for delimiter, header in headers.items()
        if {cell.lower() for cell in header} & set(PROMPT_NAMES)
        and (is_table or delimiter == "\t" or is_header(header))
    }
    if not known:
        header = max(headers.values(), key=len)
        words = re.split(r"[\W_]+", " ".join(header).lower())
        hint = {"prompt", "prompts", "caption", "captions", "text", "texts"} & set(words)
        if is_table or (hint and len(header) > 1 and is_header(header)):
            raise UnreadableError(no_prompt_field(header))
        return None
    delimiter = max(known, key=lambda name: len(known[name]))
    header = known[delimiter]
    if len(header) == 1:
        delimiter = "\x1f"  # one column: commas are a part of the prompt
    return [
        row
        for number, cells in records_of(text, delimiter, header, suffix)
        if (row := named_cells(number, cells, header, delimiter)) is not None
    ]


def is_header(cells):
    """Whether this is no line of text such as "text, neon, night"."""
    lower = {cell.lower() for cell in cells}
    names = all(re.fullmatch(r"([A-Za-z]\w*)?", cell) for cell in cells)
    several = len(cells) == 1 or lower & set(ID_NAMES + TAG_NAMES)
    return (names and several) or any(n in PROMPT_NAMES and "prompt" in n for n in lower)


def records_of(text, delimiter, header, suffix):
    """[(line number, cells)] below the header of a table.

    In a TSV quotes are letters (PartiPrompts), unless the header has some, cells double them, or
    only a reading with quotes gives each line as many cells as the header has."""
    plain = [(number, line.split(delimiter)) for number, line in lines_of(text)]
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        strict=True,
        skipinitialspace=delimiter != "\t",
    )
    try:
        quoted = [(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))]
    except csv.Error as problem:
        if delimiter in ",;|" or suffix == ".csv":
            raise UnreadableError(
                f"line {reader.line_num}: not a table ({problem}); in a quoted cell each quote "
                'is doubled: "a ""red"" circle"'
            ) from None
        return plain[1:]
    if delimiter == "\t":
        fits = lambda records: all(len(cells) == len(header) for _, cells in records)
        doubled = any(re.fullmatch(r'"[^"]*""(?:[^"]|"")*"', c) for _, row in plain for c in row)
        quotes = '"' in "".join(plain[0][1]) or doubled or not fits(plain)
        return quoted[1:] if quotes and fits(quoted) else plain[1:]
    return quoted[1:]


def named_cells(number, cells, header, delimiter):
    """One row of a table as a dict; None for an empty row and for a repeated header."""
    cells = [cell.strip() for cell in cells]
    while len(cells) > len(header) and not cells[-1]:
        cells.pop()
    if cells == header or not any(cells):
        return None
    names = [name.lower() for name in header if name]
    if len(set(names)) < len(names):
        raise UnreadableError(f"two columns of one name in {', '.join(header)[:200]!r}; rename one")
    if len(cells) != len(header):
        raise UnreadableError(
            f"line {number}: {len(cells)} cells where the header has {len(header)}; put quotes "
            f"around a cell that holds {delimiter!r} or a line break, or remove the line"
        )
    return {name: cell for name, cell in zip(header, cells) if name}


def group_propositions(rows):
    """DPG-Bench's table has a row for each proposition (a question about the picture) -> one row
    for each prompt, with its propositions in a list."""
    prompts = {}
    for number, row in enumerate(rows, 1):
        id_, text = row["item_id"], row.get("text") or ""
        if not isinstance(id_, (str, int)) or id_ == "":
            raise UnreadableError(f"entry {number}: item_id {id_!r} does not name a prompt")
        prompt = prompts.setdefault(id_, {"item_id": id_, "text": text, "propositions": []})
        prompt["text"] = prompt["text"] or text
        if text and text != prompt["text"]:
            raise UnreadableError(
                f"entry {number}: another text for item_id {id_!r}, which names one prompt: "
                f"{str(text)[:60]!r}"
            )
        if row.get("keywords"):
            prompt["keywords"] = row["keywords"]
        shared = ("item_id", "text", "keywords")
        prompt["propositions"].append({k: v for k, v in row.items() if k not in shared})
    return list(prompts.values())
