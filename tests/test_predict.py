"""predict: how a picture is prepared for the network, and what is printed about each file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from fashion_cnn.cli import cli
from fashion_cnn.commands import pictures
from fashion_cnn.commands.pictures import read_picture
from fashion_cnn.data.fashion_mnist import CLASSES
from fashion_cnn.models.cnns import build_cnn, fresh, save_weights
from fashion_cnn.project.errors import StageError


def save(folder: Path, picture: Image.Image, name: str = "picture.png") -> Path:
    picture.save(folder / name)
    return folder / name


def drawn(size: tuple[int, int], box: tuple[int, int, int, int], mode: str = "L", back=255, garment=0):
    """A rectangle on a plain background; it excludes the box's right and lower edges."""
    picture = Image.new(mode, size, back)
    left, top, right, bottom = box
    ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), fill=garment)
    return picture


BLOCK = np.zeros((28, 28), np.uint8)
BLOCK[:, 7:21] = 255  # twice as high as wide, from edge to edge


@pytest.mark.parametrize("box", [(30, 20, 80, 120), (100, 40, 150, 140)])
def test_dark_garment_on_white(tmp_path, box):
    """A dark garment on white is inverted and fills the middle."""
    seen = read_picture(save(tmp_path, drawn((300, 200), box)))
    assert seen.inverted
    assert (seen.image == BLOCK).all()


def test_light_garment_on_black(tmp_path):
    """A light garment on black is not inverted."""
    seen = read_picture(save(tmp_path, drawn((90, 90), (10, 4, 50, 84), back=0, garment=255)))
    assert not seen.inverted
    assert (seen.image == BLOCK).all()


def test_small_garment(tmp_path):
    """A small garment is enlarged."""
    seen = read_picture(save(tmp_path, drawn((40, 40), (8, 8, 12, 16))))
    assert (seen.image == BLOCK).all()


def test_shrink_by_area(tmp_path):
    """A picture is shrunk by averaging over areas.

    56×56 pixels: the right half is 255, each 2×2 of the left is 200, 100, 60 and 40, with mean 100.
    """
    left, right = np.tile([[200, 100], [60, 40]], (28, 14)), np.full((56, 28), 255)
    garment = np.hstack([left, right]).astype(np.uint8)
    seen = read_picture(save(tmp_path, Image.fromarray(np.pad(garment, 9))))
    assert (seen.image == np.repeat([100, 255], 14)).all()


def test_grey_background(tmp_path):
    """A grey background becomes black, and the lighter garment on it becomes white."""
    seen = read_picture(save(tmp_path, drawn((90, 90), (20, 2, 60, 82), back=100, garment=200)))
    assert not seen.inverted
    assert (seen.image == BLOCK).all()


@pytest.mark.parametrize(("back", "garment", "inverted"), [(200, 255, False), (100, 20, True)])
def test_light_and_dark_grey(tmp_path, back, garment, inverted):
    """A white garment is found on light grey, and a dark one on dark grey."""
    seen = read_picture(save(tmp_path, drawn((300, 200), (30, 20, 80, 120), back=back, garment=garment)))
    assert seen.inverted == inverted
    assert (seen.image == BLOCK).all()


def test_out_of_memory(tmp_path, monkeypatch):
    """A picture that does not fit into memory is named in the error."""

    def refuse(picture, factor):
        raise MemoryError

    monkeypatch.setattr(pictures, "reduced", refuse)
    with pytest.raises(StageError, match=r"picture\.png: too large for the memory here"):
        read_picture(save(tmp_path, drawn((9, 9), (2, 2, 5, 5))))


def test_pale_garment(tmp_path):
    """A pale garment is given full contrast, and the low contrast is reported as a doubt."""
    seen = read_picture(save(tmp_path, drawn((300, 200), (30, 20, 80, 120), garment=225)))
    assert (seen.image == BLOCK).all()
    assert seen.doubts == ["little contrast: the garment differs by 30 of 255"]


def test_hole_in_a_garment(tmp_path):
    """Background inside a garment becomes black."""
    picture = drawn((300, 200), (30, 20, 80, 120))
    ImageDraw.Draw(picture).rectangle((45, 50, 64, 89), fill=255)
    assert read_picture(save(tmp_path, picture)).image[14, 14] == 0


def test_darkening_background(tmp_path):
    """A background that darkens evenly is not taken for a garment."""
    sheet = np.linspace(255, 155, 300) + np.zeros((200, 1))
    sheet[20:120, 30:80] = 0
    seen = read_picture(save(tmp_path, Image.fromarray(np.rint(sheet).astype(np.uint8))))
    assert ((seen.image > 0) == (BLOCK > 0)).all()
    assert seen.image[seen.image > 0].min() > 230
    assert seen.doubts == []


