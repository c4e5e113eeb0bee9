"""Replaces the bundle of a running service by another one, and goes back to the one before.

The new bundle is started beside the old one and gets requests once it can answer, all of them or a
share (a canary). The old one answers what it has accepted, and stops. Whatever goes wrong before
that leaves the old one serving.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ade_base.errors import UserError
from ade_client.contract import DEFAULT
from handlers.front.releases import Release
from handlers.launch.engines import SWITCHED, Engine, Plan, UpgradableEngine, release_of
from handlers.launch.page_process import Page
from handlers.processes.channel import ChannelError, Say
from handlers.processes.supervision import tell
from serving.engine.bundle import CALIBRATION_NAME, Bundle, BundleError, verify_bundle
from serving.engine.calibrations import open_calibrations, seen_file
from serving.verdict.calibration import CalibrationError
from serving.verdict.calibration_file import Calibrations
from serving.verdict.store import ALL, FOLDER, SUFFIX, CalibrationStore, path_of

UPGRADE, FINISH, ROLLBACK, DESCRIBE = "upgrade", "finish", "rollback", "describe"
ALPHA = 0.01  # of a request that gives none
COMMANDS = 3  # that are remembered: a refused one must not hide why the one before failed


class UpgradeError(UserError, RuntimeError):
    """The change was refused or failed; the service answers as before."""


@dataclass
class Command:
    """A command that changes the releases, and how far it came.

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


