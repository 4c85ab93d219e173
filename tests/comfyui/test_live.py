"""Live values and the log of a run, in this process: prompts, requests and clicks are made up, the rest is ComfyUI's."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from demo.in_process import Comfy
from tests.comfyui.conftest import Pair
from tests.comfyui.grouped import Grouped
from tests.toys import files
from tests.toys.compare import distance

SMALL = (1, 8, 8)


class Desk:
    """A queue of made-up prompts, with the store that the pack's routes would ask."""

    def __init__(self, live: Any, metadata_log: ModuleType) -> None:
        self.live, self.metadata_log = live, metadata_log
        self.items: list[tuple] = []
        self.numbers: Iterator[int] = itertools.count()

    @contextmanager
    def executing(self, prompt_id: str, graph: dict[str, Any], node: str = "sampler") -> Iterator[list]:
        """Within, `node` of this prompt runs. Gives the log that its images would get."""
        from comfy_execution.utils import CurrentNodeContext

        queued = self.metadata_log.add_empty_log({"prompt": graph})
        self.items.append((next(self.numbers), prompt_id, graph, queued["extra_data"], ["image"]))
        try:
            with CurrentNodeContext(prompt_id, node):
                for control in graph:
                    self.live.fingerprint(control)
                yield queued["extra_data"]["extra_pnginfo"]["d2m_log"]
        finally:
            self.items.pop()


@pytest.fixture
def desk(host: Comfy, monkeypatch: pytest.MonkeyPatch) -> Desk:
    live = host.module("nodes.controls.live_values")
    found = Desk(live.LiveStore(), host.module("nodes.controls.metadata_log"))
    for module in (live, host.module("nodes.controls.evaluation_settings"), host.module("nodes.controls.control_node")):
        monkeypatch.setattr(module, "LIVE", found.live)
    found.live.executing_items = lambda: found.items
    return found


def graph_of(**controls: str) -> dict[str, Any]:
    """A prompt in which each of these nodes stands behind the one before, then the sampler and its image."""
    graph, last = {}, "loader"
    for node, class_type in {"loader": "D2MLoadFluxMoE", **controls, "sampler": "KSampler"}.items():
        graph[node] = {"class_type": class_type, "inputs": {"model": [last, 0]} if graph else {}}
        last = node
    graph["image"] = {"class_type": "SaveImage", "inputs": {"images": ["sampler", 0]}}
    return graph


def of_log(log: list, setting: str, run: int = -1) -> list:
    return [entry[setting] for entry in log[run]["evaluations"]]


@pytest.fixture
def at_step() -> Callable[..., Callable]:
    """A sampler's callback that does something after some of its steps."""

    def make(actions: dict[int, Callable[[], Any]]) -> Callable:
        return lambda step, denoised, x, steps: actions.get(step, lambda: None)()

    return make


def test_a_live_value_holds_from_the_next_evaluation_on(host: Comfy, pair: Pair, desk: Desk, at_step: Callable) -> None:
    model = host.control("D2MTopK", pair.moe, node="12:5", top_k=2, gate="sum")
    move = at_step({1: lambda: desk.live.apply(["12:5"], {"top_k": 7}, None)})
    with desk.executing("a", graph_of(**{"12:5": "D2MTopK"})) as log:
        found = host.sample(model, SMALL, steps=5, callback=move)
        assert of_log(log, "top_k") == [2, 2, 7, 7, 7]
    assert log[0]["node"] == "sampler"
    assert log[0]["controls"] == ["12:5"]
    sigmas = of_log(log, "sigma")
    assert sigmas == sorted(sigmas, reverse=True)
    assert distance(found, host.sample(model, SMALL, steps=5)) >= 1e-2


def test_both_evaluations_of_a_step_are_latched_and_logged(
    host: Comfy, pair: Pair, desk: Desk, at_step: Callable
) -> None:
    model = host.control("D2MTopK", pair.moe, node="k", top_k=2, gate="sum")
    move = at_step({0: lambda: desk.live.apply(["k"], {"top_k": 5}, None)})
    with desk.executing("a", graph_of(k="D2MTopK")) as log:
        host.sample(model, SMALL, steps=3, sampler="heun", callback=move)  # which calls back between the two
    assert of_log(log, "evaluation") == [0, 1, 2, 3, 4]
    assert of_log(log, "top_k") == [2, 5, 5, 5, 5]


