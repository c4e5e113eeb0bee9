"""The tab *About*: a model card for people, and the API's reference."""

from __future__ import annotations

import base64
import re
from html import escape
from typing import Any

import gradio as gr
import httpx

from ade_base.brand import NAME, percent
from ade_client.client import AdeError
from serving.api.openapi import openapi_document
from serving.engine.bundle import Bundle
from serving.page import charts
from serving.page.reference import reference
from serving.page.served import Runs, Served, Shared, html, latest_only
from serving.verdict.calibration_file import Calibrations

UNITS = {"relative": "of a latent's size"}  # of differences, for people
# What a recipe trains, by the beginning of its name.
RECIPES = {
    "av-ade": "a variational autoencoder whose decoder works in the feature space of a Real-NVP, "
    "trained by likelihood and by an adversarial loss",
    "v-ade": "a variational autoencoder whose decoder works in the feature space of a Real-NVP, "
    "trained by likelihood",
    "av-gde": "a variational autoencoder, trained by likelihood and by an adversarial loss",
    "vae": "a variational autoencoder, trained by likelihood",
    "real-nvp": "a Real-NVP flow, trained by likelihood",
    "flow-gan-h": "a Real-NVP flow, trained by likelihood and by an adversarial loss",
    "flow-gan": "a Real-NVP flow, trained by an adversarial loss",
    "gan": "a generator, trained by an adversarial loss",
}
# The networks whose features `ade evaluate` compares, for people; the first one measured is shown.
NETWORKS = {
    "resnet20-cifar10": "a small network",
    "efficientnet-lite0": "a network trained on ImageNet",
}
PAPER = "https://arxiv.org/abs/1901.01091"
SAMPLES = 16
SEED = 7
DATA = {"cifar10": "CIFAR-10"}  # names for people
PARTS = {  # what the parts of the data are for
    "train": "to train",
    "select": "to choose between training states",
    "calibrate": "to calibrate the verdict",
    "test": "held out, for the figures above",
}
PART = re.compile(r"\w+\[(\d+):(\d+)\]")
ALPHA = 0.01
ALWAYS = 0.99  # of corrupted images, from which on they count as caught


def add_tab(shared: Shared) -> None:
    """Lay the tab out; the samples on the card are drawn when it is opened."""
    served, model = shared.served, shared.model

    def about(model: str) -> str:
        """The card of a model, HTML."""
        return card(served, model)

    def pictures(model: str) -> str:
        """Samples of a model as an image, HTML."""
        try:
            data, _ = served.clients[model].sample_png(SAMPLES, seed=SEED)
        except (AdeError, httpx.TransportError):
            return charts.empty("The samples cannot be drawn at the moment.")
        source = base64.b64encode(data).decode()
        return (
            f'<figure class="ade-part ade-samples"><img src="data:image/png;base64,{source}" '
            f'alt="{SAMPLES} samples of {escape(model)}"><figcaption class="ade-caption">'
            f"{SAMPLES} samples of seed {SEED}, not hand-picked.</figcaption></figure>"
        )

    drawn = latest_only(pictures, 1)

    def drawn_if_shown(model: str, shown: str, runs: Runs) -> Any:
        return drawn(model, runs) if shown == shared.tab.label else gr.skip()

    with gr.Row():
        with gr.Column(scale=3, min_width=280):
            shown = html(about(served.first))
        with gr.Column(scale=1, min_width=240):
            samples = html()
    names = list(served.bundles.values())
    document = openapi_document(served.url, names, served.needs_token)
    html(reference(document, served.url))
    quiet: Any = {"show_progress": "hidden", "api_visibility": "private"}
    events = [shared.tab.select, model.change]  # the calibration may have been replaced
    gr.on(
        events,
        about,
        model,
        shown,
        api_name="about",
        show_progress="hidden",
        trigger_mode="always_last",  # else a model chosen meanwhile would keep the former's card
    )
    runs = gr.State(Runs())
    shared.tab.select(drawn, [model, runs], samples, trigger_mode="multiple", **quiet)
    model.change(
        drawn_if_shown, [model, shared.shown, runs], samples, trigger_mode="multiple", **quiet
    )


