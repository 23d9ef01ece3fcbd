"""An image looks the same everywhere: one function opens it, for training, evaluation and the documented snippets."""

import io
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from transformers import CLIPImageProcessorPil
from transformers.image_utils import load_image

from saccade.dualspeed.collator import DualSpeedCollator
from saccade.errors import RecordError
from saccade.evaluation.digits import collate_prompts, prepare_prompts
from saccade.images import image_size, open_image
from saccade.tiny import load_tiny

ROOT = Path(__file__).parent.parent
ORIENTATION = 0x0112

UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}
"""What each EXIF orientation asks for, in an array of rows, columns and channels."""


def picture(mode: str = "RGB", width: int = 40, height: int = 24) -> Image.Image:
    """A picture that no turn leaves as it is; in modes with opacity, from transparent on the left to opaque."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([255 * x / (width - 1), 255 * y / (height - 1), 255 * (x + 2 * y) / (width + 2 * height)], axis=-1)
    image = Image.fromarray(rgb.astype(np.uint8))
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray((255 * x / (width - 1)).astype(np.uint8)))
    return image if image.mode == mode else image.convert(mode)


def stored(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(orientation: int) -> bytes:
    """EXIF data with an orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif.tobytes()


def opened(content: bytes | Image.Image) -> np.ndarray:
    """The pixels of what `open_image` makes of a file's content or a PIL image, silently."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image({"bytes": content} if isinstance(content, bytes) else content)
    assert image.mode == "RGB"
    assert np.array_equal(open_image(image), image), "it is turned or composited twice"
    assert np.array_equal(as_processors_do(image), image), "the processor changes it"
    return np.asarray(image)


def as_processors_do(image: Image.Image) -> np.ndarray:
    """The pixels, rows first, that an image processor of transformers takes a PIL image for."""
    return np.moveaxis(CLIPImageProcessorPil().process_image(image, do_convert_rgb=True), 0, -1)


def on_white(image: Image.Image) -> np.ndarray:
    """The oracle: each channel of `image` (RGBA) over white, by its opacity."""
    values = np.asarray(image.convert("RGBA"), dtype=np.float64)
    alpha = values[..., 3:] / 255
    return alpha * values[..., :3] + (1 - alpha) * 255


# Turned upright

SAVES = {
    "JPEG": {},
    "PNG": {},
    "WEBP": {},
    "TIFF": {},
    "lzw": {"compression": "tiff_lzw"},
    "MPO": {"save_all": True, "append_images": [picture()]},
} | ({"AVIF": {}} if features.check("avif") else {})


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_upright_whatever_the_format(save, orientation):
    kind = "TIFF" if save == "lzw" else save
    plain = stored(picture(), kind, **SAVES[save])
    content = stored(picture(), kind, **SAVES[save], exif=turned(orientation))
    decoded = np.asarray(Image.open(io.BytesIO(plain)).convert("RGB"))
    expected = UPRIGHT[orientation](decoded)
    assert np.array_equal(opened(content), expected)
    assert image_size({"bytes": content}) == (expected.shape[1], expected.shape[0])
    given = Image.open(io.BytesIO(content))
    assert np.array_equal(opened(given), expected)
    assert image_size(given) == image_size({"bytes": content})


def test_an_orientation_in_xmp_counts_once():
    packet = b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><r tiff:Orientation="6"/></x:xmpmeta>'
    content = stored(picture(), "WEBP", lossless=True, xmp=packet)
    assert np.array_equal(opened(content), np.rot90(np.asarray(picture()), -1))


def test_a_converted_image_still_turns_and_is_not_changed():
    """`convert` drops the file and keeps the note on how to turn it."""
    given = Image.open(io.BytesIO(stored(picture(), "PNG", exif=turned(6)))).convert("RGB")
    assert opened(given).shape == (40, 24, 3)
    assert (given.size, given.getexif()[ORIENTATION]) == ((40, 24), 6)


def raw_exif(*fields: bytes, start: bytes = b"Exif\0\0MM\0*\0\0\0\x08") -> bytes:
    """EXIF data of one directory, whatever is in its fields of 12 bytes."""
    return start + struct.pack(">H", len(fields)) + b"".join(fields) + bytes(4)


SIX = struct.pack(">HHIHH", ORIENTATION, 3, 1, 6, 0)
OUTSIDE = struct.pack(">HHII", 0x010F, 2, 4000, 70_000)  # a camera's name that lies behind the end of the data
DAMAGED = {
    "a field that leads nowhere": (raw_exif(OUTSIDE, SIX), 6),
    "a field that cannot be written": (raw_exif(SIX, struct.pack(">HHII", 0x8769, 4, 1, 9_999)), 6),
    "orientation 9": (raw_exif(struct.pack(">HHIHH", ORIENTATION, 3, 1, 9, 0)), 1),
    "orientation 0": (raw_exif(struct.pack(">HHIHH", ORIENTATION, 3, 1, 0, 0)), 1),
    "a text": (raw_exif(struct.pack(">HHI4s", ORIENTATION, 2, 4, b"six\0")), 1),
    "two numbers": (raw_exif(struct.pack(">HHIHH", ORIENTATION, 3, 2, 6, 6)), 6),
    "cut off": (raw_exif(SIX)[:17], 1),
    "no directory": (b"Exif\0\0MM", 1),
    "not TIFF": (b"Exif\0\0nonsense of some length", 1),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_exif_data_ends_no_run(case, kind):
    exif, orientation = DAMAGED[case]
    plain, content = stored(picture(), kind), stored(picture(), kind, exif=exif)
    expected = UPRIGHT[orientation](np.asarray(Image.open(io.BytesIO(plain)).convert("RGB")))
    assert np.array_equal(opened(content), expected)
    assert image_size({"bytes": content}) == (expected.shape[1], expected.shape[0])


def test_the_exif_data_is_never_written_anew(monkeypatch):
    """Writing it fails on fields that were read: Pillow's own way to turn an image does, on such photos."""

    def unwritable(*arguments, **options):
        raise struct.error("argument out of range")

    monkeypatch.setattr(ImageFileDirectory_v2, "tobytes", unwritable)
    content = stored(picture(), "PNG", exif=raw_exif(SIX))
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(opened(content), np.rot90(np.asarray(picture()), -1))


