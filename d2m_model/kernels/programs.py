"""The Triton programs: grouped matrix products with gathered and scattered rows, and the sum of a token's rows.

Every output element has one owner, which adds in a fixed order, in float32: results repeat bit for bit, without atomics.
The host never needs to know how many rows an expert has: the grid covers the largest possible number of row tiles, and
each program finds its expert in `ends`.

Shapes: A assignments sorted by expert, E experts, K depth of a product, N columns, T tokens, H hidden size.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Epilogues of `grouped_product`
PLAIN = tl.constexpr(0)
GELU_GATE = tl.constexpr(1)

# Formats of stored weights of `grouped_product`
WIDE = tl.constexpr(0)  # the dtype of the other operand
E4M3 = tl.constexpr(1)
E5M2 = tl.constexpr(2)


@triton.jit
def gelu_tanh(x):
    """gelu_tanh(x), float32. tanh(u) is 2 sigmoid(2u) - 1."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * tl.sigmoid(2 * inner)


@triton.jit
def gelu_tanh_derivative(x):
    """d gelu_tanh(x) / dx, float32."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    slope = 0.7978845608028654 * (1 + 0.134145 * x * x)
    half = tl.sigmoid(2 * inner)
    return half + 2 * x * half * (1 - half) * slope


@triton.jit
def widened(bits, FORMAT: tl.constexpr):
    """The values of float8 numbers, given as bytes, in float16: those of E4M3 divided by 256. Exact, but for E4M3's NaN.

    By their bits, because Triton converts E4M3 only from compute capability 8.9 on. E4M3 has float16's layout with four
    bits of exponent in the place of five, and a bias of 7 in the place of 15; E5M2 is the upper half of a float16.
    """
    bits = bits.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7) if FORMAT == E4M3 else bits << 8
    return half.to(tl.float16, bitcast=True)


@triton.jit
def row_tile(ends_ptr, tile, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, BLOCK_A: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a row tile. Tiles beyond the last have first >= end."""
    experts = tl.arange(0, EXPERTS_PADDED)
    real = experts < EXPERTS
    ends = tl.load(ends_ptr + experts, mask=real, other=0)
    begins = tl.load(ends_ptr + experts - 1, mask=real & (experts > 0), other=0)
    tiles = tl.where(real, (ends - begins + BLOCK_A - 1) // BLOCK_A, 0)
    tiles_before = tl.cumsum(tiles, 0) - tiles
    expert = tl.sum((tiles_before + tiles <= tile).to(tl.int32), 0)
    chosen = experts == expert
    begin = tl.sum(tl.where(chosen, begins, 0), 0)
    end = tl.sum(tl.where(chosen, ends, 0), 0)
    before = tl.sum(tl.where(chosen, tiles_before, 0), 0)
    return expert, begin + (tile - before) * BLOCK_A, end


@triton.jit
def grouped_product(
    a_ptr,
    in_row_ptr,
    b_ptr,
    scale_ptr,
    bias_ptr,
    gate_ptr,
    before_ptr,
    out_ptr,
    out_row_ptr,
    ends_ptr,
    K,
    N,
    a_stride,
    b_stride_e,
    b_stride_k,
    b_stride_n,
    scale_stride_e,
    scale_stride_n,
    bias_stride_e,
    bias_stride_n,
    out_stride,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    FORMAT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[r] = epilogue(a[row r] @ b[e]) for the rows r of every expert e.

    GATHER: row r of a is in_row[r]. SCATTER: row r of the result is written to out_row[r]. FORMAT: b is float8, given as
    bytes; its values are multiplied by scale[e, column], float32. Epilogue GELU_GATE:
    gate[r] * gelu_tanh(product + bias[e]); with KEEP the product + bias is written to `before` [A, N] as well.
    """
    pid = tl.program_id(0)
    column_tiles = tl.cdiv(N, BLOCK_N)
    expert, first, end = row_tile(ends_ptr, pid // column_tiles, EXPERTS, EXPERTS_PADDED, BLOCK_A)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_A)
    row_used = row < end
    if GATHER:
        a_row = tl.load(in_row_ptr + row, mask=row_used, other=0)
    else:
        a_row = row
    column = (pid % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_used = column < N
    depth = tl.arange(0, BLOCK_K)
    a = a_ptr + a_row.to(tl.int64)[:, None] * a_stride + depth[None, :]
    b = b_ptr + expert.to(tl.int64) * b_stride_e + depth[:, None] * b_stride_k + column[None, :] * b_stride_n
    total = tl.zeros((BLOCK_A, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        depth_used = start + depth < K
        a_tile = tl.load(a, mask=row_used[:, None] & depth_used[None, :], other=0.0)
        b_tile = tl.load(b, mask=depth_used[:, None] & column_used[None, :], other=0)
        if FORMAT != WIDE:
            b_tile = widened(b_tile, FORMAT).to(a_tile.dtype)
        total = tl.dot(a_tile, b_tile, total, input_precision="ieee")
        a += BLOCK_K
        b += BLOCK_K * b_stride_k
    used = row_used[:, None] & column_used[None, :]
    if FORMAT != WIDE:
        scale = tl.load(scale_ptr + expert * scale_stride_e + column * scale_stride_n, mask=column_used, other=0.0)
        total *= (scale * 256 if FORMAT == E4M3 else scale)[None, :]
    if EPILOGUE == GELU_GATE:
        bias = tl.load(bias_ptr + expert * bias_stride_e + column * bias_stride_n, mask=column_used, other=0.0)
        total += bias.to(tl.float32)[None, :]
        if KEEP:
            kept = before_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
            tl.store(kept, total.to(before_ptr.dtype.element_ty), mask=used)
            # The backward pass starts from the rounded value; so does the forward pass.
            total = total.to(before_ptr.dtype.element_ty).to(tl.float32)
        gate = tl.load(gate_ptr + row, mask=row_used, other=0.0)
        total = gelu_tanh(total) * gate[:, None]
    if SCATTER:
        out_row = tl.load(out_row_ptr + row, mask=row_used, other=0)
    else:
        out_row = row
    out = out_ptr + out_row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=used)


@triton.jit
def grouped_weight_gradient(
    a_ptr,
    a_row_ptr,
    b_ptr,
    b_row_ptr,
    out_ptr,
    sum_ptr,
    ends_ptr,
    M,
    N,
    a_stride,
    b_stride,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """out[e] = a[rows of e]^T @ b[rows of e], [E, M, N]; zeros for an expert without rows.

    SUM: the programs of the first column tile also write sum[e] = the sum of a's rows, [E, M] (a bias's gradient).
    """
    pid, expert = tl.program_id(0), tl.program_id(1)
    column_tiles = tl.cdiv(N, BLOCK_N)
    m = (pid // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_used, n_used = m < M, n < N
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total_a = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(begin, end, BLOCK_A):
        row = start + tl.arange(0, BLOCK_A)
        row_used = row < end
        a_row, b_row = row, row
        if GATHER_A:
            a_row = tl.load(a_row_ptr + row, mask=row_used, other=0)
        if GATHER_B:
            b_row = tl.load(b_row_ptr + row, mask=row_used, other=0)
        a = a_ptr + a_row.to(tl.int64)[None, :] * a_stride + m[:, None]
        b = b_ptr + b_row.to(tl.int64)[:, None] * b_stride + n[None, :]
        a_tile = tl.load(a, mask=m_used[:, None] & row_used[None, :], other=0.0)
        b_tile = tl.load(b, mask=row_used[:, None] & n_used[None, :], other=0.0)
        total = tl.dot(a_tile, b_tile, total, input_precision="ieee")
        if SUM:
            total_a += tl.sum(a_tile.to(tl.float32), 1)
    e = expert.to(tl.int64)
    out = out_ptr + (e * M + m[:, None]) * N + n[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=m_used[:, None] & n_used[None, :])
    if SUM:  # noqa: SIM102 (SUM is known when the program is compiled, pid is not)
        if pid % column_tiles == 0:
            tl.store(sum_ptr + e * M + m, total_a.to(sum_ptr.dtype.element_ty), mask=m_used)


@triton.jit
def gated_gelu_backward(
    grad_ptr,
    before_ptr,
    gate_ptr,
    grad_before_ptr,
    grad_gate_ptr,
    F,
    BLOCK_F: tl.constexpr,
):
    """Gradients of gate[r] * gelu_tanh(before[r]), one program a row: of `before` [A, F], and of `gate` [A] in float32."""
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_ptr + row)
    total = tl.zeros((BLOCK_F,), dtype=tl.float32)
    for start in range(0, F, BLOCK_F):
        column = start + tl.arange(0, BLOCK_F)
        used = column < F
        grad = tl.load(grad_ptr + row * F + column, mask=used, other=0.0).to(tl.float32)
        before = tl.load(before_ptr + row * F + column, mask=used, other=0.0).to(tl.float32)
        total += grad * gelu_tanh(before)
        found = grad * gate * gelu_tanh_derivative(before)
        tl.store(grad_before_ptr + row * F + column, found.to(grad_before_ptr.dtype.element_ty), mask=used)
    tl.store(grad_gate_ptr + row, tl.sum(total, 0))


@triton.jit
def sum_token_rows(
    y_ptr,
    first_ptr,
    out_ptr,
    rows,
    T,
    H,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out[t] = the sum of token t's rows, in float32, rounded once. Zeros for a token without rows.

    TOP_K >= 0: token t's rows are t TOP_K ... (t + 1) TOP_K. TOP_K < 0: they begin at first[t] and end where the next
    token's begin, the last one's at `rows`.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    used = column < H
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    if TOP_K >= 0:
        for k in tl.static_range(TOP_K):
            y = tl.load(y_ptr + (token * TOP_K + k) * H + column, mask=used, other=0.0)
            total += y.to(tl.float32)
    else:
        begin = tl.load(first_ptr + token)
        end = tl.load(first_ptr + token + 1, mask=token + 1 < T, other=rows)
        for row in range(begin, end):
            total += tl.load(y_ptr + row * H + column, mask=used, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=used)


@triton.jit
def route_tokens(
    x_ptr,
    weight_ptr,
    bias_ptr,
    logits_ptr,
    rank_ptr,
    expert_ptr,
    gate_ptr,
    count_ptr,
    T,
    H,
    top_k,
    scale,
    x_stride,
    weight_stride,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    BIAS: tl.constexpr,
    NORMALISED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Eq. 3 for BLOCK_T tokens: scores in float32, the top_k of them, gates, and how many tokens chose each expert.

    rank[t, e] is 0 for a token's best expert, 1 for its second, ..., -1 where e is not chosen; equal scores go to the
    lower expert. expert[t, rank] and gate[t, rank] are the choice, best first. count[block, e] is what the sort by
    expert starts from. A score that is no number counts as the lowest, so that every token has top_k experts.
    """
    block = tl.program_id(0)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    token_used = token < T
    expert = tl.arange(0, EXPERTS_PADDED)
    real = expert < EXPERTS
    column = tl.arange(0, BLOCK_H)
    x = x_ptr + token.to(tl.int64)[:, None] * x_stride + column[None, :]
    weight = weight_ptr + expert[None, :] * weight_stride + column[:, None]
    score = tl.zeros((BLOCK_T, EXPERTS_PADDED), dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        used = start + column < H
        x_tile = tl.load(x, mask=token_used[:, None] & used[None, :], other=0.0).to(tl.float32)
        weight_tile = tl.load(weight, mask=used[:, None] & real[None, :], other=0.0).to(tl.float32)
        score = tl.dot(x_tile, weight_tile, score, input_precision="ieee")
        x += BLOCK_H
        weight += BLOCK_H
    if BIAS:
        score += tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)[None, :]
    place = token.to(tl.int64)[:, None] * EXPERTS + expert[None, :]
    used = token_used[:, None] & real[None, :]
    tl.store(logits_ptr + place, score, mask=used)

    left = tl.where(real[None, :] & (score == score), score, float("-inf"))
    highest = tl.max(left, 1)
    rank = tl.full((BLOCK_T, EXPERTS_PADDED), -1, dtype=tl.int32)
    for k in range(0, top_k):
        best = tl.max(left, 1)
        candidate = (left == best[:, None]) & (rank < 0) & real[None, :]
        winner = tl.min(tl.where(candidate, expert[None, :], EXPERTS_PADDED), 1)
        won = expert[None, :] == winner[:, None]
        rank = tl.where(won, k, rank)
        left = tl.where(won, float("-inf"), left)
    chosen = (rank >= 0) & used
    if NORMALISED:
        power = tl.where(chosen, tl.exp(score - highest[:, None]), 0.0)
        total = tl.sum(power, 1)
        gate = scale * power / tl.where(total > 0, total, 1.0)[:, None]
    else:
        gate = tl.where(chosen, 1.0, 0.0)
    slot = token.to(tl.int64)[:, None] * top_k + rank
    tl.store(rank_ptr + place, rank.to(tl.int8), mask=used)
    tl.store(expert_ptr + slot, tl.broadcast_to(expert[None, :], (BLOCK_T, EXPERTS_PADDED)).to(tl.int64), mask=chosen)
    tl.store(gate_ptr + slot, gate, mask=chosen)
    tl.store(count_ptr + block * EXPERTS + expert, tl.sum(chosen.to(tl.int32), 0), mask=real)


@triton.jit
def place_rows(
    rank_ptr,
    end_ptr,
    token_ptr,
    slot_ptr,
    T,
    blocks,
    top_k,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The second half of a stable counting sort: each chosen (token, expert) is written to its row, by expert, then token.

    end[e, block] is where the rows of expert e in blocks 0 ... block end. A row's slot is t top_k + rank.
    """
    block = tl.program_id(0)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, EXPERTS_PADDED)
    used = (token < T)[:, None] & (expert < EXPERTS)[None, :]
    place = token.to(tl.int64)[:, None] * EXPERTS + expert[None, :]
    rank = tl.load(rank_ptr + place, mask=used, other=-1).to(tl.int32)
    chosen = (rank >= 0) & used
    here = chosen.to(tl.int32)
    end = tl.load(end_ptr + expert * blocks + block, mask=expert < EXPERTS, other=0)
    row = (end - tl.sum(here, 0))[None, :] + tl.cumsum(here, 0) - here
    wide_token = tl.broadcast_to(token[:, None], (BLOCK_T, EXPERTS_PADDED)).to(tl.int64)
    tl.store(token_ptr + row, wide_token, mask=chosen)
    tl.store(slot_ptr + row, wide_token * top_k + rank, mask=chosen)
