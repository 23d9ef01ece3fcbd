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
    """

    family: str
    package: str
    file: str

    @property
    def path(self) -> Path:
        """Its file.

        Raises:
            SaccadeError: if the package is not installed.
        """
        return package_folder(self.package) / self.file


FONTS: dict[str, tuple[Font, ...]] = {
    "train": (
        Font("DejaVu Sans", "matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf"),
        Font("Roboto", "font_roboto", "files/Roboto-Regular.ttf"),
        Font("Source Sans Pro", "font_source_sans_pro", "files/SourceSansPro-Semibold.ttf"),
        Font("Source Serif Pro", "font_source_serif_pro", "files/SourceSerifPro-Semibold.ttf"),
    ),
    "validation": (
        Font("Caladea", "font_caladea", "files/Caladea-Regular.ttf"),
        Font("Hanken Grotesk", "font_hanken_grotesk", "files/HankenGrotesk-Medium.otf"),
    ),
    "test": (
        Font("Manrope", "font_manrope", "files/Manrope-Medium.ttf"),
        Font("STIX", "matplotlib", "mpl-data/fonts/ttf/STIXGeneral.ttf"),
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
    return ImageFont.truetype(font.path, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=2**16)
def text_width(font: Font, size: int, text: str) -> float:
    """Pixels that a line of text is wide.

    Raises:
        SaccadeError: as `load_font`.
    """
    return load_font(font, size).getlength(text)
