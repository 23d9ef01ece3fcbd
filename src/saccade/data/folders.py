"""Paths of images and videos in data files, confined to the folders that the user named."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from saccade.data.addresses import ImageAddresses, is_address, refuse_address
from saccade.errors import RecordError, SaccadeError
from saccade.videos import frame_names


class ImageFolders:
    """Finds images and videos in folders and rejects paths that leave them, since a data file may be untrusted.

    Args:
        folders: the folders to search, in this order.
        allow_outside: accept paths that leave the folders through `..`, an absolute path or a symbolic link.
        addresses: fetches images that are named by their address; none are when left out.

    Raises:
        SaccadeError: if a folder does not exist, or has no name.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        allow_outside: bool = False,
        addresses: ImageAddresses | None = None,
    ) -> None:
        for folder in folders:
            # `Path("")` is the current folder, which nobody named.
            if not str(folder).strip() or not Path(folder).is_dir():
                raise SaccadeError(f"image_folder={str(folder)!r} is not a folder: correct the path")
        self.folders = [str(folder) for folder in folders]
        self.allow_outside = allow_outside
        self.addresses = addresses
        self._roots = [os.path.join(os.path.realpath(folder), "") for folder in folders]

    def find(self, name: str) -> str:
        """The path of the image that a record calls `name`.

        Raises:
            RecordError: if it is in none of the folders, or outside them, or at an address that is not permitted or
                does not answer.
        """
        if is_address(name):
            if self.addresses is None:
                refuse_address(name)
            return self.addresses.fetch(name)
        return self._find(name, "image", os.path.isfile)

    def find_video(self, name: str) -> str | list[str]:
        """The path of the video that a record calls `name`, or the paths of its frames if it is a folder.

        Raises:
            RecordError: if it, or a frame, is in none of the folders, or outside them.
        """
        path = self._find(name, "video", os.path.exists)
        if not os.path.isdir(path):
            return path
        # A frame may be a link that leaves the folders.
        return [self.find(os.path.join(name, frame)) for frame in frame_names(path)]

    def _find(self, name: str, kind: str, exists: Callable[[str], bool]) -> str:
        left = False
        try:
            for folder in self.folders:
                path = os.path.join(folder, name)
                if not (self.allow_outside or self._is_inside(path)):
                    left = True
                    if os.path.lexists(path):
                        break  # it is this one that is meant, not one of its name in another folder
                elif exists(path):
                    return path
        except ValueError as error:  # a null byte in the name
            raise RecordError(f"{kind} {name!r} is not a path: {error}") from error
        where = ", ".join(self.folders) or "image_folder, which is empty"
        if left:
            raise RecordError(
                f"{kind} {name!r} leads out of the image folder {where}: name its folder in image_folder, or set "
                "allow_outside_images to true for data that you trust",
                "outside_image_folders",
            )
        raise RecordError(
            f"{kind} {name!r} does not exist in {where}: correct the path or image_folder", f"missing_{kind}"
        )

    def _is_inside(self, path: str) -> bool:
        return os.path.join(os.path.realpath(path), "").startswith(tuple(self._roots))
