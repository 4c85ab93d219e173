"""Generate the files of the example workflows from demo/template_graphs.py.

    python -m demo.templates            # all of them, in a ComfyUI of its own
    python -m demo.templates NAME …     # some of them

Writes example_workflows/TITLE.json (for the template browser, which shows a file's name as its title), api/NAME.json (the
same workflow for /prompt) and TITLE.jpg (its thumbnail, painted by the workflow if the pack has all it needs).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from demo.server import ComfyServer
from demo.template_graphs import TEMPLATES, Template
from tools.host import ROOT

_FOLDER = ROOT / "example_workflows"
_PROJECT = "dense2moe-flux"
_LEFT, _TOP, _NOTE_WIDTH = 40, 100, 1000  # of the note
_BETWEEN_COLUMNS, _BETWEEN_NODES, _BETWEEN_GROUPS = 80, 90, 150  # Nodes 2.0 draws a node's foot below its size
_WIDTHS = {"VAEDecode": 220, "D2MExpertMap": 900, "D2MEmojiPrompt": 320, "D2MConvertFlux": 320}
_WIDTH = 300
_PICTURE = {"SaveImage": 280, "D2MExpertMap": 640}  # height of what a node shows
_READOUT = {"D2MLoadFluxMoE", "D2MTopK", "D2MSchedule", "D2MExpertMask", "D2MConvertFlux"}
_SOCKET, _ROW, _TEXT_BOX, _READOUT_HEIGHT, _TITLE, _FRAME = 20, 26, 110, 66, 30, 24
_WINDOW, _ZOOMS = 1400, (0.6, 0.9)  # width of the graph in a laptop's window; bounds of the zoom at which it opens
_THUMBNAIL, _LINE = 256, 40


def specification(info: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the inputs of a node by name, in the order in which the node shows them."""
    sections: Mapping[str, Any] = info["input"]
    inputs = {**sections.get("required", {}), **sections.get("optional", {})}
    order = [name for section in ("required", "optional") for name in info["input_order"].get(section, [])]
    return {name: inputs[name] for name in order}