# Transparency


def palette(transparency: int | bytes) -> bytes:
    image = picture().quantize(16)
    return stored(image, "PNG", transparency=transparency)


def palette_with_alpha() -> Image.Image:
    image = picture("P").convert("PA")
    image.putalpha(picture("LA").getchannel("A"))
    return image


SEE_THROUGH = {
    "RGBA": lambda: stored(picture("RGBA"), "PNG"),
    "RGBA, WebP": lambda: stored(picture("RGBA"), "WEBP", lossless=True),
    "RGBA, TIFF": lambda: stored(picture("RGBA"), "TIFF"),
    "LA": lambda: stored(picture("LA"), "PNG"),
    "PA": palette_with_alpha,
    "palette, one colour": lambda: palette(3),
    "palette, opacities": lambda: palette(bytes(range(0, 256, 16))),
    "palette, GIF": lambda: stored(picture().quantize(16), "GIF", transparency=3),
    "grey, one value": lambda: stored(picture("L"), "PNG", transparency=int(np.asarray(picture("L"))[3, 3])),
    "RGB, one colour": lambda: stored(picture(), "PNG", transparency=tuple(map(int, np.asarray(picture())[3, 3]))),
    "black and white": lambda: stored(picture("1"), "PNG", transparency=0),
}


@pytest.mark.parametrize("case", SEE_THROUGH)
def test_what_is_transparent_is_white(case):
    content = SEE_THROUGH[case]()
    given = Image.open(io.BytesIO(content)) if isinstance(content, bytes) else content
    seen, expected = opened(content), on_white(given)
    assert (np.asarray(given.convert("RGBA"))[..., 3] < 255).any(), "nothing is transparent in it"
    assert np.abs(seen - expected).max() <= 1
    # To the bit as the processors of transformers do it, in the versions in which they do.
    if (as_processors_do(Image.new("RGBA", (1, 1))) == 255).all():
        assert np.array_equal(seen, as_processors_do(given))


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_colours(mode):
    straight = picture("RGBA" if mode == "RGBa" else "LA")
    assert np.abs(opened(straight.convert(mode)) - on_white(straight)).max() <= 2


def test_a_palette_of_colours_with_opacity():
    image = Image.new("P", (4, 2))
    image.putpalette([255, 0, 0, 255, 0, 255, 0, 0], "RGBA")
    image.putpixel((1, 0), 1)
    assert opened(image)[0, :2].tolist() == [[255, 0, 0], [255, 255, 255]]


# Values of more than 8 bits


