"""One function opens every picture: what is shown is scored, and damage costs one score."""

import base64
import io
import math
import random
import struct
import threading
import zlib

import numpy as np
import pytest
import requests
import torch
from PIL import Image

import artifact_reward
import evaluate
import rewards
from evaluation import labels
from reward_models.clip import Aesthetic, PickScore
from reward_models.pixels import data_url, from_data_url
from reward_models.serving import serve
from training import decode, pictures
from training.pictures import cut_sheet, save_sheet


def scene(width=48, height=32):
    """A picture without any symmetry: each corner has its own color."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((np.stack([x, y, x * y], -1) * 255).astype(np.uint8))


def file_of(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gray(values, kind="PNG"):
    return decode.decode(file_of(Image.fromarray(values), kind))


def same(a, b):
    return (a.mode, a.size, a.tobytes()) == (b.mode, b.size, b.tobytes())


# --- what is shown is what is scored


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_an_ordinary_picture_keeps_its_pixels(kind):
    data = file_of(scene(), kind)
    assert same(decode.decode(data), Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_modes_without_transparency_are_converted_as_pillow_does(mode):
    image = scene().convert(mode)
    assert same(decode.to_rgb(image), image.convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("held", range(1, 9))
def test_a_picture_is_turned_upright_as_its_exif_data_say(kind, held):
    back = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}.get(held)  # how the camera turned it
    stored = scene() if back is None else scene().transpose(decode.UPRIGHT[back])
    exif = Image.Exif()
    exif[decode.ORIENTATION] = held
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    opened = decode.decode(file_of(stored, kind, exif=exif, **options.get(kind, {})))
    distance = np.abs(np.asarray(opened, int) - np.asarray(scene(), int)) if opened else None
    assert opened.size == scene().size and distance.max() < 8
    assert same(decode.to_rgb(opened), opened)  # and not turned once more


def test_zeros_after_the_end_of_a_jpeg_cost_nothing():
    data = file_of(scene(), "JPEG")
    assert same(decode.decode(data + bytes(4096)), decode.decode(data))


def test_damaged_exif_data_cost_nothing():
    data = file_of(scene(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40)
    assert same(decode.decode(data), Image.open(io.BytesIO(data)).convert("RGB"))


def transparent(mode):
    """(a file with a transparent left half, the same over white), by each way to say it."""
    image = scene().convert("RGB")
    left = (0, 0, 24, 32)
    over_white = image.copy()
    over_white.paste("white", left)
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        alpha = Image.new("L", image.size, 255)
        alpha.paste(0, left)
        image.putalpha(alpha)
        over_white = over_white if mode == "RGBA" else over_white.convert("L").convert("RGB")
        return file_of(image), over_white
    if mode == "RGB":
        image.paste((1, 2, 3), left)
        return file_of(image, transparency=(1, 2, 3)), over_white
    if mode == "L":
        flat = image.convert("L").point(lambda value: max(value, 9))
        over_white = flat.convert("RGB")
        flat.paste(7, left)
        over_white.paste("white", left)
        return file_of(flat, transparency=7), over_white
    if mode == "I;16":
        values = np.asarray(image.convert("L")).astype(np.uint16) * 257
        values[:, :24] = 0
        over_white = Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
        over_white.paste("white", left)
        return file_of(Image.fromarray(values), transparency=0), over_white
    flat = Image.new("P", image.size, 1)
    flat.putpalette([10, 20, 30, 40, 50, 60])
    flat.paste(0, left)
    over_white = flat.convert("RGB")
    over_white.paste("white", left)
    return file_of(flat, mode, transparency=0), over_white


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGB", "L", "I;16", "PNG", "GIF"])
def test_what_is_transparent_shows_white(mode):
    data, over_white = transparent(mode)
    assert same(decode.decode(data), over_white)


def test_half_transparent_is_half_white():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert decode.decode(file_of(image)).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("factor", [256, 257])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(kind, factor):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    expected = Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    assert same(gray(levels * factor, kind), expected)


@pytest.mark.parametrize(
    "dtype, top", [(np.float32, 1), (np.float32, 255), (np.float32, 65535), (np.int32, 65535)]
)
def test_wide_types_are_scaled_to_eight_bits(dtype, top):
    levels = np.arange(256).reshape(16, 16)
    opened = gray((levels / 255 * top).astype(dtype), "TIFF")
    assert np.abs(np.asarray(opened, int)[..., 0] - levels).max() <= 1


def test_an_overshoot_of_floats_is_cut():
    values = np.linspace(-0.05, 1.05, 256, dtype=np.float32).reshape(16, 16)
    opened = np.asarray(gray(values, "TIFF"))
    assert opened.min() == 0 and opened.max() == 255 and abs(opened.mean() - 127.5) < 2


@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0, math.nan], [0.0, math.inf], [0.0, 1e9]])
def test_floats_that_are_no_gray_levels_are_refused(values):
    with pytest.raises(decode.BadPicture, match="gray levels"):
        gray(np.array([values], np.float32), "TIFF")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_one_counts(kind):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:])
    red = decode.decode(data).getpixel((8, 8))
    assert red[0] > 200 and red[2] < 60


def test_a_picture_in_memory_is_read_like_one_in_a_file(hps, artifact):
    data, over_white = transparent("RGBA")
    image = Image.open(io.BytesIO(data))
    for reward in (hps, artifact, rewards.load("brightness"), rewards.load("jpeg")):
        assert reward(["a star"], [image]).equal(reward(["a star"], [over_white]))
    assert same(from_data_url(data_url(image)), over_white)


# --- what cannot be opened


def bomb(width=20000, height=20000):
    """A PNG of a few hundred bytes that says it has this many pixels."""

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def noise(side=64):
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    return Image.fromarray(values)


def bad_files():
    """name -> (bytes, a part of the reason)."""
    png, jpeg = file_of(noise()), file_of(noise(), "JPEG")
    wrong = bytearray(png)
    wrong[len(png) // 2] ^= 0xFF
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    text = struct.pack(">I", 4) + b"zTXt"
    return {
        "bomb.png": (bomb(), "ixels"),
        "smaller_bomb.png": (bomb(9000, 9000), "pixels are too many"),
        "no_pixels.png": (bomb(0, 8), ""),
        "wide.png": (file_of(Image.new("RGB", (1093, 5))), "too narrow"),
        "high.png": (file_of(Image.new("RGB", (1, 201))), "too narrow"),
        "half.png": (png[: len(png) // 2], "truncated"),
        "header.png": (png[:40], ""),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "zeros.jpg": (jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2), "zeros"),
        "half.webp": (file_of(noise(), "WEBP")[:500], ""),
        "half.gif": (file_of(noise(), "GIF")[:900], "truncated"),
        "half.bmp": (file_of(noise(), "BMP")[:900], "truncated"),
        "half.tif": (file_of(noise(), "TIFF")[:900], ""),
        "crc.png": (bytes(wrong), ""),
        "chunk.png": (png[:33] + text + b"\0\0\0\0" + png[33:], ""),
        "empty.png": (b"", "empty"),
        "zeros.png": (bytes(5000), "no format"),
        "lfs.png": (pointer, "git lfs pull"),
        "photo.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        "text.png": (b"<html>404 not found</html>", "no format"),
        "picture.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no format"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_a_bad_picture_is_refused_with_one_line(name, tmp_path, capsys):
    data, reason = bad_files()[name]
    (tmp_path / name).write_bytes(data)
    assert decode.open_picture(tmp_path / name) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / name}: not a readable picture (") and reason in line


def test_what_is_no_file_is_refused_too(tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    for name in ("folder.png", "link.png", "gone.png", "nul\0.png", "x" * 300 + ".png"):
        assert decode.open_picture(tmp_path / name) is None
        assert decode.file_digest(tmp_path / name) == ""
    assert len(capsys.readouterr().err.splitlines()) == 5


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for size in ((20000, 20000), (9000, 9000)):
        with pytest.raises(decode.BadPicture):
            decode.decode(bomb(*size))


@pytest.mark.parametrize("url", [None, 7, "", "data:image/png;base64,", "data:,###", "http://x/y"])
def test_a_text_that_is_no_picture_is_refused(url):
    with pytest.raises(decode.BadPicture):
        from_data_url(url)


DAMAGED = [file_of(noise(16), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")]
DAMAGED += [transparent(mode)[0] for mode in ("RGBA", "LA", "RGB", "L", "I;16", "PNG")]


@pytest.mark.parametrize("seed", range(len(DAMAGED)))
def test_no_damage_ends_in_another_error(seed):
    rng = random.Random(seed)
    for _ in range(60):
        data = bytearray(DAMAGED[seed][: rng.choice([None, rng.randrange(len(DAMAGED[seed]))])])
        for _ in range(rng.randrange(6) if data else 0):
            data[int(len(data) * rng.random() ** 3)] = rng.randrange(256)  # often in the header
        try:
            image = decode.decode(bytes(data))
        except decode.BadPicture as problem:
            assert str(problem)
        else:
            assert image.mode == "RGB" and min(image.size) > 0


# --- commands: one bad picture costs one score


@pytest.fixture
def folder(tmp_path):
    """Two good pictures, and every bad one."""
    scene().save(tmp_path / "a.png")
    scene().transpose(Image.Transpose.ROTATE_180).save(tmp_path / "z.png")
    for name, (data, _) in bad_files().items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def ends(main, cfg):
    with pytest.raises(SystemExit) as stop:
        main(cfg)
    return stop.value.code


def test_the_judges_command_keeps_every_other_score(folder, capsys):
    names = sorted(map(str, folder.iterdir()))
    assert ends(artifact_reward.main, artifact_reward.Config(tuple(names))) == 3
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(names) and out.count("nan") == len(bad_files())
    assert len(err.splitlines()) == len(bad_files())


def test_the_rewards_command_keeps_every_other_score(folder, capsys):
    names = tuple(sorted(map(str, folder.iterdir())))
    cfg = rewards.Config("score", "hps,stats", names, prompt="a star")
    assert ends(rewards.main, cfg) == 3
    out, err = capsys.readouterr()
    assert sum("nan" in line for line in out.splitlines()) == len(bad_files())
    assert len(err.splitlines()) == len(bad_files())


def test_evaluate_keeps_every_other_score(folder, capsys):
    names = sorted(folder.iterdir())
    matched = [
        ({"id": "0", "prompt": "a star", "tag": ""}, k, name) for k, name in enumerate(names)
    ]
    loaded = {name: rewards.load(name, checkpoint="tiny") for name in ("hps", "artifact")}
    records = evaluate.score_images(matched, loaded, [], lambda records: None)
    good = [record["path"] for record in records if math.isfinite(record["hps"])]
    assert good == [record["path"] for record in records if math.isfinite(record["artifact"])]
    assert good == [str(folder / "a.png"), str(folder / "z.png")]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) <= len(bad_files())  # once, not for each reward


def test_a_pair_with_a_missing_or_damaged_picture_has_failed(folder, capsys):
    lines = [("a.png", "z.png"), ("a.png", "gone.png"), ("half.png", "z.png")]
    rows = [f'{{"prompt": "a star", "clean": "{a}", "broken": "{b}"}}\n' for a, b in lines]
    (folder / "test.jsonl").write_text("".join(rows))
    cfg = evaluate.Config(pairs=str(folder), rewards="hps,artifact")
    assert ends(evaluate.main, cfg) == 3
    out, err = capsys.readouterr()
    assert err.count("error: ") == 2
    for line in out.splitlines()[2:]:
        cells = [cell.strip() for cell in line.split("|")]
        assert sum(map(int, cells[2:5])) == 1 and cells[5] == "2"


@pytest.mark.parametrize("text", ["", "{}\n", '{"prompt": "a", "clean": "a.png"}\n'])
def test_a_list_of_pairs_that_is_none_is_refused(text, folder, capsys):
    (folder / "test.jsonl").write_text(text)
    assert ends(evaluate.main, evaluate.Config(pairs=str(folder), rewards="hps")) == 2
    assert "test.jsonl" in capsys.readouterr().err


def test_a_picture_that_a_server_cannot_read_costs_one_score():
    server = serve("jpeg", rewards.load("jpeg"), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    half = base64.b64encode(file_of(noise())[:900]).decode()
    pictures = [data_url(noise()), f"data:image/png;base64,{half}", "", data_url(noise())]
    body = {"prompts": ["a star"] * 4, "metadata": [{}] * 4, "images": pictures}
    reply = requests.post(f"http://127.0.0.1:{server.server_port}/score", json=body)
    server.shutdown()
    a, b, c, d = reply.json()["scores"]
    assert a == d is not None and b is None and c is None


def test_other_files_in_a_folder_of_labelled_pictures_are_left_out(tmp_path, capsys):
    for kind in ("clean", "broken"):
        (tmp_path / kind).mkdir()
        for i in range(12):
            noise(8).save(tmp_path / kind / f"prompt {i}__0.png")
        for name in (".DS_Store", "Thumbs.db", "._prompt 1__0.png", "notes.txt", "README"):
            (tmp_path / kind / name).write_bytes(b"x")
        (tmp_path / kind / "folder.png").mkdir()
    splits = labels.load_examples(tmp_path)
    found = [example["path"].name for examples in splits.values() for example in examples]
    assert len(found) == 24 and all(name.startswith("prompt") for name in found)
    assert "5 files are no pictures" in capsys.readouterr().out


def test_a_sheet_may_be_larger_than_any_picture(monkeypatch, tmp_path):
    """Pillow takes a picture of over 178 million pixels for a bomb; a sheet of 1300 has more."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(20)]
    save_sheet(images, tmp_path / "sheet.png")
    cut = cut_sheet(tmp_path / "sheet.png", 20)
    assert [image.getpixel((0, 0))[0] for image in cut] == [*range(20)]
    assert cut_sheet(tmp_path / "sheet.png", 0) == []
    monkeypatch.setattr(pictures, "MAX_SHEET", 2047)
    assert cut_sheet(tmp_path / "sheet.png", 20) == [None] * 20


