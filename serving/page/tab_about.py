"""The tab *About*: a model card for people, and the API's reference."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr
import httpx
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ade_base.brand import percent
from ade_base.panel import panel_rows
from ade_client.client import AdeError
from serving.api.openapi import openapi_document
from serving.page import charts
from serving.page.inputs import TabContext, html
from serving.page.models import Models
from serving.page.runs import QUIET, Runs, latest_only
from serving.verdict.calibration_file import CalibrationPair

UNITS = {"relative": "of a latent's size"}  # of differences, for people
# What a recipe trains, by the beginning of its name.
RECIPES = {
    "av-ade": "a variational autoencoder whose decoder works in the feature space of a Real-NVP, "
    "trained by likelihood and by an adversarial loss",
}
RECIPES["flagship"] = RECIPES["av-ade"]
PAPER = "https://arxiv.org/abs/1901.01091"
SAMPLES = 16
SEED = 7
DATA = {"cifar10": "CIFAR-10"}  # names for people
PARTS = {  # what the parts of the data are for
    "train": "to train",
    "select": "to choose between training states",
    "calibrate": "to calibrate the verdict",
    "test": "held out, for final figures",
}
PART = re.compile(r"\w+\[(\d+):(\d+)\]")
ALPHA = 0.01
ALWAYS = 0.99  # of corrupted images, from which on they count as caught
# Arguments for curl, by operation.
BODIES = {
    "sample": "-H 'Content-Type: application/json' -d '{\"n\": 16, \"seed\": 7}' -o samples.png",
    "encode": "-F image=@image.png -F resize=fit -o latents.json",
    "reconstruct": "-F image=@image.png -F resize=fit -o reconstruction.png",
    "score": "-F image=@image.png -F resize=fit",
}


class AboutTab:
    """The tab; the samples on the card are drawn when it is opened."""

    def __init__(self, context: TabContext) -> None:
        self.models, self.name = context.models, context.tab.label
        model, opened = context.model, context.tab.select
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                shown = html(self.about(self.models.first))
            with gr.Column(scale=1, min_width=240):
                samples = html()
        html(reference(self.models))
        gr.on(
            [opened, model.change],  # the calibration may have been replaced
            self.about,
            model,
            shown,
            api_name="about",
            show_progress="hidden",
            trigger_mode="always_last",  # else a model chosen meanwhile would keep the former card
        )
        runs, each = gr.State(Runs()), {"trigger_mode": "multiple", **QUIET}
        self.drawn = latest_only(self.pictures, 1)
        opened(self.drawn, [model, runs], samples, **each)
        model.change(self.drawn_if_shown, [model, context.shown, runs], samples, **each)

    def about(self, model: str) -> str:
        """The card of a model, HTML."""
        return card(self.models, model)

    def pictures(self, model: str) -> str:
        """Samples of a model as an image, HTML."""
        try:
            data, _ = self.models.clients[model].sample_png(SAMPLES, seed=SEED)
        except (AdeError, httpx.TransportError):
            return charts.empty("The samples cannot be drawn at the moment.")
        source = base64.b64encode(data).decode()
        return (
            f'<figure class="ade-part ade-samples"><img src="data:image/png;base64,{source}" '
            f'alt="{SAMPLES} samples of {escape(model)}"><figcaption class="ade-caption">'
            f"{SAMPLES} samples of seed {SEED}, not hand-picked.</figcaption></figure>"
        )

    def drawn_if_shown(self, model: str, shown: str, runs: Runs) -> Any:
        return self.drawn(model, runs) if shown == self.name else gr.skip()


def _render(template: str, **values: Any) -> str:
    """Fill a template; text is escaped."""
    environment = Environment(
        loader=PackageLoader("serving.page"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"kind": _kind, "codes": _codes, "arguments": _arguments}
    return environment.get_template(template).render(**values)


def card(models: Models, model: str) -> str:
    """The content of a manifest, for people; HTML."""
    bundle, exact = models.bundles[model], models.calibrations_of(model).exact
    manifest = bundle.manifest
    height, width, channels = bundle.image_shape
    recipe, known = str(manifest["recipe"]), _for_people(models.calibration_data(model))
    kinds = [words for start, words in RECIPES.items() if recipe.startswith(start)]
    shares = {} if exact is None else exact.caught(ALPHA)
    splits = manifest["data"].get("splits") or {}
    parity = manifest.get("parity") or []
    training = manifest.get("training") or {}
    is_projected, is_guided = _helpers(training, recipe)
    return _render(
        "card.html",
        bundle=bundle,
        height=height,
        width=width,
        channels=channels,
        kind=kinds[0] if kinds else f"a generative model of the recipe {recipe}",
        training=training,
        is_projected=is_projected,
        is_guided=is_guided,
        exact=exact,
        known=known,
        caught=[name for name, share in shares.items() if share >= ALWAYS],
        missed={name: percent(share) for name, share in shares.items() if share < ALWAYS},
        figures=list(_figures(manifest, models.calibrations_of(model), known)),
        data=_for_people(str(manifest["data"].get("name"))),
        parts=[(_purpose(str(part), str(which)), which) for part, which in splits.items()],
        paper=PAPER,
        differences={
            UNITS.get(unit, unit): max(r["difference"] for r in parity if r["unit"] == unit)
            for unit in dict.fromkeys(row["unit"] for row in parity)
        },
    )


def _for_people(data: str) -> str:
    """The name of a data set."""
    return DATA.get(data, data)


def _purpose(part: str, which: str) -> str:
    """A part of the data in words: its size and its purpose."""
    span = PART.fullmatch(which)
    count = f"{int(span[2]) - int(span[1]):,} images " if span else ""
    return f"{count}{PARTS.get(part, part)}"


def _figures(
    manifest: dict[str, Any], calibrations: CalibrationPair, data: str
) -> Iterator[tuple[str, str]]:
    """The main figures, each with its meaning; ``data`` calibrated the verdict."""
    part, measured = _measured(manifest)
    for title, value, remark in panel_rows(measured.get("figures") or {}):
        if value != "–":
            yield value, f"{title}{f'; {remark}' if remark else ''}; part {part}"
    if calibrations.exact is None:
        yield "No verdict", "the bundle is not calibrated"
    else:
        yield (
            f"{len(calibrations.exact.scores):,} images",
            f"of {data} calibrated the verdict; no p-value is below "
            f"{calibrations.exact.smallest_p_value:.2g}",
        )


def _measured(manifest: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The part of the data to show figures of, the final one if it was measured, and these."""
    evaluation = manifest.get("evaluation") or {}
    part = next((part for part in ("test", "select") if part in evaluation), "")
    return part, evaluation.get(part) or {}


