"""Export of a checkpoint to a bundle, which is written whole or not at all."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ade_base.errors import UserError
from ade_base.extensions import Graphs as FurtherGraphs
from ade_base.extensions import added, load
from ade_base.files import new_folder
from ade_model.checkpoint import load_model, read_config, round_to_half, save_model
from ade_model.model import ADEModel
from export.copying import copy_bundle
from export.graphs import Graphs
from export.parity import check_parity, make_inputs
from export.to_onnx import export_onnx
from export.to_torchscript import export_torchscript
from serving.engine.backends import BACKENDS, load_backend
from serving.engine.bundle import (
    MANIFEST_NAME,
    TORCHSCRIPT_NAME,
    check_name,
    open_bundle,
    verify_bundle,
    write_manifest,
)
from serving.engine.signatures import graphs_of, inputs_of
from training.data import Dataset
from training.datasets.sketch import KEY, record_of, sketch_in

MAX_BPD = 1e-3  # smaller than any difference that figures show


class ExportError(UserError, ValueError):
    """The bundle cannot be written as requested."""


def export_bundle(
    checkpoint: Path,
    out: Path,
    name: str,
    images: np.ndarray,
    evaluation: dict[str, Any] | None,
    report: Callable[[str], None] = lambda line: None,
    licence: str | None = None,
    further: Sequence[str] = (),
    dataset: Dataset | None = None,
) -> None:
    """Export a checkpoint; a bundle is only written if its graphs pass the parity test.

    The bundle's model is the checkpoint's with the VAE's weights rounded to half precision, unless
    that changes the bits per dimension of one of the images by more than :data:`MAX_BPD`.

    Args:
        checkpoint: folder with ``model.safetensors`` and ``config.json``.
        out: the bundle's folder; must not exist.
        name: of the model, in answers and manifests.
        images: uint8 ``(N, H, W, C)``, held-out images for the parity test, preferably 40 or more.
        evaluation: figures of ``ade evaluate`` by part, for the manifest.
        report: called with each line of progress.
        licence: of the weights, for the manifest.
        further: graphs of extensions to add, by name, such as ``codec``.
        dataset: that the checkpoint was trained on, if at hand: the manifest gets a sketch of its
            files if the checkpoint is of a version that kept none. One of another name or other
            splits is not used.

    Raises:
        BundleError: the name is invalid.
        ExportError: ``out`` exists or was made by another process meanwhile, or the images or the
            checkpoint's configuration are unsuitable.
        ParityError: an exported graph differs from the model.
        UserError: the model cannot have the further graphs.
    """
    if out.exists():
        raise ExportError(f"{out} exists: export to a new folder")
    check_name(name)
    model = load_model(checkpoint)
    config = model.config
    shape = (config.image_size, config.image_size, config.channels)
    if images.ndim != 4 or images.shape[1:] != shape:
        expected = ", ".join(map(str, shape))
        raise ExportError(f"images must be (N, {expected}), got {images.shape}")
    about = read_config(checkpoint)
    missing = {"recipe", "data", "splits", "images_seen", "seed"} - about.keys()
    if missing:
        raise ExportError(f"the configuration of {checkpoint} lacks {', '.join(sorted(missing))}")
    extra: dict[str, FurtherGraphs] = {graph: added("graphs")[graph] for graph in further}
    for graphs_of_extension in extra.values():
        load(graphs_of_extension.check)(about)
    data = _data_of(about, dataset, report)
    operations = about.get("operations", config.operations)
    model = _in_half_precision(model, images, "score" in operations, report)
    graphs = Graphs(model)
    names = graphs_of(operations)
    with new_folder(out, ExportError) as folder:
        known = {k: v for k, v in about.items() if k not in ("model", "format_version", KEY)}
        if KEY in data:  # models that are trained from this one remember it
            known[KEY] = data[KEY]
        save_model(model, folder, known)
        examples = {
            graph: make_inputs(images[:2], config.latent_shapes, inputs_of(graph, graphs.levels))
            for graph in names
        }
        for graph in names:
            report(f"exporting {graph}.onnx")
            export_onnx(graphs, graph, examples[graph], folder)
        report(f"exporting {TORCHSCRIPT_NAME}")
        export_torchscript(graphs, examples, folder / TORCHSCRIPT_NAME)
        for graph, graphs_of_extension in extra.items():
            report(f"exporting the {graph}")
            load(graphs_of_extension.write)(model, folder)
        fields: dict[str, Any] = {
            "name": name,
            "recipe": about["recipe"],
            "image_shape": list(shape),
            "latent_shapes": [list(shape) for shape in config.latent_shapes],
            "operations": list(operations),
            "data": data,
            "training": _training_of(model, about),
            "evaluation": evaluation,
            "calibration": None,
            "licence": licence,
        }
        write_manifest(folder, fields)
        report("testing parity")
        bundle = open_bundle(folder)
        threads = torch.get_num_threads()
        try:
            backends = {b: load_backend(bundle, names, b, "cpu") for b in BACKENDS}
            table = check_parity(model, backends, images, operations)
        finally:
            torch.set_num_threads(threads)  # TorchScript's backend takes one
        write_manifest(folder, {**fields, "parity": list(map(asdict, table))})


def _data_of(
    about: dict[str, Any], dataset: Dataset | None, report: Callable[[str], None]
) -> dict[str, Any]:
    """What the manifest says of the training data, with a sketch of its files if there is one."""
    data = {"name": about["data"], "splits": about["splits"]}
    if (sketch := sketch_in(about)) is not None:
        return {**data, KEY: sketch}
    if dataset is None:
        return data
    if data == {"name": dataset.name, "splits": dataset.splits}:
        return record_of(dataset)
    if dataset.folder is not None:
        report(
            f"no sketch of the training files: {dataset.folder} is not, or no longer, what the "
            f"model was trained on ({about['splits'].get('train')})"
        )
    return data


def _in_half_precision(
    model: ADEModel, images: np.ndarray, scores: bool, report: Callable[[str], None]
) -> ADEModel:
    """The model with rounded weights, or as it is if that would change its likelihoods."""
    rounded = copy.deepcopy(model)
    round_to_half(rounded)
    changes = _bpd(rounded, images) - _bpd(model, images) if scores else 0.0
    if np.abs(changes).max() <= MAX_BPD:  # not if it is not a number
        return rounded
    report("half precision changes likelihoods: the weights are stored in single precision")
    return model


def _training_of(model: ADEModel, about: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of a model's training."""
    return {
        "images_seen": about["images_seen"],
        "started_from": about.get("started_from"),
        "seed": about["seed"],
        "weights": sum(p.numel() for p in model.parameters()),
        "flow_weights": sum(p.numel() for p in model.flow.parameters()),
        **{key: about[key] for key in ("flow_from", "guided") if key in about},
    }


