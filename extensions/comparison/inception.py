"""Inception V3 with the weights of the original FID.

Only the Fréchet distance in its feature space is called FID.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ade_base.files import sha256_of
from training.metrics.features import BATCH, FeatureError

WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DOWNLOAD = "download"


def inception_features(weights: str, images: np.ndarray, device: torch.device) -> np.ndarray:
    """Pooled features, as used by the FID.

    Args:
        weights: path of torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``, or
            ``download``.
        images: uint8 ``(N, H, W, 3)``; the network resizes them to 299 pixels as TensorFlow 1 did.
        device: where to compute.

    Returns:
        float64 ``(N, 2048)``.

    Raises:
        FeatureError: the file is missing or wrong, or cannot be downloaded.
    """
    network = _load(weights).to(device)
    pooled = []
    with torch.inference_mode():
        for first in range(0, len(images), BATCH):
            batch = (
                torch.from_numpy(np.array(images[first : first + BATCH]))
                .permute(0, 3, 1, 2)
                .to(device)
            )
            (features,) = network(batch)
            pooled.append(features.double().cpu().numpy())
    return np.concatenate(pooled)


def _load(weights: str) -> torch.nn.Module:
    path = verified_inception(weights)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network: torch.nn.Module = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
    )
    return network


def verified_inception(weights: str) -> Path:
    """Path of the weights, which are downloaded if requested and checked by their SHA-256.

    Raises:
        FeatureError: the file is missing or wrong, or cannot be downloaded.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ModuleNotFoundError as error:
        raise FeatureError(
            "Inception needs the package torch-fidelity: pip install torch-fidelity"
        ) from error

    if weights == DOWNLOAD:
        path = Path(torch.hub.get_dir()) / "checkpoints" / str(URL_INCEPTION_V3).rsplit("/", 1)[1]
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(
                    URL_INCEPTION_V3, str(path), WEIGHTS_SHA256, progress=False
                )
            except (OSError, RuntimeError) as error:
                raise FeatureError(
                    f"{URL_INCEPTION_V3} could not be downloaded ({error}); "
                    "without a network, download the file elsewhere and give its path"
                ) from error
    else:
        path = Path(weights)
        if not path.is_file():
            raise FeatureError(f"the weights of Inception do not exist: there is no file {path}")
    found = sha256_of(path)  # checked before unpickling
    if found != WEIGHTS_SHA256:
        raise FeatureError(
            f"{path} is not the FID's Inception: SHA-256 should be {WEIGHTS_SHA256}, is {found}"
        )
    return path