class Upgrades:
    """The releases of a service: the one that answers, a canary beside it, and the one before.

    Args:
        plan: of the service, whose bundles are the first release.
        engine: runs the releases.
        page: shows the bundles of the release that answers.
        changed: called after each change.
    """

    def __init__(self, plan: Plan, engine: Engine, page: Page, changed: Callable[[], None]) -> None:
        self._plan = plan
        self._engine = engine
        self._page = page
        self._changed = changed
        self._busy = threading.Lock()
        self._turn = contextlib.ExitStack()  # of the command that holds the lock; releases it
        self._last_number = 1
        self._current = plan.release
        self._canary: Release | None = None
        self._previous: Release | None = None
        self._commands = deque[Command](maxlen=COMMANDS)
        # As they were read: the folder of a bundle that is served may have gone meanwhile.
        self._bundles = {1: list(plan.bundles)}

    def handle(self, message: dict[str, Any], say: Say) -> dict[str, Any]:
        """Do what a message of the private channel asks for.

        Args:
            message: ``do`` and its arguments.
            say: gets sentences about the progress.

        Returns:
            The releases afterwards, see :meth:`describe`.

        Raises:
            UpgradeError: it was refused or failed.
            BundleError: the bundle cannot be read, or does not match its manifest.
        """
        what = message.get("do")
        if what == DESCRIBE:
            return self.describe()
        if what not in (UPGRADE, FINISH, ROLLBACK):
            raise UpgradeError(f"unknown command {what!r}")
        if not self._busy.acquire(blocking=False):
            raise UpgradeError("another upgrade is in progress: see ade status")
        with contextlib.ExitStack() as self._turn:
            self._turn.callback(self._busy.release)
            began = datetime.now(UTC).isoformat(timespec="seconds")
            # Others may follow before this one has ended.
            self._commands.append(one := Command(_typed(message), began))

            def noted(text: str) -> None:
                one.detail = text
                say(text)

            try:
                self._change_as(message, noted)
            except Exception as error:  # the client may be gone
                one.detail, one.state = str(error) or repr(error), "failed"
                tell(f"{one.command} failed: {one.detail}")
                raise
            one.state = "done"
            return self.describe()

    def _change_as(self, message: dict[str, Any], say: Say) -> None:
        if message["do"] == UPGRADE:
            self._upgrade(Path(message["bundle"]), message.get("canary"), say)
        elif message["do"] == FINISH:
            self._finish(say)
        else:
            self._roll_back(say)

    def describe(self) -> dict[str, Any]:
        """Describe the releases and the last commands.

        Returns:
            Models of ``current``, ``canary`` with its ``share``, and ``previous``; ``releases``
            with their workers; ``commands``, the fields of each :class:`Command`.
        """
        canary, previous = self._canary, self._previous
        running = []
        if isinstance(self._engine, UpgradableEngine):
            with contextlib.suppress(ChannelError):  # it is being started again
                running = self._engine.releases()
        return {
            "current": self._current.models,
            "canary": canary and canary.models,
            "share": canary and canary.share,
            # The front was started again without it, at least so far.
            "canary_is_lost": canary is not None
            and bool(running)
            and canary.number not in {one["number"] for one in running},
            "previous": previous and previous.models,
            "releases": running,
            # A copy, because another thread may append to it meanwhile.
            "commands": [asdict(one) for one in self._commands.copy()],
        }

    def _upgrade(self, folder: Path, share: float | None, say: Say) -> None:
        self._upgradable()
        if self._canary is not None:
            raise UpgradeError(
                f"{_names(self._canary)} is a canary: ade upgrade --finish or ade rollback first"
            )
        say(f"verifying {folder}")
        # The folder itself: the next upgrade may point a link at another one.
        release = self._release(self._with(verify_bundle(folder.resolve()), say), share or 0.0)
        if share is None:
            say(f"starting {_names(release)} beside {_names(self._current)}")
            self._replace(release, say)
            return
        if set(release.models) == set(self._current.models):
            raise UpgradeError(
                f"{_names(release)} is served already: answers and metrics of a canary could not "
                "be distinguished from the others"
            )
        say(f"starting {_names(release)} beside {_names(self._current)}")

        def started() -> None:
            self._canary = release

        self._change([self._current, release], started)
        self._changed()
        say(f"{_names(release)} answers {share:.3g} of the requests")

    def _finish(self, say: Say) -> None:
        if self._canary is None:
            raise UpgradeError("there is no canary")
        # Again: calibrations may have been added since the canary was started.
        self._check_contracts(self._bundles[self._canary.number], say)
        self._replace(self._canary, say)

    def _roll_back(self, say: Say) -> None:
        if self._canary is not None:
            current, dropped = self._current, self._canary

            def switched() -> None:
                self._canary = None
                say(f"{_names(current)} answers all requests; {_names(dropped)} finishes its own")

            self._change([current], switched)
            self._changed()
            say(f"{_names(dropped)} has stopped")
            return
        if self._previous is None:
            raise UpgradeError("there was no upgrade: nothing to go back to")
        bundles = [verify_bundle(Path(one)) for one in self._previous.bundles]
        served = self._bundles[self._previous.number]
        if [one.manifest for one in bundles] != [one.manifest for one in served]:
            raise UpgradeError(
                f"the folder of {_names(self._previous)} has other files now than were served, of "
                + ", ".join(one.model_id for one in bundles)
            )
        try:
            self._check_contracts(bundles, say)
        except UpgradeError as error:  # going back is urgent
            say(f"warning: {error}")
        release = self._release(bundles)
        say(f"starting {_names(release)} beside {_names(self._current)}")
        self._replace(release, say)

    def _replace(self, release: Release, say: Say) -> None:
        """Let a release take the place of the present one."""
        old = self._current
        with self._page.prepared(release.bundles) as take_over:

            def switched() -> None:
                self._current, self._previous, self._canary = release, old, None
                say(f"{_names(release)} answers all requests; {_names(old)} finishes its own")
                take_over()

            self._change([release], switched)
        self._changed()
        say(f"{_names(old)} has stopped")

    def _change(self, releases: Sequence[Release], switched: Callable[[], None]) -> None:
        """Change the releases, and wait until those that are removed have stopped.

        Args:
            releases: see :meth:`handlers.launch.engines.UpgradableEngine.change`.
            switched: called once they answer. From then on other commands may change them, so that
                a rollback need not wait for the requests of a removed release.

        Raises:
            UpgradeError: a release cannot be started; nothing has changed.
        """
        engine, turn, was_switched = self._upgradable(), self._turn, False

        def heard(text: str) -> None:
            nonlocal was_switched
            if text == SWITCHED and not was_switched:
                was_switched = True
                switched()
                turn.close()

        try:
            engine.change(releases, heard)
        except ChannelError as error:
            if not was_switched:  # otherwise the front ended, and the removed releases with it
                raise UpgradeError(f"{_names(self._current)} stays: {error}") from None

    def _upgradable(self) -> UpgradableEngine:
        if not isinstance(self._engine, UpgradableEngine):
            raise UpgradeError(
                "the engine of this service cannot serve two bundles at a time: use "
                "ade serve --engine asgi, or start a second service on other ports"
            )
        return self._engine

    def _with(self, bundle: Bundle, say: Say) -> list[Bundle]:
        """The bundles of the present release, with a new one in the place of one of them.

        Raises:
            UpgradeError: clients would notice more than another model.
        """
        bundles = list(self._bundles[self._current.number])
        names = [one.name for one in bundles]
        if len(bundles) > 1 and bundle.name not in names:
            raise UpgradeError(
                "several bundles are served: a new one must have the name of one of them, "
                f"{', '.join(names)}, got {bundle.name}"
            )
        bundles[names.index(bundle.name) if bundle.name in names else 0] = bundle
        self._check_contracts(bundles, say)
        return bundles

    def _check_contracts(self, bundles: Sequence[Bundle], say: Say) -> None:
        """Check bundles that take the place of the present release's.

        Raises:
            UpgradeError: see :func:`check_contract`.
        """
        for old, new in zip(self._bundles[self._current.number], bundles, strict=True):
            if new is not old:
                check_contract(old, new, self._plan.memory, say)

    def _release(self, bundles: list[Bundle], share: float = 0.0) -> Release:
        self._last_number += 1
        self._bundles[self._last_number] = bundles
        return release_of(self._last_number, bundles, share)


