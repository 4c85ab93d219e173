"""The Triton kernels, without a GPU: their results in Triton's interpreter, and their cubins for every supported card."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is optional; torch brings it on Linux")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from d2m_model.kernels import programs
from d2m_model.kernels.choice import refusal
from d2m_model.kernels.fused import GRADIENT_BLOCKS, TileSizes, product_blocks

# Triton's code for 8.0, 8.6 and 8.9 is the same. KiB that a block of threads may have, the least of a generation.
SHARED_MEMORY = {80: 99, 90: 227, 100: 227, 120: 99}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.interpreted_kernels"],
        cwd=Path(__file__).parents[2],
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


CASES = (
    "two experts",
    "all experts, several tiles",
    "none to three experts",
    "one crowded expert",
    "no experts",
    "half precision",
)
SEAM = ("through experts.py", "through experts.py, in chunks")
ROUTES = ("two, sum", "all, normalised", "three with ties", "none", "no tokens")


@pytest.mark.slow  # so is the interpreter
@pytest.mark.parametrize("case", CASES)
def test_experts_and_their_gradients_are_those_of_the_float64_reference(
    errors: dict[str, dict[str, float]], case: str
) -> None:
    bound = 1e-3 if case == "half precision" else 1e-6
    assert len(errors[case]) == 7
    assert {name: error for name, error in errors[case].items() if not error <= bound} == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", SEAM)
def test_the_seam_gives_the_same_with_kernels_as_without(errors: dict[str, dict[str, float]], case: str) -> None:
    assert len(errors[case]) == 5
    assert {name: error for name, error in errors[case].items() if not error <= 1e-6} == {}


@pytest.mark.parametrize("number_format", ["e4m3", "e5m2"])
def test_weights_in_float8_are_multiplied_as_they_are_stored(
    errors: dict[str, dict[str, float]], number_format: str
) -> None:
    assert set(errors[number_format]) == {"up", "down", "merely stored"}
    assert errors[number_format]["merely stored"] == 0  # bit for bit what converted weights give
    assert {name: error for name, error in errors[number_format].items() if not error <= 1e-6} == {}


def test_the_choice_says_why_a_card_keeps_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal((8, 0), torch.bfloat16) is None
    assert refusal((12, 0), torch.float16) is None
    assert "7.5 is below 8.0" in str(refusal((7, 5), torch.float16))
    assert "float32 is neither" in str(refusal((9, 0), torch.float32))
    monkeypatch.setenv("D2M_KERNELS", "off")
    assert refusal((9, 0), torch.bfloat16) == "D2M_KERNELS is off"


@pytest.mark.slow
@pytest.mark.parametrize("case", ROUTES)
def test_routing_and_sort_are_those_of_the_torch_router(errors: dict[str, dict[str, float]], case: str) -> None:
    found = errors[f"route: {case}"]
    assert len(found) == 7
    assert {name: error for name, error in found.items() if not error <= 1e-6} == {}


def test_a_token_that_is_not_a_number_is_routed_somewhere(errors: dict[str, dict[str, float]]) -> None:
    assert errors["route: not a number"] == {"choice of the token": 0, "choice of the others": 0, "rows": 0}


def compiled(program: Any, types: dict[str, str], constants: dict[str, Any], blocks: TileSizes, capability: int) -> Any:
    """The program as the launcher would compile it: pointers and sizes are multiples of 16."""
    names = program.arg_names
    sizes = ("K", "N", "M", "H", "a_stride", "b_stride", "b_stride_e", "b_stride_n", "out_stride", "x_stride")
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*") or name in sizes
    }
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=program,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def up_program(blocks: TileSizes, weights: str = "*bf16") -> tuple[Any, dict[str, str], dict[str, Any]]:
    numbers = ("K", "N", "a_stride", "b_stride_e", "b_stride_n", "scale_stride_e", "bias_stride_e", "out_stride")
    pointers = {f"{name}_ptr": "*bf16" for name in ("a", "bias", "before", "out")}
    pointers |= {"b_ptr": weights, "scale_ptr": "*fp32"}
    pointers |= {"in_row_ptr": "*i64", "out_row_ptr": "*i32", "gate_ptr": "*fp32", "ends_ptr": "*i32"}
    constants = {"EXPERTS": 12, "EXPERTS_PADDED": 16, "GATHER": True, "SCATTER": False, "EPILOGUE": 1, "KEEP": False}
    constants |= {"FORMAT": 0 if weights == "*bf16" else 1, "scale_stride_n": 0}
    constants |= {"BLOCK_A": blocks.rows, "BLOCK_N": blocks.columns, "BLOCK_K": blocks.depth}
    return (
        programs.grouped_product,
        pointers | dict.fromkeys(numbers, "i32"),
        constants | {"b_stride_k": 1, "bias_stride_n": 1},
    )


def float8_program(blocks: TileSizes) -> tuple[Any, dict[str, str], dict[str, Any]]:
    return up_program(blocks, "*u8")


def weight_gradient_program(blocks: TileSizes) -> tuple[Any, dict[str, str], dict[str, Any]]:
    types = {f"{name}_ptr": "*bf16" for name in ("a", "b", "out", "sum")}
    types |= {"a_row_ptr": "*i32", "b_row_ptr": "*i64", "ends_ptr": "*i32"}
    types |= dict.fromkeys(("M", "N", "a_stride", "b_stride"), "i32")
    constants = {"GATHER_A": False, "GATHER_B": True, "SUM": True}
    constants |= {"BLOCK_M": blocks.depth, "BLOCK_N": blocks.columns, "BLOCK_A": blocks.rows}
    return programs.grouped_weight_gradient, types, constants


def route_program(blocks: TileSizes) -> tuple[Any, dict[str, str], dict[str, Any]]:
    types = {"x_ptr": "*bf16", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "logits_ptr": "*fp32", "rank_ptr": "*i8"}
    types |= {"expert_ptr": "*i64", "gate_ptr": "*fp32", "count_ptr": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(("T", "H", "top_k", "x_stride", "weight_stride"), "i32")
    constants = {"EXPERTS": 12, "EXPERTS_PADDED": 16, "BIAS": True, "NORMALISED": True}
    return programs.route_tokens, types, constants | {"BLOCK_T": blocks.rows, "BLOCK_H": blocks.depth}


PROGRAMS = {
    "up, crowded experts": (up_program, product_blocks(9216, 12, 2)),
    "up, few rows": (up_program, product_blocks(100, 12, 2)),
    "up, float8": (float8_program, product_blocks(9216, 12, 2)),
    "weight gradient": (weight_gradient_program, GRADIENT_BLOCKS),
    "routing": (route_program, TileSizes(rows=32, columns=0, depth=64, warps=4, stages=3)),
}


@pytest.mark.slow  # ptxas takes seconds a kernel
@pytest.mark.parametrize(
    ("name", "capability"),
    [(name, card) for name in ("up, crowded experts", "weight gradient") for card in SHARED_MEMORY]
    + [(name, 80) for name in ("up, few rows", "up, float8", "routing")],
)
def test_every_card_gets_a_kernel_that_fits_and_spills_nothing(name: str, capability: int, tmp_path: Path) -> None:
    program, blocks = PROGRAMS[name]
    kernel = compiled(*program(blocks), blocks, capability)
    assert kernel.metadata.shared <= SHARED_MEMORY[capability] * 1024
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    assert found["LOCAL"] == "0", usage
    assert int(found["STACK"]) == 0, usage
    assert int(found["REG"]) <= 255