def ramp(top: float, bottom: float = 0.0) -> np.ndarray:
    return np.linspace(bottom, top, 96).reshape(8, 12)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_16_bits_are_scaled(mode):
    values = ramp(65535).round().astype(np.uint16)
    order = values.astype(">u2" if mode == "I;16B" else "<u2" if mode in ("I;16", "I;16L") else np.uint16)
    image = Image.frombytes(mode, (12, 8), order.tobytes())
    assert np.array_equal(opened(image)[..., 0], (values / 257).round())


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_in_files_turned_and_transparent(kind):
    values = ramp(65535, 4).round().astype(np.uint16)
    image = Image.frombytes("I;16", (12, 8), values.astype("<u2").tobytes())
    options = {"PNG": {"exif": turned(6), "transparency": 4}, "TIFF": {"exif": turned(6)}, "PPM": {}}[kind]
    expected = (values / 257).round()
    if kind == "PNG":
        expected[0, 0] = 255
    expected = expected if kind == "PPM" else np.rot90(expected, -1)
    assert np.array_equal(opened(stored(image, kind, **options)), np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize(("top", "full"), [(1.0, 1), (0.5, 1), (255.0, 255), (90.0, 255)])
def test_floats_are_scaled(top, full):
    image = Image.fromarray(ramp(top).astype(np.float32))
    assert image.mode == "F"
    for given in (image, stored(image, "TIFF")):
        assert np.abs(opened(given)[..., 1] - ramp(255 * top / full)).max() <= 0.51


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_all_black_is_black(mode):
    assert not opened(Image.new(mode, (5, 4))).any()


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("I;16", ramp(200)),
        ("I;16", ramp(4000)),
        ("I", ramp(65536)),
        ("I", ramp(2**31 - 1, -(2**31))),
        ("I", ramp(9, -9)),
        ("F", ramp(300)),
        ("F", ramp(1, -1)),
        ("F", ramp(0.05)),
        ("F", ramp(9)),
        ("F", np.where(ramp(1) > 0.5, np.nan, 0.9)),
        ("F", np.where(ramp(1) > 0.5, np.inf, 0.9)),
    ],
)
def test_values_on_no_known_scale_are_refused(mode, values):
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    image = Image.fromarray(values.astype(dtype))
    assert image.mode == mode
    with pytest.raises(RecordError, match=r"image has values from .* save it with 8 bits per channel") as error:
        open_image(image)
    assert error.value.kind == "value_range"


# Other modes and files


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"])
def test_colours_are_converted(mode):
    image = picture().quantize(64) if mode == "P" else Image.new(mode, (6, 4), 0) if mode == "LAB" else picture(mode)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(opened(image), expected)
    if mode in ("CMYK", "LAB"):
        assert np.array_equal(opened(stored(image, "TIFF")), expected)
    if mode == "CMYK":
        assert np.abs(opened(stored(image, "JPEG", quality=100)).astype(int) - expected).max() < 16


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert (opened(content) == [255, 0, 0]).all()


# What cannot be used

ERRORS = [struct.error, KeyError, IndexError, OverflowError, MemoryError, RuntimeError, TypeError, AssertionError]
ERRORS += [ZeroDivisionError, AttributeError, NotImplementedError, EOFError, SyntaxError, OSError, ValueError]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("place", ["open", "load", "convert"])
def test_whatever_a_decoder_raises_is_a_bad_record(kind, place, tmp_path, monkeypatch):
    picture("L").save(tmp_path / "a.png")

    def fails(*arguments, **options):
        raise kind("some\nreason") if kind is not MemoryError else kind

    owner = Image if place == "open" else Image.Image
    if place == "load":
        from PIL.PngImagePlugin import PngImageFile as owner
    monkeypatch.setattr(owner, place, fails)
    reason = "MemoryError" if kind is MemoryError else "some.*reason"
    with pytest.raises(RecordError, match=rf"a.png' cannot be decoded \(.*{reason}.*\): replace it") as error:
        open_image(tmp_path / "a.png")
    assert error.value.kind == "truncated_image"
    assert "\n" not in str(error.value)
    if place == "open":
        with pytest.raises(RecordError, match="has no header that Pillow can read"):
            image_size(tmp_path / "a.png")