def add_graphs(
    folder: Path, out: Path, further: Sequence[str], taken: Callable[[str], Exception]
) -> None:
    """Copy a bundle and add graphs of extensions.

    Args:
        folder: of the bundle.
        out: the new bundle; must not exist.
        further: the graphs, by name.
        taken: turns a message into the error to raise if ``out`` exists.

    Raises:
        BundleError: the bundle is not whole, or was replaced meanwhile.
        UserError: the model cannot have these graphs.
    """
    bundle = verify_bundle(folder)
    for name in further:
        load(added("graphs")[name].check)(
            read_config(folder) | {"operations": list(bundle.operations)}
        )
    with new_folder(out, taken) as temporary:
        copy_bundle(bundle, temporary)
        for name in further:
            for old in temporary.glob(f"{name}*"):
                old.unlink()
            load(added("graphs")[name].write)(load_model(temporary), temporary)
        write_manifest(temporary, bundle.manifest)


def _bpd(model: ADEModel, images: np.ndarray) -> np.ndarray:
    """Bits per dimension of images, always with the same noise."""
    graphs = Graphs(model)
    names = inputs_of("score", graphs.levels)
    inputs = make_inputs(images, model.config.latent_shapes, names)
    with torch.inference_mode():
        parts = graphs.score(*(torch.from_numpy(inputs[name]) for name in names))[0]
    return 8 + np.asarray(parts.sum(1))


def evaluation_of(folder: Path) -> dict[str, Any] | None:
    """The figures that ``ade evaluate`` wrote beside a checkpoint, or those of a bundle's manifest.

    Bundles of any format version are read.

    Raises:
        ExportError: the file is damaged.
    """
    for name, key in ((MANIFEST_NAME, "evaluation"), ("evaluation.json", None)):
        if (folder / name).is_file():
            try:
                values = json.loads((folder / name).read_text())
            except (ValueError, RecursionError) as error:
                raise ExportError(f"{folder / name} is damaged: {error}") from error
            if not isinstance(values, dict):
                raise ExportError(f"{folder / name} is damaged: it is not a JSON object")
            found: dict[str, Any] | None = values if key is None else values.get(key)
            return None if found is None or "data" in found else found  # of version 0.2
    return None
