"""fastattr/corpus/images.py: every stored form of one picture comes out as that picture."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from fastattr import InputError
from fastattr.corpus.images import check_image, load_rgb, looks_like_an_image, to_rgb

Y, X = np.mgrid[0:32, 0:32]
GREY = ((X * 8) % 256).astype(np.uint8)
DEEP = GREY.astype(np.uint16) * 257
COLOUR = Image.fromarray(np.dstack([GREY, GREY.T, 255 - GREY]))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def worst(found: Image.Image, wanted: Image.Image) -> int:
    assert found.mode == "RGB"
    return int(np.abs(np.asarray(found).astype(int) - np.asarray(wanted.convert("RGB")).astype(int)).max())


def big_endian_tiff(values: np.ndarray) -> bytes:
    data = values.astype(">u2").tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 16), (259, 1), (262, 1), (277, 1), (278, height)]
    entries = [struct.pack(">HHII", tag, 3, 1, value << 16) for tag, value in tags]
    entries += [struct.pack(">HHII", 273, 4, 1, 8), struct.pack(">HHII", 279, 4, 1, len(data))]
    entries.sort()
    directory = struct.pack(">H", len(entries)) + b"".join(entries) + b"\0\0\0\0"
    return b"MM\0*" + struct.pack(">I", 8 + len(data)) + data + directory


GREYS = {
    "png 8": encoded(Image.fromarray(GREY), "PNG"),
    "png 16": encoded(Image.fromarray(DEEP), "PNG"),
    "tiff 16": encoded(Image.fromarray(DEEP), "TIFF"),
    "tiff 16 big-endian": big_endian_tiff(DEEP),
    "tiff 32, 16-bit values": encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
    "tiff 32, 8-bit values": encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
    "tiff float to 1": encoded(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"),
    "tiff float to 255": encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "tiff float to 65535": encoded(Image.fromarray(DEEP.astype(np.float32)), "TIFF"),
    "gif": encoded(Image.fromarray(GREY), "GIF"),
    "pgm 16": b"P5 32 32 65535\n" + DEEP.astype(">u2").tobytes(),
    "jpeg 2000": encoded(Image.fromarray(GREY), "JPEG2000"),
    "tga": encoded(Image.fromarray(GREY), "TGA"),
}


@pytest.mark.parametrize("name", GREYS)
def test_every_depth_of_a_grey_picture_is_that_picture(name):
    """A float TIFF became black, a 32-bit one was cut off at white, and neither was reported."""
    assert check_image(GREYS[name]) == ""
    assert worst(load_rgb(GREYS[name]), Image.fromarray(GREY)) <= 1
    with Image.open(io.BytesIO(GREYS[name])) as opened:
        assert worst(to_rgb(opened), Image.fromarray(GREY)) <= 1


@pytest.mark.parametrize(
    ("image", "kind", "tolerance"),
    [
        (COLOUR.convert("CMYK"), "TIFF", 2),
        (COLOUR.convert("CMYK"), "JPEG", 30),
        (COLOUR, "AVIF", 60),
        (COLOUR, "PPM", 0),
        (COLOUR, "QOI", 0),
        (COLOUR.convert("P", palette=Image.Palette.ADAPTIVE, colors=256), "PNG", 40),
    ],
)
def test_every_kind_of_colour_is_that_picture(image, kind, tolerance):
    """CMYK read as inks of light, or a palette read as grey, shows another picture."""
    assert worst(load_rgb(encoded(image, kind)), COLOUR) <= tolerance


def test_lab_becomes_rgb():
    """Pillow refuses to convert Lab by itself: a photographer's TIFF stopped the corpus."""
    from PIL import ImageCms

    lab = ImageCms.profileToProfile(COLOUR, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    assert np.abs(np.asarray(to_rgb(lab)).astype(int) - np.asarray(COLOUR).astype(int)).mean() < 6
    assert check_image(encoded(lab, "TIFF")) == ""


@pytest.mark.parametrize("values", [[[-1.0, 0.5]], [[float("nan"), 0.5]], [[0.0, 1e9]], [[float("inf"), 0.0]]])
def test_pixels_without_a_white_are_refused_with_their_range(values):
    """A guess would make a picture that nobody has seen; black instead of the picture would be silent."""
    image = Image.fromarray(np.array(values, dtype=np.float32))
    with pytest.raises(InputError, match="save the image with 8 or 16 bits"):
        to_rgb(image)
    assert "the pixels go from" in check_image(encoded(image, "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_orientation_is_the_same_for_bytes_paths_and_pillow_images(tmp_path, kind, orientation):
    """A phone's picture lay on its side where it came as a Pillow image, and stood where it came as a file."""
    upright = COLOUR.resize((40, 24))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that store what the tag turns back
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {"quality": 100}))
    (tmp_path / "x").write_bytes(data)
    found = load_rgb(data)
    assert found.size == (40, 24)
    assert worst(found, upright) <= (40 if kind == "JPEG" else 0)
    assert load_rgb(tmp_path / "x").tobytes() == found.tobytes() == to_rgb(Image.open(tmp_path / "x")).tobytes()
    assert to_rgb(found).tobytes() == found.tobytes()  # and not turned twice


def test_a_damaged_exif_block_hides_no_picture():
    """Cameras and editors write broken blocks; every viewer shows the picture all the same."""
    data = encoded(COLOUR, "PNG", exif=b"Exif\0\0not a TIFF header at all")
    assert worst(load_rgb(data), COLOUR) == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_is_laid_on_white(mode):
    """Black under a transparent drawing changes every feature."""
    clear = Image.new({"LA": "LA", "La": "LA", "PA": "PA"}.get(mode, "RGBA"), (4, 4))
    clear = clear.convert(mode) if mode in {"RGBa", "La"} else clear
    assert (np.asarray(to_rgb(clear)) == 255).all()


@pytest.mark.parametrize(("values", "clear"), [(GREY, 0), (DEEP, 0), (DEEP, 257 * 8)])
def test_a_transparent_grey_value_becomes_white(values, clear):
    """The value is declared beside the pixels (tRNS), and lost when they are scaled first."""
    found = np.asarray(load_rgb(encoded(Image.fromarray(values), "PNG", transparency=clear)))
    assert (found[values == clear] == 255).all()
    assert worst(Image.fromarray(found[:, 2:]), Image.fromarray(GREY[:, 2:])) <= 1


def test_programs_are_not_run_on_files_that_strangers_sent():
    """EPS would start Ghostscript."""
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    assert check_image(data) == "not a readable image (unknown format)"


def test_a_picture_is_known_by_its_bytes(tmp_path):
    """A file without a suffix, or with a wrong one, is a picture all the same; a text is none."""
    for name, data, wanted in [
        ("a", GREYS["png 8"], True),
        ("b.dat", GREYS["gif"], True),
        ("c", b"P3 text", False),
        ("d", b"", False),
    ]:
        (tmp_path / name).write_bytes(data)
        assert looks_like_an_image(tmp_path / name) is wanted