def test_a_strip_of_a_few_bytes_cannot_take_all_memory(tmp_path):
    Image.new("RGB", (30_000, 1)).save(tmp_path / "strip.png")
    assert (tmp_path / "strip.png").stat().st_size < 200
    for read in (open_image, image_size):
        for size in ((30_000, 1), (1, 201), (2, 401)):
            with pytest.raises(RecordError, match=rf"{size[0]} x {size[1]} pixels, one side more than 200") as error:
                read(tmp_path / "strip.png" if size[0] == 30_000 else Image.new("L", size))
            assert error.value.kind == "aspect_ratio"
        read(Image.new("RGB", (2, 400)))
        with pytest.raises(RecordError, match="0 x 3 pixels"):
            read(Image.new("RGB", (0, 3)))


# The same pixels in training, in evaluation and in the documented snippets

ZOO = {
    "photo lying on its side": lambda: stored(picture(), "JPEG", exif=turned(6)),
    "mirrored": lambda: stored(picture(), "WEBP", exif=turned(5)),
    "transparent": lambda: stored(picture("RGBA"), "PNG"),
    "transparent, on its side": lambda: stored(picture("RGBA"), "PNG", exif=turned(8)),
    "palette": lambda: palette(3),
    "animation": lambda: stored(picture("P"), "GIF", save_all=True, append_images=[picture("P", 40, 24).rotate(180)]),
    "16 bits": lambda: stored(Image.fromarray(ramp(65535).astype(np.uint16)), "PNG", exif=turned(3)),
    "float": lambda: stored(Image.fromarray(ramp(1).astype(np.float32)), "TIFF", exif=turned(6)),
    "CMYK": lambda: stored(picture("CMYK"), "JPEG", exif=turned(6)),
    "grey": lambda: stored(picture("L"), "PNG"),
    "damaged EXIF": lambda: stored(picture(), "JPEG", exif=DAMAGED["a field that leads nowhere"][0]),
}


@pytest.fixture(scope="module")
def tiny():
    return load_tiny()


def snippets() -> list[tuple[str, str]]:
    """Blocks of Python in README and docs that open an image and process it, up to what the processor gives."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            lines = block.splitlines()
            processed = [number for number, line in enumerate(lines) if line.startswith("inputs = processor")]
            if processed and 'open_image("' in block:
                found.append((page.name, "\n".join(lines[: processed[0] + 1])))
    return found


def test_the_pages_open_images_as_training_does():
    assert {page for page, _ in snippets()} == {"dualspeed.md", "prune-at-inference.md"}
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert "Image.open(" not in page.read_text(), f"{page.name}: use open_image"


@pytest.mark.filterwarnings("ignore:Tag data larger")  # of Pillow, where the test itself opens a damaged photo
@pytest.mark.parametrize("case", ZOO)
def test_every_path_gives_the_processor_the_same_pixels(case, tiny, tmp_path):
    model, processor = tiny
    path = tmp_path / "image"
    path.write_bytes(ZOO[case]())
    words = [{"role": "user", "content": "<image>\nhow many ?"}, {"role": "assistant", "content": "3"}]
    row = {"messages": words, "images": [str(path)]}
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    pixels = {
        "training": DualSpeedCollator(processor, placeholder_id=image_id)([row])["pixel_values"],
        "evaluation": collate_prompts(processor, [row])["pixel_values"],
    }
    # A benchmark hands over what its data set decoded, with the note on how to turn it.
    for name, given in {"a path": str(path), "a PIL image": Image.open(path)}.items():
        content = [{"type": "image", "image": given}, {"type": "text", "text": "how many ?"}]
        pixels[name] = prepare_prompts(processor, [[{"role": "user", "content": content}]])["pixel_values"]
    for page, block in snippets():
        names = {"model": model, "processor": processor}
        exec(re.sub(r'open_image\("[^"]+"\)', f"open_image({str(path)!r})", block), names)
        pixels[page] = names["inputs"]["pixel_values"]
    for name, found in pixels.items():
        assert torch.equal(found, pixels["training"]), name


def test_what_the_pages_say_of_transformers():
    """Given a PIL image, its processors do not turn it; given a path, it is turned, and its opacity lost."""
    on_its_side = Image.open(io.BytesIO(stored(picture(), "PNG", exif=turned(6))))
    assert as_processors_do(on_its_side).shape == (24, 40, 3)
    assert open_image(on_its_side).size == load_image(on_its_side).size == (24, 40)
    transparent = picture("RGBA")
    assert np.array_equal(load_image(transparent), transparent.convert("RGB"))
    assert not np.array_equal(load_image(transparent), opened(transparent))
    deep = Image.fromarray(ramp(65535, 300).astype(np.uint16))
    assert (np.asarray(load_image(deep)) == 255).all()
    assert (as_processors_do(deep) == 255).all()
