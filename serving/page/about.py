"""The tab *About*: the model's card from its manifest, and how to ask it without a page."""

from __future__ import annotations

from typing import Any

import gradio as gr

from serving.engine.bundle import Bundle
from serving.page.served import Shared

UNITS = {"relative": "of a latent's size"}  # of differences, for people


def add_tab(shared: Shared) -> None:
    """Lay the tab out."""
    served, model = shared.served, shared.model
    names = list(served.bundles)
    first = served.first

    def about(model: str) -> str:
        """The card of a model, Markdown."""
        return card(served.bundles[model], served.url, "" if model == names[0] else f"{model}-")

    shown = gr.Markdown(about(first))
    model.change(about, model, shown, api_name="about")


def card(bundle: Bundle, url: str, prefix: str) -> str:
    """What a manifest says, for people.

    Args:
        bundle: the model's.
        url: of the inference address.
        prefix: of its operations' names.
    """
    manifest = bundle.manifest
    height, width, _ = bundle.image_shape
    training, data = manifest.get("training") or {}, manifest["data"]
    lines = [
        f"## {bundle.model_id}",
        f"- **Model**: `{manifest['recipe']}`, {width} × {height} pixels, "
        f"{training.get('weights', 0):,} weights, latents {', '.join(str(tuple(s)) for s in bundle.latent_shapes)}",
        f"- **Data**: {data.get('name')}, {training.get('images_seen', 0):,} images seen",
    ]
    lines += [f"  - {part}: {what}" for part, what in (data.get("splits") or {}).items()]
    lines += _figures(manifest)
    lines += [
        f"- **Licence**: {manifest.get('licence') or 'not stated'}",
        "- **Limits**: a verdict tells unusual pictures; another kind of thing in a usual picture may pass. "
        "It holds for images like those it was calibrated on.",
        "",
        "### Without the page",
        "```bash",
        f"curl {url}/predictions/{prefix}sample -H 'Content-Type: application/json' -d '{{\"n\": 16, \"seed\": 7}}' "
        "-o samples.png",
        f"curl {url}/predictions/{prefix}score -T image.png",
        f"curl {url}/predictions/{prefix}reconstruct -T image.png -o reconstruction.png",
        f"curl {url}/predictions/{prefix}encode -T image.png -o latents.json",
        "```",
        "All of it: the [OpenAPI document](/openapi.json).",
    ]
    return "\n".join(lines)


def _figures(manifest: dict[str, Any]) -> list[str]:
    lines = []
    evaluation = manifest.get("evaluation") or {}
    if "elbo" in evaluation:
        elbo = evaluation["elbo"]
        lines.append(
            f"- **Likelihood**: {elbo['bpd']:.3f} ± {elbo['standard_error']:.3f} bits per dimension (ELBO, "
            f"{evaluation['images']:,} held-out images)"
        )
    parity = manifest.get("parity") or []
    worst = {
        unit: max(row["difference"] for row in parity if row["unit"] == unit)
        for unit in dict.fromkeys(row["unit"] for row in parity)
    }
    if worst:
        lines.append(
            "- **Exports against the trained model**, largest differences: "
            + ", ".join(f"{value:.2g} {UNITS.get(unit, unit)}" for unit, value in worst.items())
        )
    calibration = manifest.get("calibration") or {}
    if calibration:
        lines.append(
            f"- **Verdict**: calibrated on {calibration['images']:,} images of {calibration['data']}, the "
            f"smallest p-value is {calibration['smallest_p_value']:.2g}"
        )
    else:
        lines.append("- **Verdict**: none, the bundle is not calibrated")
    return lines
