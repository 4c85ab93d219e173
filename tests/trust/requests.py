"""Random and hostile requests at every route of the pack in a running ComfyUI, and prompts with hostile widget values.

No answer is a server error, no error of a prompt is a raw one of the pack's code, and the server's memory stays flat.
"""

from __future__ import annotations

import http.client
import io
import json
import re
import time
import urllib.parse
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from demo.server import ComfyServer, ServerError
from tests.comfyui.serving import node, write_base
from tests.trust.limits import Fault, growth, memory, ours
from tests.trust.mutations import HOSTILE, NAMES, mutated_json

_PROMPTS_EVERY = 20  # requests
_PENDING = 4  # prompts
_BYTES = 16 << 20  # by which memory may grow, besides its share: models of several sizes come and go
_SECONDS = 60.0  # for one answer
_TEXTS = (
    *("", " ", "1", "3", "-1", "0", "1e9", "nan", "inf", "٣", "½", "1,2", "1,0,2,9", "9" * 400, "x" * 3000, "\x00", "\x1b[2J"),
    *("\ud800", "../../etc/passwd", "0 - 50%: 2", "0 -" + " " * 3000, "0%-100%: 1\n" * 2000, "*: 3=0", "double_blocks.*: *=0"),
    *("[a-" * 500, "(" * 3000, "single_blocks.0: 99999999=1", "double_blocks.*: 0=1e400", "%s%n{0}", "{}", "null"),
)  # fmt: skip
# Other paths, unknown ones below /d2m/ among them, are for ComfyUI's static files, which fail for names that are too long.
_OURS = re.compile(r"/d2m/(cost|live|log)(\?.*)?|/d2m/traces/(?!.*%7[BD])[^/]+(/steps/[^/]+/samples/[^/]+)?", re.DOTALL)
_COST = ("top_k", "active_blocks", "capacity", "budget", "width", "height", "text_tokens", "node", "workflow", "x")
_CONTROLS = ("D2MTopK", "D2MBudget", "D2MActiveBlocks", "D2MSchedule", "D2MExpertMask", "D2MReplay")

# An output node for anything.
DISCARD = """
class Discard:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "discard", "testing", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"anything": ("*",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def discard(self, anything):
        return {}

NODE_CLASS_MAPPINGS = {"Discard": Discard}
"""
_LOG = {
    "node": "control",
    "controls": [],
    "evaluations": [{"sigma": 1.0, "top_k": 2, "gate": ["sum", 2.0], "active_blocks": None}] * 2,
    "masks": [],
}


def measure(count: int, seed: int, base: Path) -> dict[str, Any]:
    """Send `count` requests. Return counts. Raises Fault."""
    write_base(base)
    (base / "custom_nodes" / "discard.py").write_text(DISCARD)
    with ComfyServer(base) as server:
        return Client(server, seed).send(count)


