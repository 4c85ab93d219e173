"""The server of the Expert map's page: the widget's files, traces in memory, an image; and what was asked of it."""

from __future__ import annotations

import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from tests.browser.synthetic_trace import SyntheticTrace
from tools.host import ROOT

PAGE = Path(__file__).parent / "expert_map_page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript"}
TRACE = re.compile(r"/d2m/traces/([^/]+)(?:/steps/(\d+)/samples/(\d+))?")


def picture(size: int = 384) -> bytes:
    """Something with shapes in it, as PNG."""
    y, x = np.mgrid[:size, :size] / size
    red = 120 + 110 * np.sin(6 * x + 2 * y)
    green = 120 + 100 * np.cos(5 * y)
    blue = 200 * np.exp(-((x - 0.5) ** 2 + (y - 0.45) ** 2) * 12) + 40
    buffer = io.BytesIO()
    Image.fromarray(np.stack([red, green, blue], 2).clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class WidgetPage:
    def __init__(self) -> None:
        self.traces: dict[str, SyntheticTrace] = {}
        self.asked: list[str] = []  # "METHOD /route"
        self.image = picture()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(*outer.get(unquote(urlsplit(self.path).path)))

            def do_DELETE(self) -> None:
                self.answer(*outer.delete(unquote(urlsplit(self.path).path)))

            def answer(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, trace: SyntheticTrace) -> str:
        self.traces[trace.name] = trace
        return trace.name

    def get(self, path: str) -> tuple[int, str, bytes]:
        if not path.startswith("/api/"):
            return self.file(path)
        route = path.removeprefix("/api")
        self.asked.append(f"GET {route}")
        if route == "/i18n":
            texts = {
                folder.name: json.loads((folder / "main.json").read_text())
                for folder in (ROOT / "locales").iterdir()
                if (folder / "main.json").is_file()
            }
            return 200, "application/json", json.dumps(texts).encode()
        if route == "/view":
            return 200, "image/png", self.image
        match = TRACE.fullmatch(route)
        trace = self.traces.get(match[1]) if match else None
        if match is None or trace is None:
            return 404, "application/json", b'{"error": "no such trace"}'
        if match[2] is None:
            return 200, "application/json", json.dumps(trace.described()).encode()
        return 200, "application/octet-stream", trace.step_bytes(int(match[2]), int(match[3]))

    def delete(self, path: str) -> tuple[int, str, bytes]:
        route = path.removeprefix("/api")
        self.asked.append(f"DELETE {route}")
        match = TRACE.fullmatch(route)
        if match:
            self.traces.pop(match[1], None)
        return 204, "application/json", b""

    def file(self, path: str) -> tuple[int, str, bytes]:
        pack = "/extensions/pack/"
        place = ROOT / "web" / path.removeprefix(pack) if path.startswith(pack) else PAGE / path.lstrip("/")
        if path == "/scripts/app.js" or path == "/scripts/api.js":
            place = PAGE / path.lstrip("/")
        if place.is_dir():
            place /= "index.html"
        if not place.is_file():
            return 404, "text/plain", b"no such file"
        return 200, TYPES.get(place.suffix, "text/plain"), place.read_bytes()
