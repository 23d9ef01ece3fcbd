"""Untrusted images: whatever a file is or contains, it is opened or refused, and nothing else is opened or started."""

import io
import os
import socket
import struct
import warnings
import zlib

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from PIL import Image
from watching import OUTSIDE, check_inside, used_or_refused, watched

from saccade.data.conversation import convert
from saccade.data.folders import ImageFolders
from saccade.data.sources import found
from saccade.errors import RecordError
from saccade.images import FORMATS, image_size, open_image

MAX_PIXELS = 10_000
SIDES = (40, 24)


def stored(kind, mode="RGB", size=SIDES, **options):
    stream = io.BytesIO()
    image = Image.effect_noise(size, 80)
    image.convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def exif(*entries):
    """EXIF data in TIFF's form, of entries (tag, type, count, value or offset)."""
    fields = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + fields + bytes(4)


FRAMES = {"save_all": True, "append_images": [Image.new("L", SIDES, number) for number in (3, 90)]}
WHOLE = {
    "JPEG": stored("JPEG"),
    "progressive JPEG": stored("JPEG", progressive=True),
    "CMYK": stored("JPEG", "CMYK"),
    "turned JPEG": stored("JPEG", exif=exif((0x0112, 3, 1, 6))),
    "JPEG with odd EXIF": stored(
        "JPEG", exif=exif((0x0112, 3, 1, 99), (0x8769, 4, 1, 0xFFFFFFF0), (0x010E, 2, 1 << 30, 8))
    ),
    "PNG": stored("PNG"),
    "PNG with opacity": stored("PNG", "RGBA"),
    "PNG of 16 bits": stored("PNG", "I;16"),
    "PNG of a palette": stored("PNG", "P", transparency=3),
    "PNG of bits": stored("PNG", "1"),
    "animated PNG": stored("PNG", "L", **FRAMES),
    "animated GIF": stored("GIF", "L", **FRAMES),
    "WebP": stored("WEBP", exif=exif((0x0112, 3, 1, 5))),
    "animated WebP": stored("WEBP", "RGBA", **FRAMES),
    "TIFF": stored("TIFF"),
    "packed TIFF": stored("TIFF", compression="tiff_lzw"),
    "TIFF of pages": stored("TIFF", "L", **FRAMES),
    "TIFF of floats": stored("TIFF", "F"),
    "BMP": stored("BMP"),
    "BMP of a palette": stored("BMP", "P"),
    "JPEG 2000": stored("JPEG2000"),
    "AVIF": stored("AVIF"),
    "icon": stored("ICO", "RGBA"),
    "TGA": stored("TGA", compression="tga_rle"),
    "PPM": stored("PPM"),
    "PCX": stored("PCX"),
    "QOI": stored("QOI", "RGB"),
}
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
PLACES = st.one_of(st.integers(0, 63), st.integers(0, 4000))


