"""The page of `smca demo --serve`, in gradio, which this module needs to be imported; explore.py does the computing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..detector import SMCA
from . import explore
from .explore import Explored  # gradio reads the annotations of what it calls
from .learning import SCORE

TITLE = "Where an SMCA detector looks"
LARGEST_FILE = "200mb"
STATE_SECONDS = 3600  # how long a closed page's photograph is kept
CSS = """
.gradio-container {max-width: 1500px !important; margin: auto}
#status {font-size: 1.1em; min-height: 1.6em}
#examples .grid-wrap, #attention img {margin-top: 2rem}  /* below the label, which would cover them */
"""
SYSTEM_FONT = ("system-ui", "sans-serif")


def build_page(model: SMCA, name: str, examples: Sequence[tuple[Path, str]]) -> gr.Blocks:
    """The page as gradio's Blocks.

    Args:
        model: in evaluation mode.
        name: of its weights, as the page shows it.
        examples: files and names of photographs to choose from.
    """
    lock = threading.Lock()  # one model, one matplotlib, many visitors

    def show_photograph(path: str | Path, threshold: float) -> tuple[Any, ...]:
        try:
            with lock:
                explored = explore.explore(model, Path(path))
        except ValueError as error:
            return None, None, str(error), _choices(None, threshold), None
        return explored, *show_boxes(explored, threshold, None)

    def show_upload(path: str, threshold: float) -> tuple[Any, ...]:
        # An example that stays selected could not be clicked again.
        return *show_photograph(path, threshold), gr.Gallery(selected_index=None)

    def show_example(threshold: float, event: gr.SelectData) -> tuple[Any, ...]:
        return *show_photograph(examples[event.index][0], threshold), None

    def show_boxes(explored: Explored | None, threshold: float, chosen: int | None) -> tuple[Any, ...]:
        if explored is None:
            return None, "", _choices(None, threshold), gr.skip()
        with lock:
            picture = explore.picture_of_boxes(explored, threshold)
        count = explored.count(threshold)
        told = f"{count} {'object' if count == 1 else 'objects'} of score {threshold:.2f} or more"
        told += ". Click on a box to see how it was found." if count else ": try a lower score."
        if chosen is not None and chosen < count:
            return picture, told, _choices(explored, threshold, chosen), gr.skip()
        return picture, told, _choices(explored, threshold), None

    def show_click(explored: Explored | None, threshold: float, event: gr.SelectData) -> tuple[Any, ...]:
        if explored is None:
            return gr.skip(), gr.skip(), gr.skip()
        x, y = explored.position(event.index)
        chosen = explore.box_at(explored, (x, y), threshold)
        if chosen is None:
            return None, f"No box at ({x:.0f}, {y:.0f}): click inside a box.", None
        return chosen, *show_attention(explored, chosen)

    def show_attention(explored: Explored | None, chosen: int | None) -> tuple[Any, ...]:
        if explored is None or chosen is None:
            return "", None
        with lock:
            picture = explore.picture_of_attention(explored, chosen)
        return f"{explored.describe(chosen)}, found by query {int(explored.found['queries'][chosen])}", picture

    def _choices(explored: Explored | None, threshold: float, chosen: int | None = None) -> Any:
        count = 0 if explored is None else explored.count(threshold)
        named = [(f"{i + 1}: {explored.describe(i)}", i) for i in range(count)] if explored else []
        return gr.Dropdown(choices=named, value=chosen)

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(STATE_SECONDS, STATE_SECONDS)) as page:
        explored = gr.State(time_to_live=STATE_SECONDS)
        gr.Markdown(
            f"# {TITLE}\nBoxes that a detector with spatially modulated co-attention finds in a photograph; a click on "
            "one shows the prior and the attention of the query that found it, for each head and scale."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                upload = gr.File(label="Photograph", file_types=["image"], height=140, elem_id="upload")
                gallery = gr.Gallery(
                    [(str(file), caption) for file, caption in examples],
                    label="Or an example",
                    columns=3,
                    height=300,
                    object_fit="cover",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="examples",
                )
                score = gr.Slider(0, 1, SCORE, step=0.01, label="Least score", elem_id="score")
                box = gr.Dropdown([], label="Box (or click on it)", interactive=True, elem_id="box")
                gr.Textbox(name, label="Weights", interactive=False)
            with gr.Column(scale=5, min_width=400):
                status = gr.HTML(
                    "Choose a photograph.",
                    # Text, not HTML: names of classes and files are anybody's.
                    html_template="<span>{{value}}</span>",
                    js_on_load="element.setAttribute('role', 'status')",
                    elem_id="status",
                )
                boxes = gr.Image(
                    show_label=False,  # like buttons it would lie on the photograph, and take clicks
                    interactive=False,
                    buttons=[],
                    height=620,
                    elem_id="boxes",
                    alt_text="The photograph with a box around each object, named with class and score",
                )
        attention = gr.Image(
            label="Prior and attention of the query behind the box: a row a scale",
            interactive=False,
            format="png",
            buttons=["fullscreen", "download"],
            elem_id="attention",
            alt_text="The query's prior, the attention of each head and of all heads, over the photograph",
        )
        shown = [boxes, status, box, attention]
        quietly: dict[str, Any] = {"api_visibility": "private"}
        upload.upload(show_upload, [upload, score], [explored, *shown, gallery], **quietly)
        gallery.select(show_example, score, [explored, *shown, upload], **quietly)
        moved: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"}
        score.change(show_boxes, [explored, score, box], shown, **moved, **quietly)
        boxes.select(show_click, [explored, score], [box, status, attention], **quietly)
        box.input(show_attention, [explored, box], [status, attention], **quietly)
    return page


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Start the page's server, in threads of its own.

    Raises:
        OSError: for a port that is taken.
    """
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        max_file_size=LARGEST_FILE,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        theme=gr.themes.Default(font=SYSTEM_FONT, font_mono=("ui-monospace", "monospace")),
        css=CSS,
    )