def card(served: Served, model: str) -> str:
    """The content of a manifest, for people; HTML."""
    bundle, calibrations = served.bundles[model], served.calibrations_of(model)
    manifest = bundle.manifest
    height, width, channels = bundle.image_shape
    training, data = manifest.get("training") or {}, manifest["data"]
    recipe = str(manifest["recipe"])
    kind = next(
        (words for start, words in RECIPES.items() if recipe.startswith(start)),
        f"a generative model of the recipe {escape(recipe)}",
    )
    splits = "".join(
        f"<li>{_part(str(part), str(what))}</li>"
        for part, what in (data.get("splits") or {}).items()
    )
    name = _for_people(str(data.get("name")))
    known = _for_people(served.calibration_data(model))
    return f"""<article class="ade-part">
<h2>{escape(bundle.model_id)}</h2>
<p>{kind[:1].upper()}{kind[1:]}. It takes images of {width} × {height} pixels
{"in colour" if channels == 3 else "in grey"} and has {training.get("weights", 0):,}
weights.</p>
<h3>What it is good for</h3>
<ul>{"".join(f"<li>{use}</li>" for use in _uses(bundle, calibrations, known))}</ul>
<h3>What it is not good for</h3>
<ul>
<li><strong>To recognise what an image shows.</strong> {_what_it_sees(bundle)}
another kind of thing in an ordinary-looking image may be accepted.</li>
<li><strong>To judge images of another source</strong>, unless it is calibrated with such
images.</li>
<li><strong>To judge fine detail.</strong> It sees {width} × {height} pixels: a photograph is
made that small first.</li>
<li><strong>To judge without false alarms.</strong> At a false-alarm rate of 1&nbsp;%, about one
in a hundred in-distribution images is rejected.</li>
<li><strong>To compare likelihoods of different sizes.</strong> A resized image has another
likelihood than the original.</li>
</ul>
<h3>Figures</h3>
<div class="ade-figures">{"".join(_figures(manifest, calibrations, known))}</div>
<h3>Trained on</h3>
<p>{name}, {training.get("images_seen", 0):,} images shown in the last stage, with repetition.</p>
<ul>{splits}</ul>
<h3>Licence and links</h3>
<p>{escape(manifest.get("licence") or "Licence not stated")}.</p>
<ul>
<li><a href="{PAPER}" target="_blank" rel="noopener noreferrer">The paper: Adaptive Density
Estimation for Generative Models</a>, Lucas et al., NeurIPS 2019, which {NAME} implements.</li>
<li><a href="/openapi.json">The OpenAPI document</a> of this service.</li>
<li>The documentation is in the folder <code>docs/</code> of the repository; begin with
<code>docs/quickstart.md</code>.</li>
</ul>
{_exports(manifest)}
</article>"""


def _for_people(data: str) -> str:
    """The name of a data set, HTML."""
    return escape(DATA.get(data, data))


def _part(part: str, what: str) -> str:
    """One part of the data in words: its size, its purpose, and which images it has."""
    span = PART.fullmatch(what)
    count = f"{int(span[2]) - int(span[1]):,} images " if span else ""
    return f"{count}{escape(PARTS.get(part, part))}: <code>{escape(what)}</code>"


def _what_it_sees(bundle: Bundle) -> str:
    """What a verdict depends on; completed by what may still be accepted."""
    if bundle.manifest.get("features"):
        return "An encoder compares it with known images, but"
    return "A verdict is about how an image looks:"


