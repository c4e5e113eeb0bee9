"""What a calibration keeps of the images that feedback added to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Joined:
    """Images that feedback added to a calibration, with the values that removing them takes out.

    Computed again on another machine, or with another version of a library, the values of the same
    file may differ.

    Attributes:
        files: hexadecimal SHA-256 of each image file.
        rows: float32 ``(J, S)``, their statistics.
        scores: float64 ``(J,)``, their OOD scores.
        digests: uint64 ``(J,)``, the first 8 bytes of the SHA-256 of their pixels.
    """

    files: tuple[str, ...]
    rows: np.ndarray
    scores: np.ndarray
    digests: np.ndarray

    def and_more(self, more: Joined) -> Joined:
        """These images followed by others."""
        return Joined(
            (*self.files, *more.files),
            np.concatenate([self.rows, more.rows]),
            np.concatenate([self.scores, more.scores]),
            np.concatenate([self.digests, more.digests]),
        )

    def file_of(self, digest: int) -> str | None:
        """The file as which an image with these pixels joined; ``None`` if none did."""
        places = np.flatnonzero(self.digests == np.uint64(digest))
        return self.files[places[0]] if len(places) else None

    def without(self, files: Sequence[str]) -> Joined | None:
        """The images that are not in ``files``; ``None`` if that leaves none."""
        kept = [place for place, file in enumerate(self.files) if file not in files]
        if not kept:
            return None
        files = tuple(self.files[place] for place in kept)
        return Joined(files, self.rows[kept], self.scores[kept], self.digests[kept])

    def shapes(self, size: int) -> list[tuple[str, np.ndarray, tuple[int, ...]]]:
        """The arrays with the shapes that they must have, for ``size`` statistics."""
        count = len(self.files)
        return [
            ("joined_rows", self.rows, (count, size)),
            ("joined_scores", self.scores, (count,)),
        ]

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        return {
            "joined_files": np.array(self.files),
            "joined_rows": self.rows,
            "joined_scores": self.scores,
            "joined_digests": self.digests,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> Joined | None:
        """Rebuild from :meth:`arrays`; ``None`` if there are none."""
        if f"{prefix}joined_files" not in arrays:
            return None
        files = arrays[f"{prefix}joined_files"]
        # An array without values takes no bytes of its file, however long it is.
        if files.ndim != 1 or files.dtype != "U64":
            raise ValueError(
                f"joined_files must be SHA-256 in hexadecimal, got {files.dtype} {files.shape}"
            )
        return cls(
            tuple(map(str, files)),
            arrays[f"{prefix}joined_rows"],
            arrays[f"{prefix}joined_scores"],
            arrays[f"{prefix}joined_digests"],
        )
