"""The fonts of documents and charts, in three splits that share no family."""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

from saccade.errors import SaccadeError

REQUIREMENTS = "requirements-smol.txt"


@dataclass(frozen=True)
class Font:
    """A font that a package brings along.

    Args:
        family: its name.
        package: the Python package.
        file: in that package's folder.
        scale: of its letters, beside those of other fonts of the same size.
    """

    family: str
    package: str
    file: str
    scale: float = 1.0

    @property
    def path(self) -> Path:
        """Its file.

        Raises:
            SaccadeError: if the package is not installed.
        """
        return package_folder(self.package) / self.file


def _styles(
    family: str, package: str, files: str, styles: tuple[str, ...], scales: tuple[float, ...]
) -> tuple[Font, ...]:
    return tuple(Font(family, package, files.format(style), scale) for style in styles for scale in scales)


_MATPLOTLIB = "mpl-data/fonts/ttf/{}.ttf"
_DEJAVU = ("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Italic")
_ROBOTO = ("Light", "Regular", "Medium", "Bold", "Italic")
_SOURCE = ("Light", "Regular", "Semibold", "Bold", "It")
_WIDE, _NARROW = (0.92, 1.0), (1.0, 1.08)

FONTS: dict[str, tuple[Font, ...]] = {
    # Many weights, slants and sizes, so that the tower learns letters and not the shapes of a few files.
    "train": (
        *_styles("DejaVu", "matplotlib", _MATPLOTLIB, _DEJAVU, _WIDE),
        *_styles("Roboto", "font_roboto", "files/Roboto-{}.ttf", _ROBOTO, _NARROW),
        *_styles("Source Sans Pro", "font_source_sans_pro", "files/SourceSansPro-{}.ttf", _SOURCE, _NARROW),
        *_styles("Source Serif Pro", "font_source_serif_pro", "files/SourceSerifPro-{}.ttf", _SOURCE, _WIDE),
    ),
    "validation": (
        Font("Caladea", "font_caladea", "files/Caladea-Regular.ttf"),
        Font("Hanken Grotesk", "font_hanken_grotesk", "files/HankenGrotesk-Medium.otf"),
    ),
    "test": (
        Font("Manrope", "font_manrope", "files/Manrope-Medium.ttf"),
        Font("STIX", "matplotlib", _MATPLOTLIB.format("STIXGeneral")),
    ),
}


def package_folder(package: str) -> Path:
    """Where an installed package lies, found without running it.

    Raises:
        SaccadeError: if it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SaccadeError(f"{package} is not installed: pip install --no-deps -r {REQUIREMENTS}")
    return Path(spec.submodule_search_locations[0])


@lru_cache(maxsize=256)
def load_font(font: Font, size: int) -> ImageFont.FreeTypeFont:
    """A font at a size in pixels.

    Raises:
        SaccadeError: if its package is not installed.
    """
    # Pillow's simple layout: the other one depends on a library that not every machine has.
    return ImageFont.truetype(font.path, size * font.scale, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=2**16)
def text_width(font: Font, size: int, text: str) -> float:
    """Pixels that a line of text is wide.

    Raises:
        SaccadeError: as `load_font`.
    """
    return load_font(font, size).getlength(text)