def test_prompt_and_negative_prompt_share_a_live_value(host: Comfy, pair: Pair, desk: Desk) -> None:
    """A value that arrives between them waits for the next evaluation."""
    import comfy.sample
    from comfy.patcher_extension import WrappersMP

    model, seen = host.control("D2MTopK", pair.moe, node="k", top_k=2, gate="sum"), []

    def look(executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = next(value for value in (*args, *kwargs.values()) if isinstance(value, dict) and "d2m" in value)
        seen.append(options["d2m"]["top_k"])
        desk.live.apply(["k"], {"top_k": 2 + len(seen)}, None)
        return executor(x, t, *args, **kwargs)

    model.add_wrapper(WrappersMP.APPLY_MODEL, look)
    (_, rest), *_ = positive = host.conditioning(pair.moe, 1)
    negative = [[torch.randn(1, 9, files.DIMS.context_size), rest]]  # fits in no batch with the other
    noise = torch.randn(1, 16, 8, 8)
    with desk.executing("a", graph_of(k="D2MTopK")) as log:
        comfy.sample.sample(
            model, noise, 2, 4.0, "euler", "simple", positive, negative, torch.zeros_like(noise), seed=0
        )
    assert seen == [2, 2, 4, 4]
    assert of_log(log, "top_k") == [2, 4]


def test_every_kind_of_control_is_live_and_every_setting_is_logged(
    host: Comfy, grouped: Grouped, desk: Desk, at_step: Callable
) -> None:
    model = host.control("D2MActiveBlocks", grouped.moe, node="blocks", active_blocks=1)
    model = host.control("D2MExpertMask", model, node="mask", mask="")
    model = host.control("D2MSchedule", model, node="pieces", setting="top_k", unit="percent", pieces="0 - 10: 5")
    kinds = {"blocks": "D2MActiveBlocks", "mask": "D2MExpertMask", "pieces": "D2MSchedule"}
    move = at_step({
        0: lambda: desk.live.apply(["blocks"], {"per_group": "0,5"}, None),
        1: lambda: desk.live.apply(["mask"], {"mask": "single_blocks.*: 3=0"}, None),
        2: lambda: desk.live.apply(["pieces"], {"pieces": "0 - 100: 4"}, None),
    })  # fmt: skip
    with desk.executing("a", graph_of(**kinds)) as log:
        host.sample(model, SMALL, steps=4, callback=move)
    assert of_log(log, "active_blocks") == [[1, 1], [0, 5], [0, 5], [0, 5]]
    assert of_log(log, "top_k") == [5, 2, 2, 4]
    assert [entry.get("mask") for entry in log[0]["evaluations"]] == [None, None, 0, 0]
    assert log[0]["masks"] == [{f"single_blocks.{i}": {"3": 0.0} for i in range(6)}]
    assert json.loads(json.dumps(log)) == log


def test_a_live_value_belongs_to_the_prompt_that_executes(host: Comfy, pair: Pair, desk: Desk) -> None:
    model = host.control("D2MTopK", pair.moe, node="k", top_k=2, gate="sum")
    assert desk.live.apply(["k"], {"top_k": 9}, None) == {"applied": False, "prompt_id": None, "revision": 0}
    with desk.executing("a", graph_of(k="D2MTopK")) as log:
        assert desk.live.apply(["k"], {"top_k": 9}, "a") == {"applied": True, "prompt_id": "a", "revision": 1}
        assert desk.live.apply(["k"], {"top_k": 3}, "b") == {"applied": False, "prompt_id": "a", "revision": 1}
        assert not desk.live.apply(["other"], {"top_k": 3}, None)["applied"]
        host.sample(model, SMALL, steps=1)
        host.sample(model, SMALL, steps=1)  # another sampler of it
    assert [run["evaluations"][0]["top_k"] for run in log] == [9, 9]
    with desk.executing("b", graph_of(k="D2MTopK")) as log:  # pending until now
        host.sample(model, SMALL, steps=1)
    assert of_log(log, "top_k") == [2]


@pytest.mark.parametrize("numbers", ["as queued", "the clients own"])
def test_a_prompt_under_the_id_of_one_before_has_none_of_its_live_values(
    host: Comfy, pair: Pair, desk: Desk, numbers: str
) -> None:
    """Clients choose ids, and numbers if they like."""
    model = host.control("D2MTopK", pair.moe, node="k", top_k=2, gate="sum")
    if numbers != "as queued":
        desk.numbers = itertools.repeat(0)
    with desk.executing("mine", graph_of(k="D2MTopK")) as first:
        desk.live.apply(["k"], {"top_k": 9}, "mine")
        host.sample(model, SMALL, steps=1)
    with desk.executing("mine", graph_of(k="D2MTopK")) as second:
        host.sample(model, SMALL, steps=1)
    assert (of_log(first, "top_k"), of_log(second, "top_k")) == ([9], [2])


def test_what_a_file_does_not_have_leaves_the_last_value_that_it_has(
    host: Comfy, pair: Pair, desk: Desk, at_step: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    model = host.control("D2MTopK", pair.moe, node="k", top_k=2, gate="sum")
    move = at_step({step: lambda top_k=top_k: desk.live.apply(["k"], {"top_k": top_k}, None)
                    for step, top_k in enumerate([20, 4, 20, 20, 12])})  # fmt: skip
    with desk.executing("a", graph_of(k="D2MTopK")) as log, caplog.at_level(logging.WARNING):
        host.sample(model, SMALL, steps=6, callback=move)
        host.sample(model, SMALL, steps=1)
    assert of_log(log, "top_k", 0) == [2, 2, 4, 4, 4, 12]
    said = [record.message for record in caplog.records if "FLUX-MoE" in record.message]
    assert len(said) == 1
    assert "node k keeps its last value. Top-K is 20, but this FLUX-MoE has 12 experts" in said[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": -1}, r"top_k is -1; expected a whole number from 0 to 64"),
        ({"top_k": 2.5}, r"top_k is 2\.5"),
        ({"top_k": True}, r"top_k is True"),
        ({"gate": "max"}, r"gate is 'max'; expected one of as in the file, sum, normalised"),
        ({"capacity": float("nan")}, r"capacity is nan; expected a number from 0 to 8"),
        ({"pieces": "0 - 9"}, r"values has 'pieces'; expected one of capacity, gate, top_k"),
    ],
)
def test_a_value_that_no_widget_takes_is_refused(desk: Desk, values: dict[str, Any], message: str) -> None:
    with desk.executing("a", graph_of(k="D2MTopK")), pytest.raises(ValueError, match=message):
        desk.live.apply(["k"], values, None)


def test_half_a_rule_is_refused(desk: Desk) -> None:
    with desk.executing("a", graph_of(m="D2MExpertMask", s="D2MSchedule", b="D2MActiveBlocks")):
        for node, values in (("m", {"mask": "*: 3="}), ("s", {"pieces": "0 - "}), ("b", {"per_group": "1,"})):
            with pytest.raises(ValueError, match="is wrong: "):
                desk.live.apply([node], values, None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "The body is not JSON"),
        ("[" * 100_000, "The body is not JSON"),
        ("[]", "nodes is missing or wrong"),
        ('{"nodes": [5], "values": {"top_k": 1}}', "nodes is missing or wrong"),
        ('{"nodes": ["5"], "values": [1]}', "values is missing or wrong"),
        ('{"nodes": ["5"], "values": {"top_k": 1}, "prompt_id": 3}', "prompt_id is not a text"),
        ('{"nodes": ["\\ud800"], "values": {"top_k": 1}}', "half of a surrogate pair"),
        ('{"nodes": ["5"], "values": {"capacity": NaN}}', "has NaN"),
    ],
)
def test_a_request_that_is_none_is_refused(host: Comfy, body: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        host.module("nodes.controls.live_values").parse_live_request(body.encode())


@pytest.mark.parametrize("announced", [None, 10, 10**9])
def test_a_body_is_not_read_beyond_its_limit(host: Comfy, announced: int | None) -> None:
    server, pieces_read = host.module("nodes.prompt_server"), 0

    async def pieces(size: int) -> AsyncIterator[bytes]:
        nonlocal pieces_read
        for _ in range(1000):
            pieces_read += 1
            yield bytes(100)

    request = SimpleNamespace(content_length=announced, content=SimpleNamespace(iter_chunked=pieces))
    with pytest.raises(server.RequestError, match=r"The body has .* bytes; expected 250 at most"):
        asyncio.run(server.read_body(request, 250))
    assert pieces_read == (3 if announced != 10**9 else 0)


def test_what_is_no_image_is_said(host: Comfy, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("folder_paths.get_input_directory", lambda: str(tmp_path))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    for image, message in (
        ("broken.png", "cannot be read as an image .it is none, or damaged"),
        (5, "image is 5; expected the name"),
        ("a" * 300, "no image"),
        ("\0", "no image"),
    ):
        with pytest.raises(ValueError, match=message):
            host.control("D2MReplay", pair.moe, image=image)


def test_a_live_value_changes_the_fingerprint_of_its_node_for_the_prompts_to_come(desk: Desk) -> None:
    graph = graph_of(k="D2MTopK", m="D2MExpertMask")
    with desk.executing("a", graph):
        before = [desk.live.fingerprint(node) for node in ("k", "m")]
        desk.live.apply(["k"], {"top_k": 5}, None)
        assert [desk.live.fingerprint(node) for node in ("k", "m")] == before
    with desk.executing("b", graph):
        after = [desk.live.fingerprint(node) for node in ("k", "m")]
    assert after[0] != before[0]
    assert after[1] == before[1]
    with desk.executing("c", graph):
        assert [desk.live.fingerprint(node) for node in ("k", "m")] == after


def test_equal_controls_do_not_share_a_result_in_comfyuis_cache(desk: Desk) -> None:
    """The result knows the node whose live values it follows."""
    with desk.executing("a", graph_of(k="D2MTopK", **{"12:k": "D2MTopK"})):
        assert desk.live.fingerprint("k") != desk.live.fingerprint("12:k")


def test_a_samplers_log_is_in_the_prompts_that_take_its_result_from_the_cache(
    host: Comfy, pair: Pair, desk: Desk
) -> None:
    def prompt(top_k: int, seed: int = 0) -> dict[str, Any]:
        graph = graph_of(k="D2MTopK")
        graph["k"]["inputs"]["top_k"], graph["sampler"]["inputs"]["seed"] = top_k, seed
        return graph

    for top_k in (2, 5):
        with desk.executing(f"first {top_k}", prompt(top_k)) as log:
            host.sample(host.control("D2MTopK", pair.moe, node="k", top_k=top_k, gate="sum"), SMALL, steps=1)
            assert of_log(log, "top_k") == [top_k]
    with desk.executing("image alone", prompt(2), node="image") as log:
        assert [of_log(log, "top_k", run) for run in range(len(log))] == [[2]]
    with desk.executing("another seed", prompt(2, seed=1), node="image") as log:
        assert log == []
    with desk.executing("once more", prompt(2)) as log:  # the sampler runs again: its entry is not there twice
        host.sample(host.control("D2MTopK", pair.moe, node="k", top_k=2, gate="sum"), SMALL, steps=2)
        assert [of_log(log, "top_k", run) for run in range(len(log))] == [[2, 2]]


def test_a_run_that_failed_is_remembered_for_no_image(host: Comfy, pair: Pair, desk: Desk) -> None:
    def stop(*args: Any) -> None:
        raise InterruptedError

    model = host.control("D2MTopK", pair.moe, node="k", top_k=2, gate="sum")
    with desk.executing("a", graph_of(k="D2MTopK")), pytest.raises(InterruptedError):
        host.sample(model, SMALL, callback=stop)
    with desk.executing("b", graph_of(k="D2MTopK"), node="image") as log:
        assert log == []
    assert [run["finished"] for run in desk.live.last_runs()] == [False]


# Replay


def replayed(host: Comfy, model: Any, log: Any, run: int = 0) -> Any:
    return host.control("D2MReplay", model, log=json.dumps(log), run=run)


def test_a_replay_is_the_live_run_bit_for_bit(host: Comfy, grouped: Grouped, desk: Desk, at_step: Callable) -> None:
    """The sampler evaluates twice a step, with other settings than the run began with."""
    model = host.control("D2MTopK", grouped.moe, node="k", top_k=2, gate="normalised")
    model = host.control("D2MActiveBlocks", model, node="b", active_blocks=1)
    model = host.control("D2MExpertMask", model, node="m", mask="*: 0=0.3")
    move = at_step({
        0: lambda: desk.live.apply(["k"], {"top_k": 6}, None),
        1: lambda: desk.live.apply(["m"], {"mask": "*: 1=0\n*img_mlp: 0=1.7"}, None),
        2: lambda: desk.live.apply(["b"], {"per_group": "2,4"}, None),
    })  # fmt: skip
    with desk.executing("a", graph_of(k="D2MTopK", b="D2MActiveBlocks", m="D2MExpertMask")) as log:
        expected = host.sample(model, SMALL, steps=4, sampler="heun", callback=move)
    other = host.control("D2MActiveBlocks", host.top_k(grouped.moe, 9), active_blocks=0)
    found = host.sample(replayed(host, other, log), SMALL, steps=4, sampler="heun")
    assert torch.equal(found, expected)
    assert distance(expected, host.sample(model, SMALL, steps=4, sampler="heun")) >= 1e-2


def test_beyond_the_logs_end_its_last_settings_hold_and_that_is_said_once(
    host: Comfy, pair: Pair, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    model = replayed(host, pair.moe, [{"evaluation": 0, "top_k": 5}, {"evaluation": 1, "top_k": 1}])
    with desk.executing("a", graph_of(r="D2MReplay")) as log, caplog.at_level(logging.WARNING):
        host.sample(model, SMALL, steps=2)
        assert not caplog.records
        host.sample(model, SMALL, steps=4)
    assert of_log(log, "top_k") == [5, 1, 1, 1]
    (record,) = caplog.records
    assert "the replayed log has 2 evaluations and this run made 4" in record.message


def test_of_several_runs_one_is_chosen(host: Comfy, pair: Pair, desk: Desk) -> None:
    runs = [{"node": str(node), "evaluations": [{"evaluation": 0, "top_k": node}]} for node in (3, 4)]
    with pytest.raises(ValueError, match=r"several runs.*: 1 \(node 3, 1 evaluations\), 2 \(node 4, 1 evaluations\)"):
        replayed(host, pair.moe, runs)
    with pytest.raises(ValueError, match=r"no run 3"):
        replayed(host, pair.moe, runs, run=3)
    with desk.executing("a", graph_of(r="D2MReplay")) as log:
        host.sample(replayed(host, pair.moe, {"runs": runs}, run=2), SMALL, steps=1)
    assert of_log(log, "top_k") == [4]


def entry(**settings: Any) -> list:
    return [{"evaluation": 0, **settings}]


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("{", "The log is not JSON"),
        ("[" * 100_000, "The log is not JSON"),
        ("3", "The log is 3; expected a list of runs"),
        ("[]", "The log has no evaluations"),
        ("", "no image and no log"),
        ('[{"node": "3"}]', "Run 1 of the log has no evaluations"),
        ('[{"node": "\\ud800"}]', "half of a surrogate pair"),
        ('[{"evaluations": [{}], "evaluations": []}]', "has 'evaluations' twice"),
        (json.dumps([{"node": "\x1b[2J", "evaluations": entry()}] * 50), r"\(node \\x1b\[2J, 1 evaluations\).*, and 30 more"),
        (json.dumps([{"evaluations": entry(mask=0), "masks": [{"single_blocks.0": {"0": 10**400}}]}]), "of 401 digits"),
        (json.dumps([{"evaluations": entry(mask=0), "masks": [{"single_blocks.0": {"9" * 5000: 1}}]}]), "has the mask"),
        (json.dumps(entry(top_k="many")), "Evaluation 0 of run 1 of the log has top_k 'many'"),
        (json.dumps(entry(gate="max")), "gate 'max'"),
        (json.dumps(entry(mask=0)), "has mask 0 of 0"),
        (json.dumps(entry(top_k=13)), "has 12 experts per FFN"),
        (json.dumps(entry(capacity=2)), "no capacity routers"),
        (json.dumps(entry(active_blocks=[1, 2])), "no block groups"),
        (json.dumps([{"evaluations": entry(mask=0), "masks": [{"single_blocks.7": {"1": 0}}]}]), "expert 1 of single_blocks.7"),
        (json.dumps([{"evaluations": entry(mask=0), "masks": [{"single_blocks.0": {"1": -1}}]}]), "has the mask"),
    ],
)  # fmt: skip
def test_a_log_that_does_not_fit_is_said(host: Comfy, pair: Pair, log: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        host.control("D2MReplay", pair.moe, log=log)