def test_noisy_background(tmp_path):
    """Noise is not taken for a garment."""
    noise = np.random.default_rng(0).normal(0, 10, (200, 300))
    sheet = drawn((300, 200), (30, 20, 80, 120), back=230) + noise
    seen = read_picture(save(tmp_path, Image.fromarray(sheet.clip(0, 255).astype(np.uint8))))
    off_its_edges = np.ix_(range(2, 26), [*range(5), *range(10, 18), *range(23, 28)])
    assert (abs(seen.image - BLOCK.astype(int))[off_its_edges] < 20).all()


def test_noise_alone(tmp_path):
    """A picture of noise alone counts as blank."""
    sheet = np.random.default_rng(0).normal(128, 20, (40, 40)).clip(0, 255)
    with pytest.raises(StageError, match="blank"):
        read_picture(save(tmp_path, Image.fromarray(sheet.astype(np.uint8))))


def test_lighter_and_darker_parts(tmp_path):
    """A garment with parts both lighter and darker than its background is doubtful."""
    picture = drawn((300, 200), (30, 20, 80, 120), back=128, garment=0)
    ImageDraw.Draw(picture).rectangle((40, 40, 70, 80), fill=255)
    [doubt] = read_picture(save(tmp_path, picture)).doubts
    assert doubt.startswith("some parts are lighter than the background, others darker")


def test_speck(tmp_path):
    """A speck is not taken for a garment."""
    picture = drawn((300, 200), (30, 20, 80, 120))
    picture.putpixel((250, 150), 0)
    assert (read_picture(save(tmp_path, picture)).image == BLOCK).all()


def test_busy_border_and_small_garment(tmp_path):
    """A busy border and a small garment are doubtful."""
    stripes = np.tile(np.repeat([255, 120], 10), (200, 15)).astype(np.uint8)
    busy, *_ = read_picture(save(tmp_path, Image.fromarray(stripes))).doubts
    assert busy.startswith("its border is busy: ")
    [small] = read_picture(save(tmp_path, drawn((40, 40), (8, 8, 12, 16)))).doubts
    assert small == "small: the garment has 4×8 pixels"


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_without_scale(tmp_path, kind):
    """Numbers without a scale are read by their own range."""
    values = (np.array(drawn((300, 200), (30, 20, 80, 120))) / 255).astype(np.float32)
    values = values if kind == np.float32 else values.astype(kind) * 700
    assert (read_picture(save(tmp_path, Image.fromarray(values), "picture.tiff")).image == BLOCK).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "I;16"])
def test_large_picture(tmp_path, monkeypatch, mode):
    """A large picture is reduced first and gives the same image."""
    monkeypatch.setattr(pictures, "ENOUGH", 15_000)
    picture = drawn((300, 200), (30, 20, 80, 120))
    if mode == "I;16":
        picture = Image.fromarray(np.array(picture, np.uint16) * 257)
    seen = read_picture(save(tmp_path, picture.convert(mode)))
    assert (seen.image == BLOCK).all()


def test_data_set_image(tmp_path, images):
    """An image of the data set stays as it is, and its negative is inverted."""
    dark = images[0] // 2
    seen = read_picture(save(tmp_path, Image.fromarray(dark)))
    assert (seen.image == dark).all()
    assert not seen.inverted
    seen = read_picture(save(tmp_path, Image.fromarray(255 - dark)))
    assert (seen.image == dark).all()
    assert seen.inverted


@pytest.mark.parametrize("mode", ["1", "RGB", "RGBA", "LA", "P", "CMYK"])
def test_picture_modes(tmp_path, mode):
    """The mode of a picture does not change the result."""
    picture = drawn((300, 200), (30, 20, 80, 120)).convert(mode)
    seen = read_picture(save(tmp_path, picture, "picture.tiff"))
    assert seen.inverted
    assert (seen.image == BLOCK).all()


def test_16_bits(tmp_path):
    """A picture with 16 bits per pixel is read like one with 8."""
    grey = np.array(drawn((300, 200), (30, 20, 80, 120)), np.uint16) * 257
    seen = read_picture(save(tmp_path, Image.fromarray(grey)))
    assert seen.inverted
    assert (seen.image == BLOCK).all()


@pytest.mark.parametrize(("garment", "inverted"), [((250, 250, 250, 255), False), ((5, 5, 5, 255), True)])
def test_transparent_background(tmp_path, garment, inverted):
    """A transparent background becomes black behind a light garment and white behind a dark one."""
    picture = drawn((300, 200), (30, 20, 80, 120), "RGBA", back=(255, 255, 255, 0), garment=garment)
    seen = read_picture(save(tmp_path, picture))
    assert seen.inverted == inverted
    assert (seen.image == BLOCK).all()


