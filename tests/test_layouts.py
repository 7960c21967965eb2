"""Layouts: every picture goes to its own prompt, and a scorer finds one export and nothing else."""

import os
import shutil
import unicodedata

import pytest
from conftest import TEXTS, picture
from PIL import Image

from evaluation import exports, layouts
from training import files
from training.pictures import read_manifest, write_pictures
from training.prompts import load_prompts
from training.records import write_jsonl


@pytest.fixture
def rows():
    return [{"id": str(i), "prompt": text, "tag": ""} for i, text in enumerate(TEXTS)]


# --- what the official scorers match, restated -------------------------------------------


def official(layout, root):
    """What the official scorer of this layout would read: {file: prompt number}."""
    if layout == "t2i-compbench":  # BLIP_vqa.py: every file of samples/, in the order of its number
        number = lambda name: int(name.split("_")[-1].split(".")[0])
        names = sorted(os.listdir(root / "samples"), key=number)
        assert list(map(number, names)) == list(range(len(names)))  # 3_in_1.py slices by number
        return {f"samples/{name}": TEXTS.index(name.split("_")[0]) for name in names}
    if layout == "wise":  # gpt_eval.py: {image_dir}/{prompt_id}.png
        return {f"{i}.png": i for i in range(3) if (root / f"{i}.png").exists()}
    if layout == "dpg":  # compute_dpg_bench.py: every file, its name up to the first dot
        return {name: int(name.split(".")[0]) for name in os.listdir(root)}
    assert os.listdir(root) == ["photo"]  # hpsv2.evaluate: only styles, in each {index:05d}.jpg
    names = [f"photo/{i:05d}.jpg" for i in range(3)]
    return {name: i for i, name in enumerate(names) if (root / name).exists()}


@pytest.mark.parametrize(
    "layout, n", [("t2i-compbench", 12), ("wise", 3), ("dpg", 3), ("hpdv2", 3)]
)
def test_the_official_scorer_finds_every_exported_picture(layout, n, generated, tmp_path):
    assert exports.export(generated, layout, tmp_path / layout) == n
    read = official(layout, tmp_path / layout)
    assert len(read) == n and set(read.values()) == {0, 1, 2}
    for name in read:
        Image.open(tmp_path / layout / name).verify()