def is_widget(given: list[Any]) -> bool:
    """Return whether the node shows this input as a widget rather than as a socket."""
    options = given[1] if len(given) > 1 else {}
    typed = given[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO") and not options.get("forceInput")
    return isinstance(given[0], list) or typed


def type_of(given: list[Any]) -> str:
    return "COMBO" if isinstance(given[0], list) else str(given[0])


def width_of(class_type: str) -> int:
    return _WIDTHS.get(class_type, _WIDTH)


def height_of(class_type: str, info: Mapping[str, Any]) -> int:
    """Return the height of a node without its title: sockets, widgets, readout and picture."""
    given = specification(info).values()
    widgets = [it for it in given if is_widget(it)]
    boxes = sum(bool(len(it) > 1 and it[1].get("multiline")) for it in widgets)
    sockets = max(len(given) - len(widgets), len(info["output"]))
    rows = len(widgets) - boxes + sum(bool(len(it) > 1 and it[1].get("control_after_generate")) for it in widgets)
    height = 10 + _SOCKET * sockets + _ROW * rows + _TEXT_BOX * boxes + _PICTURE.get(class_type, 0)
    return height + _READOUT_HEIGHT * (class_type in _READOUT)


def note_height(template: Template) -> int:
    """Return the height of the note: paragraphs, and lines of lists."""
    return 80 + 20 * template.note.count("\n\n") + 24 * template.note.count("\n- ")


Boxes = dict[str, tuple[int, int, int, int]]  # node id → left, top, width, height


def places(template: Template, known: Mapping[str, Any]) -> Boxes:
    """Return the box of each node, without its title: columns from left to right, below the note.

    Templates open whole in the window: the narrower a graph, the larger its text.
    """
    graph, built = template.graph, template.built
    boxes: Boxes = {}
    left = _LEFT
    for column in range(1 + max(built.column.values())):
        top, group, widest = _TOP + note_height(template) + _BETWEEN_GROUPS + built.tops.get(column, 0), None, 0
        for name in (name for name in graph if built.column[name] == column):
            kind = graph[name]["class_type"]
            if group not in (None, built.group[name]):
                above = [box for other, box in boxes.items() if built.group[other] == group]
                top = max(it[1] + it[3] for it in above) + _BETWEEN_GROUPS
            boxes[name] = left, top, width_of(kind), height_of(kind, known[kind])
            top += boxes[name][3] + _BETWEEN_NODES
            group, widest = built.group[name], max(widest, width_of(kind))
        left += widest + _BETWEEN_COLUMNS
    return boxes


def frames(template: Template, boxes: Boxes) -> list[dict[str, Any]]:
    """Return the named groups, each around its nodes."""
    found: list[dict[str, Any]] = []
    for group in dict.fromkeys(template.built.group.values()):
        inside = [boxes[name] for name, its in template.built.group.items() if its == group]
        left, top = min(it[0] for it in inside) - _FRAME, min(it[1] for it in inside) - _TITLE - _FRAME - 20
        right, bottom = max(it[0] + it[2] for it in inside) + _FRAME, max(it[1] + it[3] for it in inside) + 2 * _FRAME
        bounding = [left, top, right - left, bottom - top]
        found.append({"id": len(found) + 1, "title": group, "bounding": bounding, "color": "#3f789e", "flags": {}})
    return found


def drawn(template: Template, known: Mapping[str, Any]) -> dict[str, Any]:
    """Lay out a workflow as the frontend saves it. `known`: the answer of /object_info."""
    graph, boxes = template.graph, places(template, known)
    links: list[list[Any]] = []
    nodes: list[dict[str, Any]] = []
    outputs: dict[tuple[str, int], list[int]] = {}
    for name, node in graph.items():
        kind, (left, top, width, height) = node["class_type"], boxes[name]
        info = known[kind]
        inputs, values = [], []
        for slot, (key, given) in enumerate(specification(info).items()):
            value = node["inputs"].get(key)
            entry: dict[str, Any] = {"name": key, "type": type_of(given), "link": None}
            if is_widget(given):
                entry["widget"] = {"name": key}
                options = given[1] if len(given) > 1 else {}
                if isinstance(value, list):
                    raise ValueError(f"{template.name}: the widget {name}.{key} cannot have a link.")
                values.append(value)
                if options.get("control_after_generate"):
                    values.append("fixed")
            elif isinstance(value, list):
                links.append([len(links) + 1, int(value[0]), value[1], int(name), slot, type_of(given)])
                entry["link"] = len(links)
                outputs.setdefault((value[0], value[1]), []).append(len(links))
            inputs.append(entry)
        nodes.append(
            {
                "id": int(name), "type": kind, "pos": [left, top], "size": [width, height], "flags": {},
                "order": len(nodes), "mode": 0, "inputs": inputs,
                "outputs": list(enumerate(zip(info["output_name"], info["output"], strict=True))),
                "properties": {"Node name for S&R": kind, "cnr_id": _PROJECT if kind.startswith("D2M") else "comfy-core"},
                "widgets_values": values,
            }
        )  # fmt: skip
    for node in nodes:
        node["outputs"] = [
            {"name": output, "type": kind, "links": outputs.get((str(node["id"]), slot), [])}
            for slot, (output, kind) in node["outputs"]
        ]
    last = max(int(name) for name in graph) + 1
    note = {
        "id": last, "type": "MarkdownNote", "pos": [_LEFT, _TOP], "size": [_NOTE_WIDTH, note_height(template)], "flags": {},
        "order": len(nodes),
        "mode": 0, "inputs": [], "outputs": [], "properties": {}, "widgets_values": [template.note],
    }  # fmt: skip
    right = max(left + width for left, _, width, _ in boxes.values())
    scale = min(max(_WINDOW / right, _ZOOMS[0]), _ZOOMS[1])
    return {
        "id": template.name, "revision": 0, "last_node_id": last, "last_link_id": len(links), "nodes": [note, *nodes],
        "links": links, "groups": frames(template, boxes), "config": {},
        "extra": {"ds": {"scale": round(scale, 2), "offset": [80, 140]}}, "version": 0.4,
    }  # fmt: skip


def thumbnail(template: Template, images: list[Image.Image], file: Path) -> None:
    """Write the last picture that the workflow saved, in a square, above the template's line."""
    square = Image.new("RGB", (_THUMBNAIL, _THUMBNAIL), (32, 32, 36))
    pen, room = ImageDraw.Draw(square), _THUMBNAIL - _LINE
    if images:
        picture = images[-1]
        size = min(_THUMBNAIL / picture.width, room / picture.height)
        small = picture.resize((round(picture.width * size), round(picture.height * size)), Image.Resampling.LANCZOS)
        square.paste(small, ((_THUMBNAIL - small.width) // 2, (room - small.height) // 2))
    else:
        for row in range(8):  # experts of a FLUX.1: the shared one, and two of twelve
            for expert in range(13):
                chosen = expert in (0, 1 + row * 5 % 12, 1 + row * 7 % 12)
                box = (14 + expert * 18, 20 + row * 23, 26 + expert * 18, 36 + row * 23)
                pen.rectangle(box, fill=(59, 130, 246) if chosen else (64, 64, 72))
    font = ImageFont.load_default(size=17)
    pen.text((_THUMBNAIL / 2, room + _LINE / 2), template.line, fill=(235, 235, 235), font=font, anchor="mm")
    square.save(file, quality=88)


def write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *(template.name for template in TEMPLATES)])
    parser.add_argument("--no-pictures", action="store_true", help="leave the thumbnails as they are")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, ComfyServer(Path(temporary)) as server:
        known = server.get("/object_info")
        for template in TEMPLATES:
            if arguments.names and template.name not in arguments.names:
                continue
            write_json(_FOLDER / f"{template.title}.json", drawn(template, known))
            write_json(_FOLDER / "api" / f"{template.name}.json", template.graph)
            if not arguments.no_pictures:
                images = server.run(template.graph) if template.runs else []
                thumbnail(template, images, _FOLDER / f"{template.title}.jpg")
            print(template.name, flush=True)


if __name__ == "__main__":
    main()
