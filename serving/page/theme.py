"""Gradio's theme in the colours and fonts of :mod:`ade_base.brand`, style sheets and scripts."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr
from gradio.themes.utils.colors import Color

from ade_base.brand import STYLE
from ade_base.pictures.read import IMAGE_SUFFIXES

HERE = Path(__file__).parent
SUFFIXES = json.dumps(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
SCRIPT = f"const IMAGE_SUFFIXES = {SUFFIXES};\n{(HERE / 'page.js').read_text()}"
# In the page's head, because Gradio rewrites what it gets as `css`.
HEAD = f"<style>{STYLE}\n{(HERE / 'page.css').read_text()}</style><script>{SCRIPT}</script>"
BLUE = Color(
    *("#eef3fb", "#dbe6f6", "#b9cdec", "#8fadd9", "#6588bf", "#4769a5", "#2b4a7f"),
    *("#24406f", "#1c335a", "#162846", "#0f1c33"),
    name="blue",
)
STONE = Color(
    *("#fafaf8", "#f0f0eb", "#e4e4dc", "#cfd0cb", "#9aa1ad", "#6d7584", "#565e6e"),
    *("#3b4350", "#262d38", "#1a2029", "#12161d"),
    name="stone",
)


def make_theme() -> gr.themes.Base:
    """The page's theme; its fonts come with Gradio, so no other host is contacted."""
    theme = gr.themes.Base(
        primary_hue=BLUE,
        secondary_hue=BLUE,
        neutral_hue=STONE,
        radius_size=gr.themes.sizes.radius_md,
        font=[gr.themes.LocalFont("IBM Plex Sans", (400, 700)), "system-ui", "sans-serif"],
        font_mono=[gr.themes.LocalFont("IBM Plex Mono", (400, 700)), "ui-monospace", "monospace"],
    )
    same = {
        "body_background_fill": "var(--ade-paper)",
        "body_text_color": "var(--ade-ink)",
        "body_text_color_subdued": "var(--ade-muted)",
        "background_fill_primary": "var(--ade-surface)",
        "background_fill_secondary": "var(--ade-paper)",
        "block_background_fill": "var(--ade-surface)",
        "block_border_color": "var(--ade-line)",
        "block_label_background_fill": "var(--ade-surface)",
        "block_label_text_color": "var(--ade-muted)",
        "block_title_text_color": "var(--ade-ink)",
        "block_info_text_color": "var(--ade-muted)",
        "border_color_primary": "var(--ade-line)",
        "border_color_accent": "var(--ade-accent)",
        "color_accent_soft": "var(--ade-sunken)",
        "input_background_fill": "var(--ade-surface)",
        "input_border_color": "var(--ade-line)",
        "input_placeholder_color": "var(--ade-muted)",
        "link_text_color": "var(--ade-accent)",
        "slider_color": "var(--ade-accent)",
        "table_border_color": "var(--ade-line)",
        "checkbox_label_background_fill": "var(--ade-surface)",
        "checkbox_label_background_fill_selected": "var(--ade-sunken)",
        "checkbox_label_text_color": "var(--ade-ink)",
        "checkbox_label_text_color_selected": "var(--ade-ink)",
        "button_secondary_background_fill": "var(--ade-surface)",
        "button_secondary_background_fill_hover": "var(--ade-sunken)",
        "button_secondary_border_color": "var(--ade-line)",
        "button_secondary_text_color": "var(--ade-ink)",
        "button_primary_background_fill": "var(--ade-action)",
        "button_primary_background_fill_hover": "var(--ade-action-hover)",
        "button_primary_text_color": "#ffffff",
        "checkbox_background_color_selected": "var(--ade-action)",
        "checkbox_border_color_selected": "var(--ade-action)",
    }
    return theme.set(
        **same,
        color_accent="var(--ade-accent)",
        **{f"{name}_dark": value for name, value in same.items()},
        block_label_text_size="13px",
        block_title_text_size="14px",
        block_title_text_weight="600",
        button_large_text_weight="600",
        button_border_width="1px",
        button_border_width_dark="1px",
        button_primary_border_color="transparent",
        button_primary_border_color_dark="transparent",
        input_border_width="1px",
        input_border_width_dark="1px",
        block_shadow="none",
        block_shadow_dark="none",
    )