def _uses(bundle: Bundle, calibrations: Calibrations, data: str) -> list[str]:
    """What the model can be used for, and how well; ``data`` calibrated it. HTML."""
    uses = []
    exact = calibrations.exact
    if exact is not None:
        caught = exact.caught(ALPHA)
        known = [escape(name) for name, share in caught.items() if share >= ALWAYS]
        missed = [f"{escape(k)} ({percent(v)})" for k, v in caught.items() if v < ALWAYS]
        use = f"<strong>To find images that are unlike those of {data}.</strong> "
        if caught:
            use += f"At a false-alarm rate of {percent(ALPHA)} it rejects "
        if known:
            use += f"practically all images with these corruptions: {'; '.join(known)}"
        if missed:
            use += f"{', and ' if known else ''}a part of these: {'; '.join(missed)}"
        uses.append(use + ("." if caught else ""))
    if "sample" in bundle.operations:
        uses.append(
            "<strong>To draw new images</strong> that a seed reproduces. They are like the "
            "samples on this page: shapes and colours of the data, not photographs."
        )
    if "reconstruct" in bundle.operations:
        uses.append(
            "<strong>To encode images, walk between them, and decode them again</strong>: see "
            "<em>Reconstruct</em> and <em>Explore</em>."
        )
    return uses


def _figures(manifest: dict[str, Any], calibrations: Calibrations, data: str) -> list[str]:
    """The main figures, each with its meaning; ``data`` calibrated the verdict. HTML."""
    figures = []

    def add(value: str, meaning: str) -> None:
        figures.append(f'<div class="ade-figure"><b>{value}</b><span>{meaning}</span></div>')

    evaluation = manifest.get("evaluation") or {}
    if evaluation.get("part") == "train":  # as version 0.1 could store
        evaluation = {}
    if "elbo" in evaluation:
        elbo = evaluation["elbo"]
        add(
            f"{elbo['bpd']:.3f} ± {elbo['standard_error']:.3f}",
            f"bits per dimension on {evaluation['images']:,} held-out images; lower is "
            "better, and uncompressed pixels have 8",
        )
    if "psnr" in evaluation:
        decibels, images = evaluation["psnr"]["mean_db"], f"{evaluation['psnr']['images']:,}"
        if decibels is None:
            add("Exact", f"all {images} reconstructions of held-out images equal them")
        else:
            add(
                f"{decibels:.1f} dB",
                f"PSNR of reconstructions of {images} held-out images, on average; higher is "
                "better",
            )
    distance = _distance(evaluation)
    if distance is not None:
        value, samples, network = distance
        add(
            f"{value:.1f}",
            f"Fréchet distance of {samples:,} clean samples to held-out images, in the features of "
            f"{network}; 0 is equal; it is not the FID",
        )
    calibration = calibrations.exact
    if calibration is not None:
        add(
            f"{len(calibration.scores):,} images",
            f"of {data} calibrated the verdict; no p-value is below "
            f"{calibration.smallest_p_value:.2g}",
        )
    else:
        add("No verdict", "the bundle is not calibrated")
    return figures


def _distance(evaluation: dict[str, Any]) -> tuple[float, int, str] | None:
    """The Fréchet distance to show, its number of samples, and the network of its features.

    ``None`` if none was measured that is independent and reliable.
    """
    measured = (evaluation.get("distances") or {}).get("mean") or {}
    for space, network in NETWORKS.items():
        found = measured.get(space) or {}
        if "frechet" in found and not (found.get("independent") or found.get("rank_deficient")):
            return found["frechet"], found["samples"], network
    # Bundles of version 0.1.
    older = next((v for k, v in evaluation.items() if k.startswith("frechet")), None) or {}
    return (older["mean"], older["samples"], "a small network") if "mean" in older else None


def _exports(manifest: dict[str, Any]) -> str:
    parity = manifest.get("parity") or []
    worst = {
        unit: max(row["difference"] for row in parity if row["unit"] == unit)
        for unit in dict.fromkeys(row["unit"] for row in parity)
    }
    if not worst:
        return ""
    rows = "".join(
        f"<li>{value:.2g} {escape(UNITS.get(unit, unit))}</li>" for unit, value in worst.items()
    )
    return (
        "<details><summary>How exact the exports are</summary><p>Largest differences between the "
        f"exported graphs and the trained model:</p><ul>{rows}</ul></details>"
    )
