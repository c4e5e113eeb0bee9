"""Replaces the bundle of a running service by another one.

The new bundle is started beside the old one, and gets all requests once it can answer. The old one
finishes what it has accepted, and stops. Whatever goes wrong before that leaves the old one
serving. To go back, publish the old bundle again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ade_base.errors import UserError
from ade_client.contract import DEFAULT
from handlers.launch.launcher import Launcher, Plan, release_of
from handlers.launch.page_process import Page
from handlers.processes.channel import ChannelError, Say
from handlers.processes.supervision import tell
from handlers.service.release import Release
from serving.engine.bundle import Bundle, BundleError, verify_bundle
from serving.engine.calibrations import open_calibrations
from serving.verdict.calibration import CalibrationError

PUBLISH, DESCRIBE = "publish", "describe"
ALPHA = 0.01  # of a request that gives none


class PublishError(UserError, RuntimeError):
    """The release was refused or failed; the service answers as before."""


@dataclass
class Command:
    """A command that publishes a bundle, and how far it came.

    Attributes:
        command: as it is typed.
        began: when, in ISO 8601.
        state: ``in progress``, ``done`` or ``failed``.
        detail: its last step, or why it failed.
    """

    command: str
    began: str
    state: str = "in progress"
    detail: str = ""


class Publisher:
    """Publishes bundles in a service, one at a time.

    Args:
        plan: of the service, whose bundles are the first release.
        engine: runs the release.
        page: shows the bundles of the release.
        changed: called after each change.
    """

    def __init__(
        self, plan: Plan, engine: Launcher, page: Page, changed: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._page = page
        self._changed = changed
        self._busy = threading.Lock()
        self._current = plan.release
        self._bundles = list(plan.bundles)
        self._served = {bundle.digest for bundle in plan.bundles}  # at any time
        self._last: Command | None = None

    def handle(self, message: dict[str, Any], say: Say) -> dict[str, Any]:
        """Do what a message of the private channel asks for.

        Args:
            message: ``do`` and its arguments.
            say: gets sentences about the progress.

        Returns:
            The release afterwards, see :meth:`describe`.

        Raises:
            PublishError: it was refused or failed.
            BundleError: the bundle cannot be read, or does not match its manifest.
        """
        what = message.get("do")
        if what == DESCRIBE:
            return self.describe()
        if what != PUBLISH:
            raise PublishError(f"unknown command {what!r}")
        if not self._busy.acquire(blocking=False):
            raise PublishError("another bundle is being published: see ade status")
        try:
            began = datetime.now(UTC).isoformat(timespec="seconds")
            self._last = one = Command(f"ade publish {message['bundle']}", began)

            def noted(text: str) -> None:
                one.detail = text
                say(text)

            try:
                self._publish(Path(message["bundle"]), noted)
            except Exception as error:  # the client may be gone
                one.detail, one.state = str(error) or repr(error), "failed"
                tell(f"{one.command} failed: {one.detail}")
                raise
            one.state = "done"
            return self.describe()
        finally:
            self._busy.release()

    def describe(self) -> dict[str, Any]:
        """Describe the release and the last command.

        Returns:
            The ``models`` of the release, their ``workers`` (``None`` if the application does
            not answer), and ``last``: the fields of the last :class:`Command`, or ``None``.
        """
        workers = None
        with contextlib.suppress(ChannelError):  # it is being started again
            workers = self._engine.describe()["workers"]
        return {
            "models": self._current.models,
            "workers": workers,
            "last": self._last and asdict(self._last),
        }

    def _publish(self, folder: Path, say: Say) -> None:
        say(f"verifying {folder}")
        # The folder itself: a link may lead to another one later.
        bundle = verify_bundle(folder.resolve())
        bundles = self._with(bundle, say)
        old, new = self._current, release_of(self._current.number + 1, bundles)
        say(f"starting {_names(new)} beside {_names(old)}")
        try:
            self._engine.publish(new)
        except ChannelError as error:
            raise PublishError(f"{_names(old)} stays: {error}") from None
        self._current, self._bundles = new, bundles
        self._served.add(bundle.digest)
        say(f"{_names(new)} answers all requests; {_names(old)} finishes its own")
        self._page.show(new.bundles)
        self._changed()

    def _with(self, bundle: Bundle, say: Say) -> list[Bundle]:
        """The bundles of the present release, with a new one in the place of one of them.

        Raises:
            PublishError: clients would notice more than another model.
        """
        bundles = list(self._bundles)
        names = [one.name for one in bundles]
        if len(bundles) > 1 and bundle.name not in names:
            raise PublishError(
                "several bundles are served: a new one must have the name of one of them, "
                f"{', '.join(names)}, got {bundle.name}"
            )
        place = names.index(bundle.name) if bundle.name in names else 0
        try:
            check_contract(bundles[place], bundle, say)
        except PublishError as error:
            if bundle.digest not in self._served:
                raise
            say(f"warning: {error}")  # going back is urgent
        bundles[place] = bundle
        return bundles


def check_contract(old: Bundle, new: Bundle, say: Say = lambda text: None) -> None:
    """Check that requests which one bundle answers are answered by another one, too.

    Args:
        old: the bundle that is served.
        new: the one that is to replace it.
        say: gets a warning if the old one's calibrations cannot be read any more.

    Raises:
        PublishError: the images, the latents, the operations or the calibrations are not the same,
            or a calibration cannot be used, or not for resized images.
    """
    for what, before, after in (
        ("images", old.image_shape, new.image_shape),
        ("latents", old.latent_shapes, new.latent_shapes),
    ):
        if before != after:
            raise PublishError(
                f"{what} of {new.model_id} have the shape {after}, those of {old.model_id} "
                f"{before}: serve it beside, as a service of its own"
            )
    missing = [one for one in old.operations if one not in new.operations]
    if missing:
        raise PublishError(f"{new.model_id} has no {', '.join(missing)}")
    lost = [name for name in old.calibrations if name not in new.calibrations]
    if lost == [DEFAULT]:
        raise PublishError(
            f"{new.model_id} is not calibrated, and would accept no image: run ade calibrate first"
        )
    if lost:
        raise PublishError(
            f"{new.model_id} lacks the calibrations {', '.join(lost)}: add them with "
            "ade calibrate --name"
        )
    try:
        found = open_calibrations(new)
    except (BundleError, CalibrationError) as error:
        raise PublishError(f"the calibration of {new.model_id}: {error}") from error
    try:
        former = open_calibrations(old)
    except (BundleError, CalibrationError, OSError) as error:  # its folder may be gone
        say(f"warning: the calibrations of {old.model_id} cannot be compared: {error}")
        return
    for name, was in former.items():
        its, now = f"the calibration {name} of {new.model_id}", found[name]
        if was.resized is not None and now.resized is None:
            raise PublishError(
                f"{its} gives resized images no verdict, that of {old.model_id} does: make it "
                "again with ade calibrate"
            )
        for one, other in ((was.exact, now.exact), (was.resized, now.resized)):
            if one is None or other is None:
                continue
            if one.smallest_p_value <= ALPHA < other.smallest_p_value:
                raise PublishError(
                    f"{its} has {len(other.scores)} images, too few for a verdict at alpha "
                    f"{ALPHA:g}, which that of {old.model_id} gives: make it again with "
                    "more"
                )


def _names(release: Release) -> str:
    """Folders and models: bundles that differ in their calibration alone have one model."""
    return ", ".join(
        f"{folder} ({model})" for folder, model in zip(release.bundles, release.models, strict=True)
    )