def _helpers(training: dict[str, Any], recipe: str) -> tuple[bool, bool]:
    """Whether a projected discriminator and guides took part in a training, or in one before it."""
    stages, is_projected, is_guided = [training | {"recipe": recipe}], False, False
    while stages:
        stage = stages.pop()
        is_guided |= bool(stage.get("guided"))
        is_projected |= str(stage.get("recipe")).endswith("-pd") or stage["recipe"] == "flagship"
        stages += [stage[k] for k in ("started_from", "flow_from") if stage.get(k)]
    return is_projected, is_guided


def reference(models: Models) -> str:
    """The API's reference, HTML: nothing is loaded from another host."""
    bundles = list(models.bundles.values())
    document = openapi_document(models.url, bundles, models.needs_token)
    return _render("reference.html", document=document, url=models.url)


def _arguments(name: str) -> str:
    """Arguments for curl; a name of another than the first model ends with the operation."""
    return next((body for operation, body in BODIES.items() if name.endswith(operation)), "")


def _codes(content: dict[str, Any]) -> Markup:
    return Markup(", ").join(Markup("<code>{}</code>").format(kind) for kind in content)


def _kind(schema: dict[str, Any]) -> str:
    """The values of a parameter in a few words."""
    if "enum" in schema:
        kind = " | ".join(map(str, schema["enum"]))
    else:
        given = schema.get("type", "object")
        kind = " or ".join(given) if isinstance(given, list) else str(given)
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum")
    if low is not None and high is not None and high < 2**53:
        kind += f", {'above ' if 'exclusiveMinimum' in schema else ''}{low:g} to {high:g}"
    elif low is not None:
        kind += f", from {low:g}"
    if "default" in schema:
        kind += f", default {str(schema['default']).lower()}"
    return kind
