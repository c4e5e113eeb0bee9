"""The budget of a run, and how much of it is spent."""

from __future__ import annotations

from dataclasses import dataclass

from training.runs import Progress


@dataclass(frozen=True)
class Budget:
    """Training images and time after which a run ends.

    Training the inference network of a GAN comes on top of them.

    Attributes:
        images: training images to see, over all processes.
        minutes: of training; ``None`` for no limit.
        inference_share: additional fraction of both for a GAN's inference network.
        excess: images and seconds that a GAN's generator was trained on beyond ``images`` and
            ``minutes``. They do not count.
    """

    images: int
    minutes: float | None = None
    inference_share: float = 0.0
    excess: Progress = Progress()

    @property
    def total_images(self) -> int:
        """Training images of the whole run."""
        return round(self.images * (1 + self.inference_share)) + self.excess.images

    @property
    def total_minutes(self) -> float | None:
        """Minutes of the whole run; ``None`` for no limit."""
        if self.minutes is None:
            return None
        return self.minutes * (1 + self.inference_share) + self.excess.seconds / 60

    def is_out_of_time(self, progress: Progress) -> bool:
        """Whether the time of the whole run is spent."""
        minutes = self.total_minutes
        return minutes is not None and progress.seconds >= 60 * minutes

    def is_spent(self, progress: Progress) -> bool:
        """Whether the images or the time of the whole run are spent."""
        return progress.images >= self.total_images or self.is_out_of_time(progress)

    def fraction(self, progress: Progress) -> float:
        """The larger of the fractions of ``images`` and of ``minutes`` that are spent.

        It is above 1 while the inference network of a GAN is trained.
        """
        images = progress.images - self.excess.images
        seconds = progress.seconds - self.excess.seconds
        of_time = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return max(images / self.images, of_time)