def check_contract(
    old: Bundle, new: Bundle, memory: Path | None = None, say: Say = lambda text: None
) -> None:
    """Check that requests which one bundle answers are answered by another one, too.

    Args:
        old: the bundle that is served.
        new: the one that is to replace it.
        memory: folder of the service, for :func:`serving.engine.calibrations.seen_file`.
        say: gets a warning if the old one's calibrations cannot be read any more.

    Raises:
        UpgradeError: the images, the latents, the operations or the calibrations are not the same,
            or a calibration cannot be used, or not for resized images.
    """
    for what, before, after in (
        ("images", old.image_shape, new.image_shape),
        ("latents", old.latent_shapes, new.latent_shapes),
    ):
        if before != after:
            raise UpgradeError(
                f"{what} of {new.model_id} have the shape {after}, those of {old.model_id} "
                f"{before}: serve it beside, as a service of its own"
            )
    missing = [one for one in old.operations if one not in new.operations]
    if missing:
        raise UpgradeError(f"{new.model_id} has no {', '.join(missing)}")
    if old.has(CALIBRATION_NAME) and not new.has(CALIBRATION_NAME):
        raise UpgradeError(
            f"{new.model_id} is not calibrated, and would accept no image: run ade calibrate first"
        )
    kept = _calibrations(new)
    # What feedback made of the old bundle's own calibration is replaced by the new bundle's own.
    if DEFAULT not in kept and (
        _has_another_default(old, memory)
        if new.has(CALIBRATION_NAME)
        else _may_have_default(old, memory)
    ):
        raise UpgradeError(
            f"{new.model_id} has no calibration in the place of {FOLDER}/{DEFAULT}{SUFFIX} of "
            f"{old.model_id}, by which requests without a name are decided: run ade calibrate "
            f"{new.folder} --data … --into {new.folder} --name {DEFAULT}"
        )
    lost = sorted(_calibrations(old) - kept - {DEFAULT})
    if lost:
        raise UpgradeError(
            f"{new.model_id} lacks the calibrations {', '.join(lost)}: add them with "
            "ade calibrate --into, or remove those that nobody uses from the old bundle"
        )
    try:
        store = _open(new, memory)
    except (BundleError, CalibrationError) as error:
        raise UpgradeError(f"the calibration of {new.model_id}: {error}") from error
    for name, reason in store.broken.items():
        if name == ALL:
            raise UpgradeError(f"the calibrations of {new.model_id}: {reason}")
        is_gone = name == DEFAULT and DEFAULT not in kept
        raise UpgradeError(
            f"the calibration {name} of {new.model_id}: {reason}"
            + ("" if is_gone else ": make it again with ade calibrate --into, or remove it")
        )
    if not old.folder.is_dir():
        say(f"warning: the folder of {old.model_id} is gone: its calibrations cannot be compared")
        return
    try:
        old_store = _open(old, memory)
    except (BundleError, CalibrationError) as error:  # it was changed meanwhile
        say(f"warning: the calibrations of {old.model_id} cannot be compared: {error}")
        return
    for name in old_store.names:
        its = f"the calibration {name} of {new.model_id}"
        was, now = old_store.get(name), store.get(name)
        if was.resized is not None and now.resized is None:
            raise UpgradeError(
                f"{its} gives resized images no verdict, that of {old.model_id} does: make it "
                "again with ade calibrate"
            )
        for one, other in ((was.exact, now.exact), (was.resized, now.resized)):
            if one is None or other is None:
                continue
            if one.smallest_p_value <= ALPHA < other.smallest_p_value:
                raise UpgradeError(
                    f"{its} has {len(other.scores)} images, too few for a verdict at alpha "
                    f"{ALPHA:g}, which that of {old.model_id} gives: make it again with "
                    "more"
                )