def test_dpg_tiles_are_cut_where_the_scorer_cuts(generated, tmp_path):
    exports.export(generated, "dpg", tmp_path / "dpg")
    tile = Image.open(tmp_path / "dpg/1.png")
    boxes = [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
    assert [tile.crop(box).getpixel((3, 3)) for box in boxes] == [(60, 60 * k, 0) for k in range(4)]


def test_dpg_needs_four_pictures_of_a_prompt(generated, tmp_path, capsys):
    lines = (generated / "manifest.jsonl").read_text().splitlines(keepends=True)
    (generated / "manifest.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(SystemExit):
        exports.export(generated, "dpg", tmp_path / "dpg")
    assert "0 has 3, use --num-images 4" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["geneval", "t2i-compbench", "wise", "dpg", "hpdv2", "released"])
def test_pictures_are_found_in_every_layout(layout, generated, tmp_path, rows):
    root = tmp_path / layout
    if layout == "geneval":
        root = generated
    elif layout == "released":
        root.mkdir()
        for i, text in enumerate(TEXTS):
            picture().save(root / f"ID{i}_{text.replace(' ', '_')}_0.jpg")
    else:
        exports.export(generated, layout, root)
    _, matched, missing, extra = layouts.find_images(root, rows)
    assert {row["prompt"] for row, _, _ in matched} == set(TEXTS) and not missing and not extra
    assert len(matched) == (12 if layout in ("geneval", "t2i-compbench", "dpg") else 3)
    assert {k for _, k, _ in matched} == set(range(len(matched) // 3))


def test_pictures_of_other_prompts_are_extra_and_never_matched(generated, rows):
    rows[1]["prompt"] = "something else"
    _, matched, missing, extra = layouts.find_images(generated, rows)
    assert len(matched) == 8 and [r["id"] for r in missing] == ["1"] and len(extra) == 4


@pytest.mark.parametrize(
    "good, bad",
    [
        ("0.png", "old/0.png"),  # an id, in the wrong folder
        ("ID0_a red circle_0.jpg", "ID1_a red circle_0.jpg"),  # another prompt's number
        ("samples/a red circle_000000.png", "samples/a red circle_1.png"),  # too few digits
        ("photo/00000.jpg", "photo/00003.jpg"),  # there are three prompts, 0 to 2
    ],
)
def test_a_file_that_only_resembles_the_layout_is_extra(good, bad, tmp_path, rows):
    for name in (good, bad):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / "all" / name)
    _, matched, _, extra = layouts.find_images(tmp_path / "all", rows)
    assert matched == [(rows[0], 0, tmp_path / "all" / good)]
    assert extra == [tmp_path / "all" / bad]


def test_no_match_at_all_is_an_error(generated, capsys):
    with pytest.raises(SystemExit) as stop:
        layouts.find_images(generated, [{"id": "0", "prompt": "a house"}])
    assert stop.value.code == 2 and "none of its 12 pictures" in capsys.readouterr().err


def test_a_prompt_that_cannot_be_a_file_name_is_refused_before_anything_is_written(
    generated, tmp_path, capsys
):
    manifest = generated / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace(TEXTS[2], "a red/circle"))
    with pytest.raises(SystemExit):
        exports.export(generated, "t2i-compbench", tmp_path / "no")
    assert "no file name" in capsys.readouterr().err and not (tmp_path / "no").exists()


# --- names ----------------------------------------------------------------------------------------


def make(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(root / name)
    return root


def rows_of(*prompts, first=0):
    return [{"id": str(i), "prompt": text} for i, text in enumerate(prompts, first)]


def found(root, rows, prompts="", tile=0):
    """(layout, [(id, k, name)]) of the pictures that were matched."""
    layout, matched, *_ = layouts.find_images(root, rows, str(prompts), tile)
    return layout, [(row["id"], k, path.relative_to(root).as_posix()) for row, k, path in matched]


def refusal(capsys, function, *args):
    with pytest.raises(SystemExit) as stop:
        function(*args)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    return err


LONG = "a photo of " + "very " * 30 + "small cats"


@pytest.mark.parametrize("first", [0, 1])  # the number is the row's index, or its id
@pytest.mark.parametrize("number", ["index", "id"])
def test_names_of_the_released_code_are_recognised(first, number, tmp_path):
    """Blanks are underscores there, prompts are cut at 100 letters."""
    prompts = ["a photo of a car below a zebra", "a 1/2 full cup, really?", LONG]
    rows = rows_of(*prompts, first=first)
    for index, row in enumerate(rows):
        id_ = index if number == "index" else row["id"]
        name = row["prompt"][:100].replace(" ", "_").replace("/", "_")
        make(tmp_path, f"ID{id_}_{name}_2.jpg", f"ID{id_}_{name}_10.jpg")
    layout, matched = found(tmp_path, rows)
    assert layout.startswith("ArtifactReward") and len(matched) == 6
    for id_, k, name in matched:
        index = int(id_) - (first if number == "index" else 0)
        assert name.startswith(f"ID{index}_") and name.endswith(f"_{k}.jpg")


@pytest.mark.parametrize("name", ["ID0_a_red_1.jpg", "ID0_a_red_circle_and_more_1.jpg"])
def test_a_part_of_a_prompt_is_not_the_prompt(name, tmp_path, capsys):
    make(tmp_path, name)
    assert "none of its 1 pictures" in refusal(capsys, found, tmp_path, rows_of("a red circle"))


@pytest.mark.parametrize("cut", [lambda text: text, lambda text: text.replace(" ", "_")])
def test_names_of_t2i_r1_are_recognised(cut, tmp_path):
    prompts = ["a red circle", "un café noir"]
    for prompt in prompts:
        name = cut(unicodedata.normalize("NFD", prompt))  # as macOS writes it
        make(tmp_path, *(f"{name}_{k}.jpg" for k in (0, 9, 10)))
    layout, matched = found(tmp_path, rows_of(*prompts))
    assert layout == "T2I-R1" and len(matched) == 6
    # The number in the name, also where some are missing: two folders are compared by it.
    assert all(name.endswith(f"_{k}.jpg") for _, k, name in matched)


def test_two_prompts_with_one_name_are_not_guessed(tmp_path, capsys):
    make(tmp_path, "a_red_circle_0.jpg")
    assert "none of" in refusal(capsys, found, tmp_path, rows_of("a red circle", "a red-circle"))


def test_hidden_files_folders_and_other_formats(tmp_path):
    names = [".ipynb_checkpoints/0.png", "__MACOSX/0.png", "._0.png", "0.bmp", "1.tif", "2.gif"]
    make(tmp_path, *names)
    (tmp_path / "3.png").mkdir()
    _, matched, missing, extra = layouts.find_images(tmp_path, rows_of(*"abcd"))
    assert [path.name for *_, path in matched] == ["0.bmp", "1.tif", "2.gif"]
    assert [row["id"] for row in missing] == ["3"] and not extra


# --- which of several -----------------------------------------------------------------------------


def test_of_four_styles_of_hpdv2_only_the_prompt_files_own_is_scored(tmp_path, capsys):
    styles = ("anime", "concept-art", "paintings", "photo")
    make(tmp_path, *(f"{style}/{i:05d}.jpg" for style in styles for i in range(2)))
    rows = rows_of("a", "b")
    for style in styles:
        file = tmp_path / f"{style.replace('-', '_')}.json"
        assert [name for *_, name in found(tmp_path, rows, file)[1]] == [
            f"{style}/00000.jpg",
            f"{style}/00001.jpg",
        ]
    assert len(found(tmp_path / "photo", rows, "photo.json")[1]) == 2
    for root, file in ((tmp_path, "other.json"), (tmp_path / "photo", "anime.json")):
        assert "none of its" in refusal(capsys, found, root, rows, file)
    assert "in 4 folders" in refusal(capsys, found, tmp_path, rows)  # the file is not known


def test_a_prompt_that_occurs_twice_owns_its_own_pictures(tmp_path, capsys):
    rows = rows_of("a red circle", "a star", "a red circle")
    names = [f"samples/{rows[i // 2]['prompt']}_{i:06d}.png" for i in range(6)]
    _, matched = found(make(tmp_path, *names), rows)
    assert sorted(matched) == [(str(i // 2), i % 2, name) for i, name in enumerate(names)]
    (tmp_path / names[5]).unlink()
    message = refusal(capsys, found, tmp_path, rows)
    assert "3 pictures" in message and "occurs 2 times" in message


@pytest.mark.parametrize("layout", ["geneval", "t2i-compbench"])
def test_two_folders_of_one_layout_do_not_merge(layout, generated, tmp_path, rows, capsys):
    names = ["all/one", "all/two"]
    for name in names:
        (tmp_path / "all").mkdir(exist_ok=True)
        if layout == "geneval":
            shutil.copytree(generated, tmp_path / name)
        else:
            exports.export(generated, layout, tmp_path / name)
    message = refusal(capsys, found, tmp_path / "all", rows)
    assert "in 2 folders" in message and "give one of them" in message
    assert len(found(tmp_path / "all/two", rows)[1]) == 12


def test_the_folder_that_was_named_comes_before_copies_in_it(generated, rows):
    shutil.copytree(generated / "00000", generated / "old/00000")
    _, matched, missing, extra = layouts.find_images(generated, rows)
    assert len(matched) == 12 and not missing and len(extra) == 4


@pytest.mark.parametrize("text", ["", "{", "[]", '{"prompt": 3}', '{"prompt": "x"}', "\xff"])
def test_damaged_metadata_costs_its_own_pictures_only(text, generated, rows):
    (generated / "00001/metadata.jsonl").write_text(text, encoding="latin-1")
    _, matched, missing, extra = layouts.find_images(generated, rows)
    assert len(matched) == 8 and [row["id"] for row in missing] == ["1"] and len(extra) == 4


# --- tiles ----------------------------------------------------------------------------------------


def tile_of(*colors):
    tile = Image.new("RGB", (16, 16))
    for i, color in enumerate(colors):
        tile.paste(picture(color), (i % 2 * 8, i // 2 * 8))
    return tile


def test_a_tile_is_never_scored_as_one_picture(tmp_path, capsys):
    root, rows = tmp_path / "tiles", rows_of("a", "b")
    root.mkdir()
    for i in range(2):
        tile_of((9, 0, 0), (0, 99, 0), (0, 0, 250), (200, 200, i)).save(root / f"{i}.png")
    assert "--tile 4 to cut them, or --tile 1" in refusal(capsys, found, root, rows)
    assert len(found(root, rows, tile=1)[1]) == 2
    _, matched, *_ = layouts.find_images(root, rows, tile=4)
    colors = [Image.open(path).getpixel((0, 0)) for row, _, path in matched if row["id"] == "1"]
    assert colors == [(9, 0, 0), (0, 99, 0), (0, 0, 250), (200, 200, 1)]
    assert [k for _, k, _ in matched] == [0, 1, 2, 3] * 2


def test_pictures_of_dpg_prompts_may_be_tiles(tmp_path, capsys):
    make(tmp_path / "images", "p0.png")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/p0.txt").write_text("a red car")
    rows = load_prompts(tmp_path / "prompts")
    assert "--tile" in refusal(capsys, found, tmp_path / "images", rows, tmp_path / "prompts")
    assert "--tile" in refusal(capsys, found, tmp_path / "images", [rows[0] | {"propositions": []}])
    assert found(tmp_path / "images", rows, tmp_path / "prompts", tile=1)[0] == "id"


def test_a_damaged_tile_is_one_picture_without_a_score(tmp_path):
    root, rows = make(tmp_path / "tiles", "0.png"), rows_of("a", "b")
    (root / "1.png").write_bytes(b"\x89PNG no more")
    _, matched, *_ = layouts.find_images(root, rows, tile=4)
    assert [row["id"] for row, *_ in matched] == ["0"] * 4 + ["1"]


# --- a folder holds one command's pictures --------------------------------------------------------


def draw(root, prompts, num_images, **settings):
    rows = [{"id": str(i), "prompt": text, "tag": ""} for i, text in enumerate(prompts)]
    sample = lambda prompts, keys: ([picture()] * len(prompts), [""] * len(prompts))
    write_pictures(rows, sample, {"seed": 1, **settings}, root, num_images, 64)


def files_of(root):
    files = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return sorted(set(files) - {".lock"})


LAYOUTS = ["t2i-compbench", "wise", "dpg", "hpdv2"]


@pytest.mark.parametrize("prompts", [TEXTS[:1], ["another", "file"]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_leaves_no_files_of_an_earlier_one(layout, prompts, tmp_path):
    for n, texts in ((8, TEXTS), (4, prompts)):
        draw(tmp_path / "out", texts, n)
        exports.export(tmp_path / "out", layout, tmp_path / "used")
    exports.export(tmp_path / "out", layout, tmp_path / "fresh")
    assert files_of(tmp_path / "used") == files_of(tmp_path / "fresh")


def test_a_folder_serves_one_layout_after_another(tmp_path):
    draw(tmp_path / "out", TEXTS, 4)
    for layout in [*LAYOUTS, *LAYOUTS[::-1]]:
        exports.export(tmp_path / "out", layout, tmp_path / "used")
    assert os.listdir(tmp_path / "used") == ["samples"]
    assert len(os.listdir(tmp_path / "used/samples")) == 12


def test_the_styles_of_hpdv2_are_exported_into_one_folder(tmp_path):
    for style, texts in (("anime", TEXTS), ("photo", TEXTS[:2]), ("anime", TEXTS[:1])):
        draw(tmp_path / "out", texts, 1)
        exports.export(tmp_path / "out", "hpdv2", tmp_path / "h", style)
    assert files_of(tmp_path / "h") == ["anime/00000.jpg", "photo/00000.jpg", "photo/00001.jpg"]


@pytest.mark.parametrize("change", ["a new file", "an exported file", "the list"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_export_did_not_write_is_never_removed(layout, change, tmp_path, capsys):
    draw(tmp_path / "out", TEXTS, 4)
    exports.export(tmp_path / "out", layout, tmp_path / "used")
    place = tmp_path / "used" / {"t2i-compbench": "samples", "hpdv2": "photo"}.get(layout, ".")
    if change == "a new file":
        picture().save(place / "mine.png")
    elif change == "an exported file":
        picture((1, 2, 3)).save(next(place.iterdir()), "PNG")
    else:
        (tmp_path / "used.manifest.json").write_text('{"layout": ')
    before = {name: (tmp_path / "used" / name).read_bytes() for name in files_of(tmp_path / "used")}
    draw(tmp_path / "out", TEXTS[:1], 4)
    message = refusal(capsys, exports.export, tmp_path / "out", layout, tmp_path / "used")
    assert "did not write" in message and "another --output-dir" in message
    assert before == {n: (tmp_path / "used" / n).read_bytes() for n in files_of(tmp_path / "used")}


def test_an_export_that_was_stopped_is_made_again(tmp_path, monkeypatch):
    draw(tmp_path / "out", TEXTS, 1)
    opened = exports.opened
    first_only = lambda path: opened(path) if path.parts[-3] == "00000" else 1 / 0
    monkeypatch.setattr(exports, "opened", first_only)
    with pytest.raises(ZeroDivisionError):
        exports.export(tmp_path / "out", "wise", tmp_path / "used")
    (tmp_path / "used/.1.png.0123abcd.partial").write_bytes(b"half")
    monkeypatch.setattr(exports, "opened", opened)
    exports.export(tmp_path / "out", "wise", tmp_path / "used")
    assert files_of(tmp_path / "used") == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    "layout, field, name",
    [
        ("t2i-compbench", "prompt", "a red_circle"),  # its scorer ends the prompt there
        ("dpg", "id", "a.b"),  # and this one the id
        ("wise", "id", "a\nb"),
        ("wise", "id", "é" * 120),  # 240 bytes
        ("wise", "id", "../a"),
    ],
)
def test_a_name_that_its_scorer_does_not_read_is_refused(layout, field, name, tmp_path, capsys):
    draw(tmp_path / "out", TEXTS, 4)
    lines = [entry | {field: name} for entry in read_manifest(tmp_path / "out").values()]
    write_jsonl(tmp_path / "out/manifest.jsonl", lines)
    assert "no file name" in refusal(
        capsys, exports.export, tmp_path / "out", layout, tmp_path / "no"
    )


def test_a_missing_or_damaged_picture_is_not_exported(tmp_path, capsys):
    draw(tmp_path / "out", TEXTS, 1)
    (tmp_path / "out/00001/samples/0000.png").unlink()
    args = (exports.export, tmp_path / "out", "wise", tmp_path / "used")
    assert "missing or damaged" in refusal(capsys, *args)
    assert "lists no pictures" in refusal(capsys, exports.export, tmp_path, "wise", tmp_path / "x")


def test_a_sample_keeps_its_number_where_others_are_missing(tmp_path):
    """Else two folders would be compared picture by picture, made from different noise."""
    draw(tmp_path / "out", TEXTS[:1], 4)
    (tmp_path / "out/00000/samples/0001.png").unlink()
    _, matched, *_ = layouts.find_images(tmp_path / "out", rows_of(*TEXTS[:1]))
    assert [k for _, k, _ in matched] == [0, 2, 3]


def test_a_stopped_command_leaves_no_folder_without_pictures(tmp_path):
    """GenEval's scorer lists the samples of each folder, and ends where there are none."""
    calls = []

    def stops(prompts, keys):
        calls.append(keys)
        return ([picture()], [""]) if len(calls) == 1 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        write_pictures(rows_of(*TEXTS), stops, {"seed": 1}, tmp_path / "out", 1, 1)
    assert files_of(tmp_path / "out")[:2] == ["00000/metadata.jsonl", "00000/samples/0000.png"]
    assert not list((tmp_path / "out").glob("00001/*"))
    # Nor where another prompt had pictures before.
    draw(tmp_path / "again", TEXTS, 1)
    with pytest.raises(ZeroDivisionError):
        new = rows_of(TEXTS[0], "new", TEXTS[2])
        write_pictures(new, lambda *_: 1 / 0, {"seed": 1}, tmp_path / "again", 1, 1)
    assert not (tmp_path / "again/00001").exists() and (tmp_path / "again/00002").exists()
    # Nor where a stopped command had only begun.
    (tmp_path / "again/00003").mkdir()
    (tmp_path / "again/00003/metadata.jsonl").write_text("{}")
    theirs = tmp_path / "again/00004"  # what is not ours stays
    theirs.mkdir()
    for name in ("metadata.jsonl", "photo.jpg"):
        (theirs / name).write_text("{}")
    (tmp_path / "again/00005").write_text("a file")
    draw(tmp_path / "again", TEXTS[:1], 1)
    left = sorted(path.name for path in (tmp_path / "again").glob("0*"))
    assert left == ["00000", "00004", "00005"] and len(list(theirs.iterdir())) == 2


def test_what_only_resembles_an_unfinished_file_of_ours_stays(tmp_path, capsys):
    draw(tmp_path / "out", TEXTS, 1)
    (tmp_path / "used/.d.0123abcd.partial").mkdir(parents=True)
    (tmp_path / "used/.notes.partial").write_text("mine")
    refusal(capsys, exports.export, tmp_path / "out", "wise", tmp_path / "used")
    assert (tmp_path / "used/.notes.partial").read_text() == "mine"


# --- generate.py's own folder ---------------------------------------------------------------------


def test_one_command_at_a_time_writes_into_a_folder(tmp_path, capsys):
    _held = files.lock(tmp_path / "out", "--output-dir")
    assert "choose another --output-dir" in refusal(capsys, draw, tmp_path / "out", TEXTS, 1)


def test_a_picture_that_is_not_the_one_that_was_made_is_made_again(tmp_path, capsys):
    draw(tmp_path / "out", TEXTS, 1)
    path = tmp_path / "out/00001/samples/0000.png"
    made = path.read_bytes()
    picture((1, 2, 3)).save(path)
    draw(tmp_path / "out", TEXTS, 1)
    assert path.read_bytes() == made and "1 pictures made" in capsys.readouterr().out


def test_a_smaller_command_sets_the_other_pictures_aside(tmp_path, capsys):
    draw(tmp_path / "out", TEXTS, 4)
    draw(tmp_path / "out", TEXTS[:2], 1)
    assert files_of(tmp_path / "out") == [
        "00000/metadata.jsonl",
        "00000/samples/0000.png",
        "00001/metadata.jsonl",
        "00001/samples/0000.png",
        "manifest.jsonl",
    ]
    assert "10 pictures of an earlier command are now in" in capsys.readouterr().out
    assert len(read_manifest(tmp_path / "out")) == 2
    assert len(read_manifest(tmp_path / "out-earlier")) == 10
    draw(tmp_path / "out", TEXTS[:1], 1)
    assert len(read_manifest(tmp_path / "out-earlier2")) == 1


@pytest.mark.parametrize("name", ["00000/samples/0000.png", "00007/samples/0000.png"])
def test_pictures_of_somebody_else_are_neither_replaced_nor_mixed_in(name, tmp_path, capsys):
    make(tmp_path / "out", name)
    before = (tmp_path / "out" / name).read_bytes()
    assert "not in its manifest" in refusal(capsys, draw, tmp_path / "out", ["a"], 1)
    assert files_of(tmp_path / "out") == [name]
    assert (tmp_path / "out" / name).read_bytes() == before


def test_a_picture_of_an_old_prompt_never_lies_beside_a_new_one(tmp_path):
    """Even if the command is stopped before it draws."""
    draw(tmp_path / "out", TEXTS, 2)
    fails = lambda prompts, keys: 1 / 0
    with pytest.raises(ZeroDivisionError):
        write_pictures(rows_of("new", *TEXTS[1:]), fails, {"seed": 1}, tmp_path / "out", 2, 2)
    assert not (tmp_path / "out/00000/samples/0000.png").exists()
    assert (tmp_path / "out/00001/samples/0000.png").exists()


@pytest.mark.parametrize(
    "line",
    [
        '{"path": ',
        '{"path": "00000/samples/0009.png"}',
        "[]",
        '{"path": "../../x.png"}',
        "\0" * 9,
        "3",
    ],
)
def test_a_damaged_line_of_the_manifest_costs_its_picture_only(line, tmp_path, capsys):
    draw(tmp_path / "out", TEXTS, 1)
    with open(tmp_path / "out/manifest.jsonl", "a") as file:
        file.write(line)
    capsys.readouterr()
    draw(tmp_path / "out", TEXTS, 1)
    assert "0 pictures made, 3 were there already" in capsys.readouterr().out
    assert len(read_manifest(tmp_path / "out")) == 3