class Client:
    """Sends what a seed draws, and judges the answers."""

    def __init__(self, server: ComfyServer, seed: int) -> None:
        self._server, self._seed = server, seed
        self._random = Random(seed)
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=_SECONDS)
        self._nodes = {name: about for name, about in server.get("/object_info").items() if name.startswith("D2M")}
        self._models = sorted(path.name for path in (server.base / "models" / "diffusion_models").iterdir())
        self._traces: list[str] = []
        self._read = 0  # characters of the log that were judged
        self.outcomes: Counter[str] = Counter()

    def send(self, count: int) -> dict[str, Any]:
        process = self._server.process
        assert process is not None
        prompts, resident = 0, []
        for number in range(count):
            self._random = Random(f"{self._seed}-{number}")
            try:
                if number % _PROMPTS_EVERY == 0:
                    self._wait_for(_PENDING)
                    self._queue()
                    prompts += 1
                else:
                    self._random.choice((self._cost, self._cost, self._live, self._live, self._trace, self._other))()
                if number % 200 == 199:
                    self._check_log()
                    resident.append(memory("VmRSS", process.pid))
                if number % 1000 == 999:
                    self._ask("POST", "/history", json.dumps({"clear": True}).encode())
                    print(
                        f"requests: {number + 1} of {count}, {dict(self.outcomes)}, {resident[-1]:,} bytes", flush=True
                    )
            except Fault as fault:
                raise Fault(f"number {number}: {fault}") from None
        self._wait_for(0)
        self._check_log()
        resident.append(memory("VmRSS", process.pid))
        self._still_paints()
        return {
            "requests": count,
            "prompts": prompts,
            "answers": dict(sorted(self.outcomes.items())),
            **growth(resident, _BYTES),
        }

    def _ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        started = time.monotonic()
        try:
            self._connection.request(method, path, body, headers)
            answer = self._connection.getresponse()
            content = answer.read()
        except (http.client.HTTPException, ConnectionError):
            self._connection.close()  # it closes the connection of a request that it refuses early
            if self._server.process is not None and self._server.process.poll() is not None:
                raise Fault(f"{method} {path[:300]}: the server ended: {self._server.log_tail()}") from None
            self.outcomes["closed"] += 1
            return 0, b""
        except TimeoutError:
            raise Fault(f"{method} {path[:300]} {(body or b'')[:300]!r}: no answer in {_SECONDS:g} s") from None
        ours = _OURS.fullmatch(path) is not None
        if answer.status >= 500 and ours:
            raise Fault(f"{method} {path[:300]} {(body or b'')[:300]!r}: {answer.status} {content[:300]!r}")
        if ours and time.monotonic() - started > _SECONDS / 4:
            raise Fault(f"{method} {path[:300]} {(body or b'')[:300]!r}: {time.monotonic() - started:.0f} s")
        self.outcomes[f"{'d2m' if ours else 'ComfyUI'} {answer.status}"] += 1
        return answer.status, content

    def _text(self) -> str:
        random = self._random
        return random.choice(
            (*_TEXTS, *NAMES, str(random.randint(0, 20)), "".join(map(chr, random.choices(range(1, 900), k=9))))
        )

    def _json(self, value: Any) -> bytes:
        """Return the JSON of `value`, mutated most of the time."""
        for _ in range(self._random.choice((0, 1, 1, 2))):
            try:
                value = json.loads(data := mutated_json(value, self._random))
            except (ValueError, RecursionError):
                return data
        return json.dumps(value).encode()

    # Routes

    def _cost(self) -> None:
        random = self._random
        query = {name: self._text() for name in random.sample(_COST, random.randint(0, 4)) if name != "node"}
        if random.random() < 0.8:
            query["model_name"] = random.choice(self._models) if random.random() < 0.9 else self._text()
        if "model_name" not in query or random.random() < 0.1:
            query["node"] = random.choice(("loader", "control", self._text()))
        self._ask("GET", f"/d2m/cost?{urllib.parse.urlencode(query, errors='surrogatepass')}")

    def _live(self) -> None:
        random = self._random
        values: dict[str, Any] = {
            "top_k": random.randint(0, 12), "gate": "sum", "capacity": random.random() * 9, "active_blocks": 1,
            "per_group": "1,0", "pieces": random.choice(_TEXTS), "mask": random.choice(_TEXTS), "budget": random.random(),
        }  # fmt: skip
        names = random.sample(sorted(values), random.choice((1, 1, 1, 3)))
        body = self._json({"nodes": ["control"], "values": {name: values[name] for name in names}, "prompt_id": None})
        if random.random() < 0.05:
            body = random.choice((b"", random.randbytes(500), b"[" * 150_000, b" " * 300_000, body[: len(body) // 2]))
        self._ask("POST", "/d2m/live", body, **{"Content-Type": random.choice(("application/json", "text/html", "x"))})

    def _trace(self) -> None:
        random = self._random
        known = [*self._traces[-5:], "A" * 22]
        trace = random.choice(known) if random.random() < 0.7 else self._text()
        path = f"/d2m/traces/{_quoted(trace)}"
        if random.random() < 0.7:
            step, sample = random.choice(("0", "1", self._text())), random.choice(("0", self._text()))
            path += f"/steps/{_quoted(step)}/samples/{_quoted(sample)}"
        tags = random.choice(
            (
                {},
                {"If-None-Match": f'"{trace}"' if trace.isascii() and trace.isprintable() else "*"},
                {"Range": "bytes=0-3"},
            )
        )
        self._ask(random.choice(("GET", "GET", "GET", "GET", "DELETE", "HEAD")), path, **tags)

    def _other(self) -> None:
        random = self._random
        path = random.choice(
            ("/d2m/log", "/d2m/log", "/d2m/cost", "/d2m/live", f"/d2m/{_quoted(self._text())}", "/d2m/traces/")
        )
        self._ask(
            random.choice(("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")),
            path,
            self._json({"x": [1, {"y": None}]}),
        )

    # Prompts

    def _queue(self) -> None:
        graph = self._graph()
        if self._random.random() < 0.15:
            changed = graph[self._random.choice(list(graph))]
            inputs = self._loaded(mutated_json(changed["inputs"], self._random))
            changed["inputs"] = inputs if isinstance(inputs, dict) else {}  # ComfyUI's worker ends without
        body = {"prompt": graph, "client_id": self._random.choice(("one", "two"))}  # one that is a list ends ComfyUI
        if self._random.random() < 0.3:
            body["extra_data"] = {"extra_pnginfo": {"workflow": {"id": self._random.choice((5, [], "w", *NAMES))}}}
        text = json.dumps(body).encode()
        status, _ = self._ask("POST", "/prompt", text, **{"Content-Type": "application/json"})
        if status == 200 and self._random.random() < 0.1:
            self._ask("POST", "/interrupt", b"{}")

    def _graph(self) -> dict[str, Any]:
        random = self._random
        model = random.choice(
            ("emoji-flux-moe", "grouped", "capacity", "XS", "teacher", random.choice(self._models))
        ).removesuffix(".safetensors")
        graph = {
            "loader": node(random.choice(("D2MLoadFluxMoE", "UNETLoader")), model_name=f"{model}.safetensors",
                           unet_name=f"{model}.safetensors", weight_dtype="default"),
            "conditioning": node("TinyConditioning", seed=1),
            "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        }  # fmt: skip
        last = "loader"
        for name in ("control", "second", "third")[: random.choice((1, 1, 2, 3))]:
            kind = random.choice(_CONTROLS)
            graph[name] = node(kind, **{**self._widgets(kind), "model": [last, 0]})
            last = name
        traced = random.random() < 0.3
        if traced:
            graph["trace"] = node("D2MTraceRouting", **{**self._widgets("D2MTraceRouting"), "model": [last, 0]})
            last = "trace"
        graph["sampler"] = node(
            "KSampler", model=[last, 0], seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
            positive=["conditioning", 0], negative=["conditioning", 0], latent_image=["latent", 0],
        )  # fmt: skip
        graph["end"] = node("Discard", anything=["sampler", 0])
        if traced:
            graph["map"] = node(
                "D2MExpertMap", **{**self._widgets("D2MExpertMap"), "trace": ["trace", 1], "latent": ["sampler", 0]}
            )
        if random.random() < 0.2:
            graph["emoji"] = node("D2MEmojiPrompt", **self._widgets("D2MEmojiPrompt"))
            graph["emoji end"] = node("Discard", anything=["emoji", 0])
        if random.random() < 0.1:
            graph["save"] = node("D2MSaveFluxMoE", **{**self._widgets("D2MSaveFluxMoE"), "model": [last, 0]})
        return graph

    def _widgets(self, kind: str) -> dict[str, Any]:
        """Return values for a node's widgets: allowed ones, and now and then others."""
        random, values = self._random, {}
        inputs = self._nodes[kind]["input"]
        for name, (type_, *options) in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
            about = options[0] if options else {}
            choices = type_ if isinstance(type_, list) else about.get("options")
            if random.random() < 0.08:
                values[name] = self._any()
            elif name == "image" and kind == "D2MReplay":
                values[name] = self._image()
            elif name == "log":
                values[name] = self._json(_LOG).decode(errors="replace") if random.random() < 0.5 else ""
            elif choices:
                values[name] = random.choice(choices)
            elif type_ == "INT":
                values[name] = random.choice((about.get("min", 0), about.get("max", 9), random.randint(0, 12)))
            elif type_ == "FLOAT":
                values[name] = random.choice((about.get("min", 0.0), about.get("max", 1.0), random.random()))
            elif type_ == "BOOLEAN":
                values[name] = random.random() < 0.5
            elif type_ == "STRING":
                values[name] = random.choice((about.get("default", ""), self._text()))
        return values

    def _any(self) -> Any:
        return self._loaded(self._random.choice(HOSTILE))

    @staticmethod
    def _loaded(text: str | bytes) -> Any:
        """Return what JSON stands for; the text itself if Python cannot read it."""
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return str(text)[:5000]

    def _image(self) -> str:
        """Write a picture with a log into ComfyUI's input folder, and return what names it, or something else."""
        random, path = self._random, self._server.base / "input" / f"hostile-{self._random.randrange(8)}.png"
        if random.random() < 0.15:
            return self._text()
        path.parent.mkdir(exist_ok=True)
        information, buffer = PngInfo(), io.BytesIO()
        log = self._json([_LOG]).decode(errors="replace")
        information.add_text(
            "d2m_log",
            random.choice((log, log, log, self._text())).encode(errors="replace").decode(),
            zip=random.random() < 0.5,
        )
        Image.new("RGB", (8, 8)).save(buffer, random.choice(("PNG", "PNG", "PNG", "WEBP")), pnginfo=information)
        data = bytearray(buffer.getvalue())
        if random.random() < 0.4:
            for _ in range(random.randint(1, 6)):
                data[random.randrange(len(data))] = random.randrange(256)
        path.write_bytes(data[: random.choice((len(data), len(data), random.randrange(len(data))))])
        return path.name

    # Judgement

    def _wait_for(self, pending: int) -> None:
        """Wait until at most `pending` prompts are queued. Raises Fault if the queue stands still."""
        deadline = time.monotonic() + 2 * _SECONDS
        while time.monotonic() < deadline:
            queue = self._server.get("/queue")
            if len(queue["queue_running"]) + len(queue["queue_pending"]) <= pending:
                return
            time.sleep(0.02)
        raise Fault(f"the queue stands still:\n{self._server.log_tail()}")

    def _check_log(self) -> None:
        """Raise Fault for a traceback in the server's log whose error is a raw one of the pack's code."""
        text = self._server.log.read_text(errors="replace")
        if (error := raw_error_of_ours(text[self._read :])) is not None:
            raise Fault(f"a raw error in the server's log:\n{error}")
        outputs = (output for entry in self._server.get("/history").values() for output in entry["outputs"].values())
        self._traces += [
            trace for output in outputs for shown in output.get("d2m_map", ()) for trace in shown["traces"]
        ]
        del self._traces[:-20]
        self._read = max(0, text.rfind("\n", 0, len(text) - 20_000))

    def _still_paints(self) -> None:
        graph = {"loader": node("D2MLoadFluxMoE", model_name="grouped.safetensors", weight_dtype="default")}
        graph["end"] = node("Discard", anything=["loader", 0])
        try:
            self._server.wait(self._server.queue(graph), seconds=_SECONDS)
        except ServerError as error:
            raise Fault(f"the server no longer works: {error}") from None


def raw_error_of_ours(log: str) -> str | None:
    """Return the first traceback that ends in the pack's code, or in a library called by it, without a `raise` there."""
    for block in re.findall(r"Traceback \(most recent call last\):\n(?:[ +|].*\n|\n(?= ))+.*", log):
        frames = re.findall(r'File "([^"]+)", line \d+, in .*\n(.*)', block)
        place = ours([file for file, _ in frames])
        if place is not None and not frames[place][1].strip().startswith("raise"):
            return str(block)
    return None


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="", errors="surrogatepass")
