"""A running ComfyUI with this pack, and its API: start, queue a graph, wait for its images, stop."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from tools.host import ROOT, host_in_use, server_command

ApiGraph = dict[str, dict[str, Any]]  # a workflow as /prompt takes it: node id -> class_type and inputs


# OpenMP's threads wait without spinning: on a machine that has other work, spinning multiplies the time.
PATIENT_THREADS = {"GOMP_SPINCOUNT": "0"}


class ServerError(RuntimeError):
    """ComfyUI did not start, or a graph failed; the message includes what ComfyUI said."""


def free_port() -> int:
    """Return a port on which no other program listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ComfyServer:
    """A ComfyUI process on this machine, as a context manager: leaving it stops the server.

    base_directory  gets models/, input/, output/ and user/; ComfyUI's own folder stays untouched
    port            a free one, if not given
    arguments       command-line arguments of ComfyUI
    wait            enter only when the server answers; otherwise call wait_until_up() before the first request
    """

    def __init__(
        self,
        base_directory: Path,
        *,
        port: int | None = None,
        arguments: tuple[str, ...] = ("--cpu",),
        wait: bool = True,
    ) -> None:
        self.base, self.port = base_directory, port or free_port()
        self.log = base_directory / "comfyui.log"
        self._arguments, self._wait = arguments, wait
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ComfyServer:
        command = server_command(ROOT, host_in_use(), self.base)
        command += ["--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch", *self._arguments]
        environment = {**os.environ, **PATIENT_THREADS, "HF_HUB_OFFLINE": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            if self._wait:
                self.wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def wait_until_up(self, seconds: float = 300) -> None:
        """Return when the server answers. Raises ServerError if it ends or does not answer in time."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(
                    f"ComfyUI ended while starting (exit code {self.process.returncode}):\n{self.log_tail()}"
                )
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        raise ServerError(f"ComfyUI did not answer within {seconds:.0f} s:\n{self.log_tail()}")

    def stop(self) -> None:
        """End the process, by force if it does not end by itself within 20 seconds."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def log_tail(self, lines: int = 30) -> str:
        """Return the last lines that ComfyUI printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def get(self, path: str, **query: str) -> Any:
        """Fetch a path; JSON is decoded, other content comes as bytes."""
        url = f"{self.address}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        with urllib.request.urlopen(url, timeout=30) as answer:
            body = answer.read()
        return json.loads(body) if answer.headers.get_content_type() == "application/json" else body

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send JSON and return the decoded answer. Raises ServerError if the server refuses it."""
        request = urllib.request.Request(
            f"{self.address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            raise ServerError(f"{path} was refused: {error.read().decode(errors='replace')}") from None
        return json.loads(content) if content else None

    def queue(self, graph: ApiGraph) -> str:
        """Queue a graph and return its prompt id. Raises ServerError with ComfyUI's validation messages."""
        return str(self.post("/prompt", {"prompt": graph})["prompt_id"])

    def wait(self, prompt_id: str, seconds: float = 600) -> dict[str, Any]:
        """Wait for a prompt and return its history entry. Raises ServerError with the node's message if it failed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                for event, data in entry["status"]["messages"]:
                    if event == "execution_error":
                        raise ServerError(f"{data['node_type']} (node {data['node_id']}): {data['exception_message']}")
                return dict(entry)
            if self.process is not None and self.process.poll() is not None:
                raise ServerError(f"ComfyUI ended (exit code {self.process.returncode}):\n{self.log_tail()}")
            time.sleep(0.1)
        raise ServerError(f"Prompt {prompt_id} was not finished within {seconds:.0f} s:\n{self.log_tail()}")

    def images(self, entry: Mapping[str, Any]) -> list[Image.Image]:
        """Fetch every image that the prompt saved, in the order of its nodes."""
        pictures = []
        for output in entry["outputs"].values():
            for item in output.get("images", []):
                data = self.get("/view", filename=item["filename"], subfolder=item["subfolder"], type=item["type"])
                pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))
        return pictures

    def run(self, graph: ApiGraph) -> list[Image.Image]:
        """Queue a graph, wait for it, and fetch its images."""
        return self.images(self.wait(self.queue(graph)))
