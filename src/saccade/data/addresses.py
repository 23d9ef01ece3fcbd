"""Images that rows name by their address on the web: fetched only from where the user said, and kept in a folder."""

import hashlib
import os
import re
import time
from collections.abc import Sequence
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import SplitResult, unquote, urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from saccade.errors import RecordError, SaccadeError, reason_of
from saccade.files import atomic_path, check_writable
from saccade.images import LARGEST_MAX_PIXELS, image_size

MAX_BYTES = 64 << 20
"""Size in bytes above which a file is not fetched."""
ATTEMPTS = 3
REDIRECTS = 5
"""How many are followed in an attempt."""
TIMEOUT = 30.0
"""Seconds without an answer after which an attempt ends."""
DEADLINE = 120.0
"""Seconds after which a file that still arrives is given up."""

_PAUSE = 0.5
_CHUNK = 1 << 16
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")


def is_address(name: str) -> bool:
    """Whether a row's image is an address rather than a path."""
    return name[:8].lower().startswith(("http://", "https://"))


class ImageAddresses:
    """Fetches images from the addresses that the user permitted, and keeps them in a folder.

    A data file may come from anybody, and a fetch tells its server who trains on it; therefore nothing is fetched
    from anywhere else, not by a redirect either. A file that was fetched is read from the folder from then on, so the
    resumed run sees the same pixels.

    Args:
        prefixes: what permitted addresses begin with: scheme, host and a path that ends with "/".
        cache: folder to keep the files in; `saccade/images` in the user's cache folder when left out.

    Raises:
        SaccadeError: on a prefix that is not such a beginning, or a folder that cannot be written.
    """

    def __init__(self, prefixes: Sequence[str], cache: str | Path | None = None) -> None:
        self.prefixes = tuple(prefixes)
        for prefix in self.prefixes:
            parts = _parts(prefix) if isinstance(prefix, str) else None
            if parts is None or not parts.path.endswith("/") or parts.query or parts.fragment:
                raise SaccadeError(
                    f"image_urls={prefix!r} is not the beginning of addresses: give scheme, host and a path that ends "
                    "with '/', such as 'https://images.example.org/coco/'"
                )
        if cache is None:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saccade" / "images"
        elif not str(cache):
            raise SaccadeError("image_cache='' is not a folder: give one, or leave it out")
        self.cache = str(Path(cache).expanduser())
        check_writable(self.cache, "image_cache", folder=True)

    def allows(self, address: str) -> bool:
        """Whether an address begins with one of the prefixes, by its parts and not by its letters."""
        parts = _parts(address)
        return parts is not None and any(_begins(parts, urlsplit(prefix)) for prefix in self.prefixes)

    def fetch(self, address: str) -> str:
        """The path of the file at an address, fetched if it is not in the cache.

        Raises:
            RecordError: if the address is not permitted, or does not lead to an image of at most `MAX_BYTES`.
            SaccadeError: if the cache cannot be written.
        """
        if not self.allows(address):
            raise _refused(f"image {address!r} is at an address that image_urls does not permit")
        # The end of the address makes the file known in messages.
        end = re.sub(r"[^\w.-]", "_", urlsplit(address).path.rpartition("/")[2])[-60:]
        digest = hashlib.sha256(address.encode()).hexdigest()
        path = Path(self.cache, digest[:2], f"{digest[2:34]}-{end}")
        if not path.is_file():
            content = self._download(address)
            # Many servers send a web page in place of a missing image, and a cached file is never fetched again.
            image_size({"bytes": content, "path": address}, LARGEST_MAX_PIXELS)
            try:
                with atomic_path(path) as aside:
                    aside.write_bytes(content)
            except OSError as error:
                raise SaccadeError(f"image_cache={self.cache!r} cannot be written ({reason_of(error)})") from error
        return str(path)

    def _download(self, address: str) -> bytes:
        for attempt in range(ATTEMPTS):
            time.sleep(_PAUSE * attempt)
            try:
                return self._follow(address)
            except RecordError:
                raise
            except HTTPError as error:
                fault = f"the server answers {error.code} {error.reason}"
                if error.code < 500 and error.code != 429:
                    break
            # ValueError: of a host name that cannot be looked up.
            except (OSError, HTTPException, ValueError) as error:
                fault = reason_of(error)
        raise RecordError(f"image {address!r} cannot be fetched ({fault}): replace it", "missing_image")

    def _follow(self, address: str) -> bytes:
        """What is at an address, after redirects to permitted addresses."""
        place = address
        for _ in range(REDIRECTS + 1):
            # A new one each time: opening one through a proxy changes where it leads.
            request = Request(place, headers={"User-Agent": "saccade", "Accept": "image/*"})
            try:
                with _opener().open(request, timeout=TIMEOUT) as response:
                    if response.status != 200:
                        raise OSError(f"the server answers {response.status} {response.reason}")
                    return _whole(response)
            except HTTPError as error:
                error.close()
                target = error.headers.get("Location")
                if error.code not in (301, 302, 303, 307, 308) or target is None:
                    raise
                place = urljoin(place, target)
            if not self.allows(place):
                raise _refused(f"image {address!r} leads to {place!r}, which image_urls does not permit")
        raise OSError(f"more than {REDIRECTS} redirects")


def refuse_address(name: str) -> None:
    """Raise the error for an address where none is permitted."""
    raise _refused(f"image {name!r} is an address, and nothing is fetched by default")


class _NoRedirects(HTTPRedirectHandler):
    """Leaves redirects to `ImageAddresses`: the stock handler reads their bodies, of any size."""

    def http_error_302(self, *args: Any) -> None:
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@cache
def _opener() -> OpenerDirector:
    return build_opener(_NoRedirects())


def _refused(what: str) -> RecordError:
    return RecordError(
        f"{what}: add the beginning of its address to image_urls, or download it into the image folder",
        "outside_image_folders",
    )


def _parts(address: str) -> SplitResult | None:
    """The parts of an address; None if readers may disagree on what they are, or the path climbs."""
    if re.search(r"[\x00-\x20\x7f\\]", address) or not address.isascii():
        return None
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        return None
    known = parts.scheme in _PORTS and _HOST.fullmatch(parts.hostname or "") and "@" not in parts.netloc
    return parts if known and port != 0 and not _climbs(parts.path) else None


def _climbs(path: str) -> bool:
    """Whether a path has a `..`, for any reader: however often it is quoted, after any separator."""
    while True:
        if ".." in re.split(r"[/\\;]", path):
            return True
        plain = unquote(path)
        if plain == path:
            return False
        path = plain


def _begins(parts: SplitResult, prefix: SplitResult) -> bool:
    same = (parts.scheme, parts.hostname, _port(parts)) == (prefix.scheme, prefix.hostname, _port(prefix))
    return same and parts.path.startswith(prefix.path)


def _port(parts: SplitResult) -> int:
    return _PORTS[parts.scheme] if parts.port is None else parts.port


def _whole(response: Any) -> bytes:
    """All bytes of an answer.

    Raises:
        OSError: if they are too many, arrive too slowly, or end before the length that was announced.
    """
    content, announced = bytearray(), response.headers.get("Content-Length")
    started = time.monotonic()
    while chunk := response.read1(_CHUNK):
        content += chunk
        if len(content) > MAX_BYTES:
            raise OSError(f"it has more than {MAX_BYTES} bytes")
        if time.monotonic() - started > DEADLINE:
            raise OSError(f"it has not arrived after {DEADLINE:g} seconds")
    if announced is not None and announced.isdecimal() and len(content) != int(announced):
        raise OSError(f"{len(content)} of {announced} bytes arrived")
    return bytes(content)
