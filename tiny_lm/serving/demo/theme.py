"""Gradio theme with the colors and fonts of our pages, light and dark."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradio.themes import Base

_SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif"]
_MONO = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "Liberation Mono", "monospace"]

# The variables are those of tiny_lm/pages/page.css, which adapt to the color scheme themselves.
_COLORS = {
    "body_background_fill": "var(--paper)",
    "body_text_color": "var(--ink)",
    "body_text_color_subdued": "var(--soft)",
    "background_fill_primary": "var(--paper)",
    "background_fill_secondary": "var(--raised)",
    "border_color_primary": "var(--rule)",
    "border_color_accent": "var(--train)",
    "color_accent_soft": "var(--c0)",
    "block_background_fill": "transparent",
    "block_border_color": "transparent",
    "block_label_background_fill": "transparent",
    "block_label_text_color": "var(--ink)",
    "block_title_text_color": "var(--ink)",
    "block_info_text_color": "var(--soft)",
    "panel_background_fill": "transparent",
    "input_background_fill": "var(--field)",
    "input_background_fill_focus": "var(--field)",
    "input_border_color": "var(--edge)",
    "input_border_color_focus": "var(--train)",
    "input_placeholder_color": "var(--soft)",
    "slider_color": "var(--train)",
    "loader_color": "var(--train)",
    "accordion_text_color": "var(--ink)",
    "button_primary_background_fill": "var(--train)",
    "button_primary_background_fill_hover": "var(--train)",
    "button_primary_text_color": "var(--paper)",
    "button_primary_text_color_hover": "var(--paper)",
    "button_primary_border_color": "var(--train)",
    "button_primary_border_color_hover": "var(--train)",
    "button_secondary_background_fill": "var(--field)",
    "button_secondary_background_fill_hover": "var(--raised)",
    "button_secondary_text_color": "var(--ink)",
    "button_secondary_text_color_hover": "var(--ink)",
    "button_secondary_border_color": "var(--edge)",
    "button_secondary_border_color_hover": "var(--soft)",
    "button_cancel_background_fill": "var(--field)",
    "button_cancel_background_fill_hover": "var(--raised)",
    "button_cancel_text_color": "var(--val)",
    "button_cancel_text_color_hover": "var(--val)",
    "button_cancel_border_color": "var(--val)",
    "button_cancel_border_color_hover": "var(--val)",
    "checkbox_label_background_fill": "transparent",
    "checkbox_label_background_fill_hover": "var(--raised)",
    "checkbox_label_background_fill_selected": "var(--raised)",
    "checkbox_label_border_color": "transparent",
    "checkbox_label_text_color": "var(--soft)",
    "checkbox_label_text_color_selected": "var(--ink)",
    "error_background_fill": "var(--paper)",
    "error_border_color": "var(--val)",
    "error_text_color": "var(--ink)",
    "error_icon_color": "var(--val)",
}
_SIZES = {
    "color_accent": "var(--train)",  # has no separate value for the dark scheme
    "block_border_width": "0px",
    "block_label_border_width": "0px",
    "block_title_border_width": "0px",
    "block_shadow": "none",
    "block_padding": "0px",
    "block_radius": "6px",
    "block_title_text_weight": "600",
    "button_border_width": "1px",
    "button_small_radius": "999px",
    "button_medium_radius": "6px",
    "button_medium_text_weight": "600",
    "button_small_text_weight": "400",
    "button_transition": "none",
    "button_primary_shadow": "none",
    "button_secondary_shadow": "none",
    "button_cancel_shadow": "none",
    "input_border_width": "1px",
    "input_radius": "6px",
    "input_shadow": "none",
    "input_shadow_focus": "none",
    "layout_gap": "1.1rem",
    "form_gap_width": "0px",
}


def build_theme() -> "Base":
    """Return the theme; it uses system fonts, so that none is downloaded."""
    from gradio.themes import Base
    from gradio.themes.utils import sizes

    dark = {f"{name}_dark": value for name, value in _COLORS.items()}
    theme = Base(font=_SANS, font_mono=_MONO, radius_size=sizes.radius_md, text_size=sizes.text_md)
    return theme.set(**_COLORS, **dark, **_SIZES)
