"""Teaches a gate from pictures that its user knows to be bad.

A regularised linear score tells them from good pictures that are kept for it and do not calibrate.
So whatever it learns, the false-alarm rate is that of the good pictures that calibrate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from serving.verdict.calibration import Calibration
from serving.verdict.conformal import conformal_p_values
from serving.verdict.density import FARTHEST, NormalScores
from serving.verdict.lesson import LESSON, Lesson, joined
from training.data import Report

KEPT = 3  # one of so many good pictures that would calibrate is kept for the lesson
COMPONENTS, PENALTY = 32, 0.05  # principal components; C of the logistic regression
LEAST_DEVIATION = 1e-6
# How much one unit of the lesson may count, in standard deviations of the score without it.
WEIGHTS = (0.25, 0.5, 1.0)
FOLDS, ROUNDS = 5, 4  # of the cross-validation
ALPHA = 0.05  # of the report


def taught(
    calibration: Calibration,
    statistics: Sequence[Mapping[str, np.ndarray]],
    report: Report,
) -> Calibration:
    """The calibration with a lesson, or the same one if cross-validation finds none to be better.

    Args:
        calibration: without a lesson.
        statistics: by name, of the pictures that the density was fitted to, of those that
            calibrated it, of good pictures that did neither, and of those known to be bad.
        report: called with what the lesson changes.
    """
    fitting, calibrating, kept, bad = statistics
    inputs = tuple(calibration.sizes)
    usual, good, worse = (joined(its, inputs) for its in (fitting, kept, bad))
    scores = np.concatenate([calibration.scores_of(kept), calibration.scores_of(bad)])
    low, high = np.quantile(scores[: len(good)], [0.16, 0.84])
    values, is_bad = np.concatenate([good, worse]), np.arange(len(scores)) >= len(good)
    held_out = _held_out(values, is_bad, usual)
    without = _found(scores[None], is_bad)
    weights = [times * float(high - low) / 2 for times in WEIGHTS]
    tried = [_found(scores + weight * held_out, is_bad) for weight in weights]
    best = int(np.argmax([exceeded.mean() for exceeded, _ in tried]))
    gain = tried[best][0] - without[0]
    changes = (
        f"AUROC {without[0].mean():.3f} without it, {tried[best][0].mean():.3f} with it; rejected "
        f"at alpha {ALPHA}: {100 * without[1]:.0f} % without it, {100 * tried[best][1]:.0f} % with "
        f"it (cross-validated on {len(worse)} of them and {len(good)} good ones, which do not "
        "calibrate)"
    )
    if not gain.mean() > gain.std() / np.sqrt(len(gain)):
        report(
            "known bad pictures: left out what they teach, since it is no surer to find pictures "
            f"like them: {changes}. Without known bad pictures, more good ones calibrate"
        )
        return calibration
    report(f"known bad pictures: what they teach counts. Pictures like them: {changes}")
    lesson = Lesson(inputs, _slopes(values, is_bad), weights[best])
    normal = NormalScores.fit(lesson.coordinate(fitting)[:, None])
    made = replace(
        calibration,
        names=(*calibration.names, LESSON),
        normal=NormalScores(
            np.hstack([calibration.normal.grid, normal.grid]),
            np.hstack([calibration.normal.spread, normal.spread]),
        ),
        lesson=lesson,
    )
    rows = made.rows(calibrating)
    return replace(
        made, reference=np.sort(rows, axis=0), scores=np.sort(made.ood_scores(made.normal(rows)))
    )


def _slopes(values: np.ndarray, is_bad: np.ndarray) -> np.ndarray:
    """A linear function of values ``(N, F)``, ``(F,)``, that is higher for bad pictures."""
    deviation = values.std(0) + LEAST_DEVIATION
    standard = (values - values.mean(0)) / deviation
    components = PCA(min(COMPONENTS, *standard.shape), svd_solver="full").fit(standard).components_
    regression = LogisticRegression(C=PENALTY, class_weight="balanced", max_iter=1000)
    regression.fit(standard @ components.T, is_bad)
    slopes: np.ndarray = (regression.coef_[0] @ components) / deviation
    return slopes


def _held_out(values: np.ndarray, is_bad: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Normal scores ``(ROUNDS, N)`` of pictures, each by a lesson that has not seen it.

    Args:
        values: ``(N, F)``.
        is_bad: bool ``(N,)``.
        usual: ``(m, F)``, of other good pictures, over which the scores are normal.
    """
    found = np.empty((ROUNDS, len(values)))
    for number in range(ROUNDS):
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=number)
        for seen, unseen in folds.split(values, is_bad):
            slopes = _slopes(values[seen], is_bad[seen])
            normal = NormalScores.fit((usual @ slopes)[:, None].astype(np.float32))
            found[number, unseen] = normal((values[unseen] @ slopes)[:, None])[:, 0]
    return np.clip(found, -FARTHEST, FARTHEST)


def _found(scores: np.ndarray, is_bad: np.ndarray) -> tuple[np.ndarray, float]:
    """How scores ``(rounds, N)`` tell bad pictures from good ones.

    Returns:
        For each bad picture the share of good ones with a lower score, whose mean is the AUROC; the
        share of bad ones that is rejected at :data:`ALPHA`.
    """
    lower, rejected = [], []
    for row in scores:
        good, bad = np.sort(row[~is_bad]), row[is_bad]
        lower.append((good.searchsorted(bad, "left") + good.searchsorted(bad, "right")) / 2)
        rejected.append(conformal_p_values(good, bad) <= ALPHA)
    return np.mean(lower, axis=0) / (~is_bad).sum(), float(np.mean(rejected))