def test_exif_orientation(tmp_path):
    """A photograph is turned as its camera says in the EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° clockwise
    picture = drawn((200, 300), (20, 30, 120, 80))
    picture.save(tmp_path / "turned.png", exif=exif)
    seen = read_picture(tmp_path / "turned.png")
    assert (seen.image == BLOCK).all()


def cut_short(folder: Path) -> Path:
    path = save(folder, Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90), np.uint8)))
    path.write_bytes(path.read_bytes()[:2000])
    return path


def text(folder: Path) -> Path:
    (folder / "picture.png").write_text("no picture")
    return folder / "picture.png"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (text, "not a picture that Pillow reads"),
        (lambda folder: folder / "absent.png", "No such file or directory"),
        (lambda folder: folder, "Is a directory"),
        (cut_short, "truncated"),
        (lambda folder: save(folder, Image.new("RGB", (50, 50), "red")), "blank"),
        (
            lambda folder: save(folder, Image.new("1", (170_000, 1000))),
            "170 megapixels, expected at most 100$",
        ),
        (lambda folder: save(folder, Image.new("F", (9, 9), float("nan")), "picture.tiff"), "not finite"),
    ],
)
def test_not_a_picture(tmp_path, make, words):
    """A file that is not a usable picture is named in one line."""
    path = make(tmp_path)
    with pytest.raises(StageError, match=words) as error:
        read_picture(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.fixture
def weights(tmp_path) -> Path:
    save_weights(fresh(build_cnn, 0), tmp_path / "cnn.safetensors")
    return tmp_path / "cnn.safetensors"


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli(["predict", *map(str, arguments)], standalone_mode=False)
    return int(stop.value.code), *capsys.readouterr()


def test_one_bad_file(workspace, tmp_path, weights, capsys):
    """Each file gets its answer, and a bad one does not stop the others."""
    (bad := tmp_path / "bad.png").write_text("no picture")
    good = save(tmp_path, drawn((300, 200), (30, 20, 80, 120)))
    code, told, faults = run(capsys, bad, good, "--model", weights, "--show", tmp_path / "seen")
    assert code == 1
    assert faults.startswith(f"error: {bad}: not a picture that Pillow reads")
    assert told.startswith(f"{good}: ")
    answer, doubt = told.splitlines()
    assert answer.endswith(" % (inverted: darker than its background)")
    assert doubt == "  doubtful: no class has a probability above one half"  # these weights are not trained
    assert (np.asarray(Image.open(tmp_path / "seen/picture.png.28x28.png")) == BLOCK).all()


def test_probabilities(workspace, tmp_path, weights, images, capsys):
    """The probabilities are those of the model."""
    path = save(tmp_path, Image.fromarray(images[1] // 2))
    code, told, _ = run(capsys, path, "--model", weights, "--json")
    [one] = json.loads(told)
    with torch.inference_mode():
        logits = fresh(build_cnn, 0)(torch.from_numpy(images[1] // 2)[None, None].float() / 255)[0].double()
    expected = (logits.exp() / logits.exp().sum()).sort(descending=True)
    assert (code, one["inverted"]) == (0, False)
    assert [guess["class"] for guess in one["top"]] == [CLASSES[n] for n in expected.indices[:3]]
    found = [guess["probability"] for guess in one["top"]]
    assert found == pytest.approx(expected.values[:3].tolist(), abs=1e-4)


def test_missing_model(workspace, tmp_path, capsys):
    """A missing model is named in the error."""
    (tmp_path / "picture.png").touch()
    with pytest.raises(StageError, match=r"no-such-model: not found"):
        run(capsys, tmp_path / "picture.png", "--model", "no-such-model")


def test_missing_model_while_training(workspace, tmp_path, capsys):
    """While DVC remakes a missing model, the error says to wait for it."""
    users = {"write": {"models/cnn_augmented.safetensors": {"pid": os.getpid(), "cmd": "dvc"}}}
    (workspace / ".dvc/tmp").mkdir(parents=True)
    (workspace / ".dvc/tmp/rwlock").write_text(json.dumps(users))
    (tmp_path / "picture.png").touch()
    with pytest.raises(StageError, match="`dvc` is remaking it; wait until that ends"):
        run(capsys, tmp_path / "picture.png", "--model", "models/cnn_augmented.safetensors")
    with pytest.raises(StageError, match="other: not found; expected weights"):
        run(capsys, tmp_path / "picture.png", "--model", "other")


def test_missing_picture(workspace):
    """A missing picture is refused before torch is imported."""
    code = "import sys\nfrom fashion_cnn.cli import main\nfrom fashion_cnn.project import process\n"
    code += "process.os._exit = lambda code: print(code, 'torch' in sys.modules)\nmain()"
    command = [sys.executable, "-c", code, "predict", "absent.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "'absent.png' does not exist" in done.stderr
    assert done.stdout.split() == ["2", "False"]