def _seen(bundle: Bundle, memory: Path | None) -> Path | None:
    """The file by which a service knows that a bundle had a ``default.npz``, if it exists."""
    path = None if memory is None else seen_file(bundle, memory)
    return path if path is not None and os.path.exists(path) else None


def _open(bundle: Bundle, memory: Path | None) -> CalibrationStore:
    """Open the calibrations of a bundle without noting a ``default.npz``: it may never be served.

    Raises:
        BundleError, CalibrationError: see :func:`serving.engine.calibrations.open_calibrations`.
    """
    return open_calibrations(bundle, bundle.folder / FOLDER, _seen(bundle, memory))


def _may_have_default(bundle: Bundle, memory: Path | None) -> bool:
    """Whether ``default.npz`` decides, or would if it could be read."""
    folder = bundle.folder / FOLDER
    if _seen(bundle, memory) is not None:
        return True
    try:
        return f"{DEFAULT}{SUFFIX}" in os.listdir(folder)
    except FileNotFoundError:
        return folder.is_symlink()  # that leads nowhere at present
    except OSError:
        return True


def _has_another_default(bundle: Bundle, memory: Path | None) -> bool:
    """Whether ``default.npz`` is, or may be, another calibration than the bundle's own.

    What feedback makes of the bundle's own has the same density and more images.
    """
    if not _may_have_default(bundle, memory):
        return False
    try:
        default = Calibrations.load(path_of(bundle.folder, DEFAULT), DEFAULT)
        own = Calibrations.load(bundle.file(CALIBRATION_NAME))
    except (BundleError, CalibrationError, OSError):
        return True  # a running service decides by what it read before, or gives no verdict
    pairs = ((default.exact, own.exact), (default.resized, own.resized))
    return any(
        one is not None
        and (
            other is None
            or not np.array_equal(one.fitted_digests, other.fitted_digests)
            or not np.array_equal(one.normal.grid, other.normal.grid)
        )
        for one, other in pairs
    )


def _calibrations(bundle: Bundle) -> set[str]:
    """Names of the named calibrations."""
    return {path.stem for path in (bundle.folder / FOLDER).glob(f"[!.]*{SUFFIX}")}


def _typed(message: dict[str, Any]) -> str:
    """The command line that sends a message."""
    if message["do"] == ROLLBACK:
        return "ade rollback"
    if message["do"] == FINISH:
        return "ade upgrade --finish"
    share = message.get("canary")
    return f"ade upgrade {message['bundle']}" + ("" if share is None else f" --canary {share:.3g}")


def _names(release: Release) -> str:
    """Folders and models: bundles that differ in their calibration alone have one model."""
    return ", ".join(
        f"{folder} ({model})" for folder, model in zip(release.bundles, release.models, strict=True)
    )