@pytest.mark.parametrize("kind, first", [(PickScore, 1), (Aesthetic, 2)])
def test_a_crop_is_that_of_the_original(kind, first):
    """227 x 341 becomes 224 x 336 (int, not round) and so on. A rest of 3 is cut as 1 and 2 by
    transformers (PickScore), and as 2 and 1 by torchvision's int(round(3 / 2))."""
    image = Image.effect_noise((227, 230), 80).convert("RGB")  # 224 * 230 / 227 = 226.96
    scaled = image.resize((224, 226), Image.BICUBIC)
    assert kind.make_square(image, 224).tobytes() == scaled.crop((0, 1, 224, 225)).tobytes()
    image = Image.effect_noise((224, 227), 80).convert("RGB")
    expected = image.crop((0, first, 224, first + 224))
    assert kind.make_square(image, 224).tobytes() == expected.tobytes()


def test_a_score_of_opened_pictures_has_a_place_for_each():
    count = {"n": lambda prompts, images, rows: torch.arange(len(images)).float()}
    scores = rewards.score_opened(count, list("abc"), [None, scene(), scene()], [{}] * 3)["n"]
    assert scores[1:].tolist() == [0, 1] and scores[0].isnan()
    assert rewards.score_opened(count, ["a"], [None])["n"].isnan().all()
