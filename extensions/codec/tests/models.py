"""Small models with a codec, and images for them."""

import io
import zipfile

import numpy as np
import torch
from PIL import Image

from ade_model.checkpoint import save_model
from ade_model.config import ModelConfig
from export.graphs import Graphs
from export.parity import make_inputs
from export.to_onnx import export_onnx
from extensions.codec.graphs import write_codec
from extensions.codec.sources import ArraySource
from serving.engine.bundle import open_bundle, write_manifest
from serving.engine.signatures import inputs_of
from tests.helpers import make_model

Members = dict[str, bytes]
MANIFEST = "manifest.json"
BLOCKS = {"widths": (8, 8), "latent_channels": (3, 2), "decoder_blocks": (1, 1)}
FLOW = {"flow_couplings": 1, "flow_width": 8}
CONFIGS = {
    "av-ade": ModelConfig(image_size=8, **BLOCKS, **FLOW),
    "v-ade": ModelConfig(image_size=8, dequantizer_width=8, **BLOCKS, **FLOW),
    "flagship": ModelConfig(
        image_size=8,
        widths=(8, 8),
        latent_channels=(4, 2),
        latent_groups=2,
        decoder_blocks=(1, 1),
        **FLOW,
    ),
    "real-nvp": ModelConfig(
        image_size=8,
        widths=(),
        latent_channels=(),
        decoder_blocks=(),
        flow_scales=2,
        flow_mask="checkerboard",
        **FLOW,
    ),
    "vae": ModelConfig(
        image_size=8,
        channels=1,
        widths=(8, 8),
        latent_channels=(3, 0),
        decoder_blocks=(1, 0),
        flow_scales=0,
        sigma="scalar",
    ),
}


def fitted(config, images):
    """A model trained for some seconds."""
    model = make_model(config, scale=0.06).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(150):
        chosen = images[torch.randint(len(images), (50,), generator=generator).numpy()]
        optimizer.zero_grad()
        (-log_weights(model, chosen, generator).mean() / config.num_dims).backward()
        optimizer.step()
    return model.eval()


def log_weights(model, images, generator):
    """Of one draw for each image, whose mean is the ELBO of 8-bit images; nats."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    seen = model.dequantize(pixels, torch.rand(pixels.shape, generator=generator))
    shapes = model.config.latent_shapes
    eps = [torch.randn(len(images), *shape, generator=generator) for shape in shapes]
    return model.elbo_terms(seen, eps).log_weight - model.config.num_dims * np.log(256)


def make_bundle(folder, name, images, scores):
    """A codec's bundle of a model of these images, with the score graph if needed."""
    config = CONFIGS[name]
    folder.mkdir()
    model = fitted(config, images[..., : config.channels])
    save_model(model, folder, {"recipe": name})
    write_codec(model, folder)
    shape = (config.image_size, config.image_size, config.channels)
    if scores:
        graphs = Graphs(model)
        names = inputs_of("score", graphs.levels)
        example = np.zeros((2, *shape), np.uint8)
        export_onnx(graphs, "score", make_inputs(example, config.latent_shapes, names), folder)
    fields = {
        "name": name,
        "recipe": name,
        "image_shape": list(shape),
        "latent_shapes": [list(s) for s in config.latent_shapes],
        "operations": ["score"],
        "data": {"name": "corners", "splits": {}},
    }
    write_manifest(folder, fields)
    return open_bundle(folder)


def random_words(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)


def hard_images(shape):
    checks = (np.indices(shape[:2]).sum(0) % 2 * 255).astype(np.uint8)
    return np.stack(
        [
            np.zeros(shape, np.uint8),
            np.full(shape, 255, np.uint8),
            np.full(shape, 127, np.uint8),
            np.repeat(checks[:, :, None], shape[2], 2),
            np.random.default_rng(0).integers(0, 256, shape, np.uint8),
        ]
    )


def save_array(path, images):
    np.save(path, images)
    return ArraySource(path)


def saved(format, mode="RGB", **options):
    out = io.BytesIO()
    Image.fromarray(hard_images((8, 8, 3))[4]).convert(mode).save(out, format, **options)
    return out.getvalue()


def members_of(archive):
    with zipfile.ZipFile(archive) as file:
        return {name: file.read(name) for name in file.namelist()}