@st.composite
def images(draw):
    """A whole image with a few of its bytes changed, numbers in it replaced, pieces cut out, doubled or appended."""
    content = bytearray(WHOLE[draw(st.sampled_from(sorted(WHOLE)))])
    for _ in range(draw(st.integers(0, 4))):
        place = draw(PLACES) % max(1, len(content))
        how = draw(st.sampled_from(("flip", "number", "cut", "remove", "double", "append")))
        if how == "flip":
            if content:
                content[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "number":
            form = draw(st.sampled_from(("<H", ">H", "<I", ">I")))
            number = draw(st.sampled_from(NUMBERS)) & (0xFFFF if form[1] == "H" else 0xFFFFFFFF)
            content[place : place + struct.calcsize(form)] = struct.pack(form, number)
        elif how == "cut":
            del content[place:]
        elif how == "remove":
            del content[place : place + draw(st.integers(1, 64))]
        elif how == "double":
            content[place:place] = content[place : place + draw(st.integers(1, 64))]
        else:
            content += WHOLE[draw(st.sampled_from(sorted(WHOLE)))]
    return bytes(content)


def check_one_line(error):
    event(error.kind)
    assert "\n" not in str(error)
    assert error.kind in RecordError.KINDS


@settings(max_examples=400)
@given(content=images())
def test_damaged_images_open_within_the_limit_or_are_bad_records(content):
    """No other error, no warning, and nothing opened: of damaged bytes too the pixels are counted before they are
    decoded."""
    for read in (open_image, image_size):
        with watched() as events, warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                seen = read({"bytes": content, "path": OUTSIDE}, max_pixels=MAX_PIXELS)
            except RecordError as error:
                check_one_line(error)
            else:
                width, height = seen if read is image_size else seen.size
                assert 0 < width * height <= MAX_PIXELS
                assert read is image_size or seen.mode == "RGB"
        check_inside(events)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    (path / "inside").mkdir()
    return path / "inside"


def used(name, folder, collator):
    """What becomes of a row of an image file that is called so."""
    words = [{"role": "user", "content": "<image> how many ?"}, {"role": "assistant", "content": "3"}]
    folders = ImageFolders([folder])
    return used_or_refused(lambda: found(convert({"messages": words, "images": [name]}), folders), collator, folder)


@settings(max_examples=100)
@given(content=images(), name=st.sampled_from(("a.png", "a.jpg", "a.eps", "a.txt", "a", "<image>.gif", "é.bmp")))
def test_a_damaged_file_of_any_name_is_used_or_refused(folder, collator, content, name):
    (folder / name).write_bytes(content)
    event(str(used(name, folder, collator)))


NAMES = st.text("ab./\\~*\0\n \xe9\u202e\ud800", max_size=40) | st.sampled_from(
    ("a" * 5000, "a/" * 3000, "file:///etc/hostname")
)


@settings(max_examples=200)
@given(name=NAMES)
def test_any_name_is_refused_where_there_is_no_file(tmp_path_factory, collator, name):
    assert used(name, tmp_path_factory.getbasetemp(), collator) is not None


def make_fifo(path, outside):
    os.mkfifo(path)


def make_socket(path, outside):
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket is short
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


KINDS_OF_FILE = {
    "a folder": lambda path, outside: path.mkdir(),
    "a pipe": make_fifo,
    "a socket": make_socket,
    "a link to a file outside": lambda path, outside: path.symlink_to(outside / "secret.png"),
    "a link to a folder outside": lambda path, outside: path.symlink_to(outside),
    "a link to a device": lambda path, outside: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path, outside: path.symlink_to(path.name),
    "a link to nothing": lambda path, outside: path.symlink_to("nothing"),
    "a link by way of a folder": lambda path, outside: path.symlink_to("../inside/../secret.png"),
}


@pytest.mark.parametrize("kind", KINDS_OF_FILE)
def test_what_is_no_file_is_a_bad_record(kind, tmp_path, collator):
    inside = tmp_path / "inside"
    inside.mkdir()
    Image.new("RGB", SIDES).save(tmp_path / "secret.png")
    KINDS_OF_FILE[kind](inside / "a.png", tmp_path)
    assert used("a.png", inside, collator) in ("missing_image", "outside_image_folders")
    if kind == "a link to a folder outside":
        assert used("a.png/secret.png", inside, collator) == "outside_image_folders"
    if kind not in ("a link to a file outside", "a link by way of a folder"):
        # A path of the user's own is opened wherever it leads, and is waited for nowhere.
        with pytest.raises(RecordError, match=r"is not a file|does not exist|cannot be decoded"):
            open_image(str(inside / "a.png"))


# What a file says it is

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"


def iptc(inner):
    """A picture of IPTC's, whose content is any other image."""

    def field(record, number, value):
        return bytes((0x1C, record, number)) + struct.pack(">H", len(value)) + value

    sizes = field(3, 20, struct.pack(">H", 20)) + field(3, 30, struct.pack(">H", 20))
    return field(3, 60, b"\1\0") + field(3, 65, b"\0") + sizes + field(3, 120, b"\0\0\0\5") + field(8, 10, inner)


REFUSED = {
    "PostScript": POSTSCRIPT,
    "PostScript in IPTC": iptc(POSTSCRIPT),
    "an image in IPTC": iptc(WHOLE["PNG"]),
    "XBM": b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {\n" + b"0x00, " * 8 + b"};\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:9/a.png"/></svg>',
    "HTML": b"<html><img src='/etc/hostname'></html>",
    "a script": b"#!/bin/sh\ntouch harm\n",
}


@pytest.mark.parametrize("name", REFUSED)
def test_formats_that_are_more_than_a_picture_are_refused(name, tmp_path, monkeypatch):
    """Also as an image that Pillow opened and has not decoded: its content would be read, or run, when it is."""
    # Were there a Ghostscript, it would be started.
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", str(tmp_path / "gs"))
    path = tmp_path / "a.png"
    path.write_bytes(REFUSED[name])
    given = [path, {"bytes": REFUSED[name], "path": None}]
    if "IPTC" in name or name in ("PostScript", "XBM"):
        given.append(Image.open(path))
        assert given[-1].format not in FORMATS
    for image in given:
        with watched() as events, pytest.raises(RecordError) as error:
            open_image(image)
        assert error.value.kind == "not_an_image"
        check_inside(events, tmp_path)


def png_of(width, height):
    """A PNG of a few bytes that says it has so many pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def icon_of(inner):
    """An icon that claims to have 16 x 16 pixels and contains a PNG of another size."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


BITMAP = b"BM" + struct.pack("<IIIIiiHHIIIIII", 60, 0, 54, 40, 60_000, -60_000, 1, 24, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (png_of(60_000, 60_000), "decompression_bomb"),
        (png_of(2**31 - 1, 2**31 - 1), "decompression_bomb"),
        (png_of(0, 5), "not_an_image"),
        (png_of(5, 0), "not_an_image"),
        (png_of(1, 1000), "aspect_ratio"),
        (icon_of(stored("PNG", size=(200, 200))), "decompression_bomb"),
        (BITMAP, "decompression_bomb"),
    ],
)
def test_sizes_that_a_few_bytes_claim(content, kind):
    with pytest.raises(RecordError) as error:
        open_image({"bytes": content, "path": "a.png"}, max_pixels=MAX_PIXELS)
    assert error.value.kind == kind
