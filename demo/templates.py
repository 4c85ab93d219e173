"""Generate the files of the example workflows from demo/template_graphs.py.

    python -m demo.templates            # all of them, in a ComfyUI of its own
    python -m demo.templates NAME …     # some of them

Writes example_workflows/NAME.json (for the template browser), api/NAME.json (the same workflow for /prompt) and NAME.jpg
(its thumbnail, painted by the workflow).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from demo.server import ApiGraph, ComfyServer
from demo.template_graphs import TEMPLATES, Template
from tools.host import ROOT

_FOLDER = ROOT / "example_workflows"
_PROJECT = "dense2moe-flux"
_GAP = 40
_WIDTHS = {"VAEDecode": 220, "D2MExpertMap": 900, "SaveImage": 320, "PreviewImage": 320, "MarkdownNote": 340}
_PICTURE = {"SaveImage": 280, "PreviewImage": 280, "D2MExpertMap": 720}  # height of what a node shows
_ROW, _TITLE, _TEXT_BOX = 26, 40, 110
_THUMBNAIL = 256


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


def columns(graph: ApiGraph) -> dict[str, int]:
    """Return the column of each node: the length of the longest chain of nodes before it."""
    column: dict[str, int] = {}

    def depth(name: str) -> int:
        if name not in column:
            before = [value[0] for value in graph[name]["inputs"].values() if isinstance(value, list)]
            column[name] = 1 + max(map(depth, before), default=-1)
        return column[name]

    for name in graph:
        depth(name)
    return column


def width_of(class_type: str) -> int:
    return _WIDTHS.get(class_type, 340)


def drawn(template: Template, known: Mapping[str, Any]) -> dict[str, Any]:
    """Lay out a workflow as the frontend saves it. `known`: the answer of /object_info."""
    graph = template.graph
    column_of = columns(graph)
    links: list[list[Any]] = []
    nodes: list[dict[str, Any]] = []
    heights: dict[int, int] = {}
    widths = [
        max(width_of(graph[name]["class_type"]) for name in graph if column_of[name] == column)
        for column in range(1 + max(column_of.values()))
    ]
    outputs: dict[tuple[str, int], list[int]] = {}
    for name, node in graph.items():
        info = known[node["class_type"]]
        inputs, values, box = [], [], 0
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
                if options.get("image_upload"):
                    values.append("image")
                box += _TEXT_BOX if options.get("multiline") else _ROW
            elif isinstance(value, list):
                links.append([len(links) + 1, int(value[0]), value[1], int(name), slot, type_of(given)])
                entry["link"] = len(links)
                outputs.setdefault((value[0], value[1]), []).append(len(links))
            inputs.append(entry)
        kind = node["class_type"]
        sockets = max(sum("widget" not in entry for entry in inputs), len(info["output"]))
        height = _TITLE + _ROW * sockets + box + _PICTURE.get(kind, 0)
        column = column_of[name]
        top = heights.get(column, 60)
        heights[column] = top + height + _GAP + 30
        nodes.append(
            {
                "id": int(name), "type": kind, "pos": [_GAP + sum(widths[:column]) + _GAP * column, top],
                "size": [width_of(kind), height], "flags": {}, "order": len(nodes), "mode": 0,
                "inputs": inputs, "outputs": list(enumerate(zip(info["output_name"], info["output"], strict=True))),
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
        "id": last, "type": "MarkdownNote", "pos": [40, heights[0]], "size": [340, 330], "flags": {},
        "order": len(nodes), "mode": 0, "inputs": [], "outputs": [], "properties": {}, "widgets_values": [template.note],
    }  # fmt: skip
    return {
        "id": template.name, "revision": 0, "last_node_id": last, "last_link_id": len(links), "nodes": [*nodes, note],
        "links": links, "groups": [], "config": {}, "extra": {"ds": {"scale": 0.8, "offset": [0, 0]}}, "version": 0.4,
    }  # fmt: skip


def thumbnail(images: list[Image.Image], file: Path) -> None:
    """Write the last picture that the workflow saved, in a square."""
    picture = images[-1]
    size = _THUMBNAIL / max(picture.size)
    small = picture.resize((round(picture.width * size), round(picture.height * size)), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (_THUMBNAIL, _THUMBNAIL), (32, 32, 36))
    square.paste(small, ((_THUMBNAIL - small.width) // 2, (_THUMBNAIL - small.height) // 2))
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
            write_json(_FOLDER / f"{template.name}.json", drawn(template, known))
            write_json(_FOLDER / "api" / f"{template.name}.json", template.graph)
            if not arguments.no_pictures:
                thumbnail(server.run(template.graph), _FOLDER / f"{template.name}.jpg")
            print(template.name, flush=True)


if __name__ == "__main__":
    main()
