"""Gradio's theme in the colours and fonts of :mod:`ade_base.brand`, and the style sheets."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from gradio.themes.utils.colors import Color

from ade_base.brand import STYLE
from ade_base.pictures.read import IMAGE_SUFFIXES

OWN = Path(__file__).with_name("page.css").read_text()
# Says what Gradio does not: to screen readers names of examples and of pairs of images, which
# accordions are open, and results that change; to everybody that an image cannot be shown.
NAMES = """
const span_of = (handle) => {  // of the images, which may be narrower than their frame
  const frame = handle.parentElement.getBoundingClientRect();
  const { naturalWidth, naturalHeight } = handle.parentElement.querySelector("img");
  const width = Math.min(frame.width, (frame.height * naturalWidth) / naturalHeight);
  return [frame.x + (frame.width - width) / 2, width];
};
const name_pair = (handle) => {
  const pair = handle.closest(".ade-pair");
  const label = pair.querySelector('[data-testid="block-label"]').textContent.trim();
  const names = label.split(" and ");
  pair.querySelectorAll(".content img").forEach((image, i) => { image.alt = names[i]; });
  const [left, width] = span_of(handle);
  const own = handle.getBoundingClientRect();
  const share = (own.x + own.width / 2 - left) / width;
  if (!isFinite(share)) return;  // it is hidden, or no image is loaded yet
  Object.assign(handle, { tabIndex: 0, role: "slider", ariaLabel: `Divider: ${label}` });
  handle.ariaValueNow = Math.round(100 * Math.min(Math.max(share, 0), 1));
};
const name_parts = () => {
  for (const image of document.querySelectorAll('.ade-examples button img[alt=""]'))
    image.alt = "example " + image.src.split("/").pop().split(".")[0];
  for (const fold of document.querySelectorAll("button.label-wrap"))
    fold.setAttribute("aria-expanded", fold.nextElementSibling?.style.display !== "none");
  // Not the results themselves: only what is there before them announces its changes. Nor the
  // block around, which shows the time that a run takes.
  for (const node of document.querySelectorAll(".ade-live:not(.block)")) node.ariaLive = "polite";
  document.querySelectorAll('.ade-pair [data-testid="slider"]').forEach(name_pair);
};
new MutationObserver(name_parts).observe(
  document.documentElement, { childList: true, subtree: true });
for (const event of ["click", "load", "pointerup"])
  document.addEventListener(event, () => setTimeout(name_parts), { capture: true });
for (const [event, failed] of [["error", true], ["load", false]])
  document.addEventListener(event, ({ target }) => {
    if (target.tagName === "IMG")
      target.closest(".ade-pixels")?.classList.toggle("ade-unshown", failed);
  }, { capture: true });
"""
# By itself, Gradio's upload icon only removes the image.
UPLOAD_ICON = """
document.addEventListener("click", (event) => {
  const icon = event.target.closest('[data-testid="source-select"] [aria-label="Upload file"]');
  if (!icon) return;
  const open = () => icon.closest(".image-container").querySelector("input[type=file]")?.click();
  if (icon.classList.contains("selected")) {
    event.stopPropagation();  // the image stays until a file is chosen
    open();
  } else setTimeout(open);  // Gradio leaves the webcam or the clipboard first
}, { capture: true });
"""
# When an image arrives, Gradio replaces the file input, and would lose what a dialog chooses then.
DIALOG = """
document.addEventListener("click", ({ target: input }) => {
  if (input.type !== "file") return;
  const place = input.parentElement;
  input.onchange = () => {
    const present = place.querySelector("input[type=file]");
    if (input.isConnected || !present) return;
    present.files = input.files;
    present.dispatchEvent(new Event("change"));
  };
}, { capture: true });
"""
# A folder holds other files, too. The page would skip them, but a large one, or a thousand of them
# in a row, would have the upload refused.
FOLDER = f"""
document.addEventListener("change", ({{ target: input }}) => {{
  if (!input.webkitdirectory) return;
  const name = /^(?!\\._).+\\.({"|".join(sorted(one[1:] for one in IMAGE_SUFFIXES))})$/i;
  const images = [...input.files].filter((file) => name.test(file.name));
  if (!images.length) return;  // the refusal says what the page takes
  const kept = new DataTransfer();
  for (const image of images) kept.items.add(image);
  input.files = kept.files;
}}, {{ capture: true }});
"""
# Gradio takes every touch of a pair of images and every turn of the wheel over it, so that the page
# could not be scrolled there. Two fingers, or Ctrl with the wheel, still zoom.
SCROLL = """
for (const name of ["touchstart", "wheel"])
  document.addEventListener(name, (event) => {
    const image = event.target.closest(".ade-pair .content")?.querySelector("img");
    const zooms = event.ctrlKey || event.touches?.length > 1;
    if (image?.style.transform.endsWith("scale(1)") && !zooms) event.stopPropagation();
  }, { capture: true, passive: true });
"""
# Gradio moves the handle between a pair of images only by mouse and touch.
KEYS = """
document.addEventListener("keydown", (event) => {
  const handle = event.target.closest('.ade-pair [role="slider"]');
  const steps = { ArrowLeft: -5, ArrowDown: -5, ArrowRight: 5, ArrowUp: 5, Home: -100, End: 100 };
  if (!handle || !(event.key in steps) || event.altKey || event.metaKey) return;
  event.preventDefault();  // scrolling
  const to = Math.min(Math.max(Number(handle.ariaValueNow) + steps[event.key], 0), 100);
  const [left, width] = span_of(handle);
  const mouse = { view: window, clientX: left + (width * to) / 100 };
  handle.dispatchEvent(new MouseEvent("mousedown", mouse));
  window.dispatchEvent(new MouseEvent("mouseup", mouse));
  handle.ariaValueNow = to;  // at once: the next key may follow before Gradio moves it
  setTimeout(name_parts, 100);  // a click or a load may have read the former place meanwhile
});
"""
SCRIPT = NAMES + UPLOAD_ICON + DIALOG + FOLDER + SCROLL + KEYS
# In the page's head, because Gradio rewrites what it gets as `css`.
HEAD = f"<style>{STYLE}\n{OWN}</style><script>{SCRIPT}</script>"
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
