"""Mutations of safetensors files: of the header's JSON, the configuration, the tensors and the bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

_CONFIG = "d2m_config"
_METADATA = "__metadata__"
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I32": 4, "U8": 1, "BOOL": 1, "I64": 8}
_DEEP = 100

# JSON texts that a reader may not expect in some place.
HOSTILE = (
    *("null", "true", "false", '""', "[]", "{}", "[[]]", "[null]", '[""]', "[0, 0]", "[-1, 4]", "[1, 2, 3]"),
    *("0", "-1", "1", "2", "3", "512", "512.0", "0.5", "-0.0", "1e308", "1e999", "NaN", "-Infinity"),
    *("255", "256", "65536", "2147483647", "4294967296", "9223372036854775807", "-9223372036854775808"),
    *("9" * 30, "9" * 5000, "1" + "0" * 400, '"\\ud800"', '"\\u001b[31mred\\u0007"', '"\\u0000"', '"a\\nb"'),
    *('"' + "x" * 5000 + '"', "[" * _DEEP + "]" * _DEEP, "[" * 20_000 + "]" * 20_000, '{"a":' * _DEEP + "1" + "}" * _DEEP),
    *('"F32"', '"F64"', '"BF16"', '"I32"', '"U8"', '"F4"', '"F8_E8M0"', '"C64"', '"topk"', '"window"', '"single"'),
    *('"normalised"', '"sum"', '"../../x"', '"/etc/passwd"', '"{}"', '"{\\"layers\\": 5}"', '"{\\"layers\\": {\\"x\\": {}}}"'),
)  # fmt: skip

# Names that a tensor or a field may be given.
NAMES = (
    *("", "\x00", "\x1b[2J", "x" * 5000, "__metadata__", "d2m_config", "scaled_fp8", "adaln_in.weight", "é", "a.b.c"),
    *("single_blocks.50000000.x", "single_blocks.-1.linear1.weight", f"double_blocks.{'9' * 5000}.img_mlp.0.weight"),
    *("single_blocks.00.linear1.weight", "single_blocks.0.linear1.comfy_quant", "single_blocks.0.linear1.weight_scale"),
    *("single_blocks.0.linear1.pre_quant_scale", "single_blocks.0.router.comfy_quant", "single_blocks.0.expert_mean"),
    *("single_blocks.0.norm.query_norm.weight", "single_blocks.0.router.bias", "block_groups.7.router_x.weight"),
    *(
        "model.diffusion_model.img_in.weight",
        "lora_unet_single_blocks_0_linear1.alpha",
        "double_stream_modulation_img.x",
    ),
    *("transformer.single_transformer_blocks.0.proj_out.lora_A.weight", "single_blocks.0.linear1.lora_B.weight"),
    *("schema_version", "provenance", "sensitivity", "router", "capacity", "baked", "teacher_outputs"),
)


def mutated(data: bytes, random: Random) -> bytes:
    """Return `data`, a safetensors file or JSON, with one to three mutations."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = random.choice(_MUTATIONS if data[:1] != b"{" else _TEXT_MUTATIONS)(data, random)
    return data


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Return the header and the bytes of the tensors; None for a file without a readable header."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length]) if length < len(data) else None
    except (ValueError, RecursionError):
        return None
    return (header, data[8 + length :]) if isinstance(header, dict) else None


def put_together(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def stored(tensors: dict[str, tuple[str, list[int], bytes]], metadata: Any) -> bytes:
    """Return a file whose header fits its tensors: by name (dtype, shape, bytes)."""
    header, position = {} if metadata is None else {_METADATA: metadata}, 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(content)]}
        position += len(content)
    return put_together(json.dumps(header).encode(), b"".join(content for _, _, content in tensors.values()))


# JSON


def mutated_json(value: Any, random: Random) -> bytes:
    """Return the JSON of `value` with one node, key or number changed."""
    value = json.loads(json.dumps(value))
    raw: dict[str, str] = {}

    def hostile() -> str:
        raw[f"@raw{len(raw)}@"] = random.choice(HOSTILE)
        return f"@raw{len(raw) - 1}@"

    container, key = _place(value, random)
    if container is None:
        value = hostile()
    else:
        change = random.randrange(8)
        if change < 3:
            container[key] = hostile()
        elif change == 3:
            del container[key]
        elif change == 4 and isinstance(container, dict):
            container[random.choice((*NAMES, *list(container)))] = container.pop(key)
        elif change == 5 and isinstance(container, dict):
            container["@twice@"], raw["@twice@"] = hostile(), json.dumps(key)
        elif change == 6:
            other, other_key = _place(value, random)
            container[key] = json.loads(json.dumps(other[other_key])) if other is not None else hostile()
        else:
            container[key] = _other_number(container[key], random) or hostile()
    text = json.dumps(value)
    for mark, written in raw.items():
        text = text.replace(f'"{mark}"', written)
    return text.encode()


def _place(value: Any, random: Random) -> tuple[Any, Any]:
    """Return a random (container, key) within JSON; (None, None) for the whole."""
    container, key = None, None
    while isinstance(value, dict | list) and value and (container is None or random.random() < 0.7):
        container, key = value, random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = container[key]
    return (None, None) if random.random() < 0.01 else (container, key)


def _other_number(value: Any, random: Random) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        return None
    return random.choice((value + 1, value - 1, value * 2, -value, value / 2, float(value), value * 1000))


# Mutations of a file's bytes


def _header(data: bytes, random: Random) -> bytes:
    parts = taken_apart(data)
    return _flipped(data, random) if parts is None else put_together(mutated_json(parts[0], random), parts[1])


def _tensors_of(data: bytes) -> tuple[dict[str, tuple[str, list[int], bytes]], Any] | None:
    parts = taken_apart(data)
    if parts is None:
        return None
    header, content = parts
    try:
        tensors = {
            name: (entry["dtype"], entry["shape"], content[slice(*entry["data_offsets"])])
            for name, entry in header.items()
            if name != _METADATA
        }
    except (TypeError, KeyError, ValueError):
        return None
    return tensors, header.get(_METADATA)


def _config(data: bytes, random: Random) -> bytes:
    parts = _tensors_of(data)
    if parts is None or _CONFIG not in parts[0]:
        return _header(data, random)
    tensors, metadata = parts
    try:
        text = mutated_json(json.loads(tensors[_CONFIG][2]), random)
    except (ValueError, RecursionError):
        text = _flipped(tensors[_CONFIG][2], random)
    tensors[_CONFIG] = ("U8", [len(text)], text)
    return stored(tensors, metadata)


def _layout(data: bytes, random: Random) -> bytes:
    """Drop, double, rename, reshape, cast or exchange tensors; the header still fits."""
    parts = _tensors_of(data)
    if parts is None or len(parts[0]) < 2:
        return _header(data, random)
    tensors, metadata = parts
    name, other = random.sample(sorted(tensors), 2)
    dtype, shape, content = tensors[name]
    change = random.randrange(7)
    if change == 0:
        del tensors[name]
    elif change == 1:
        tensors[random.choice((*NAMES, f"{other}.x", other.upper()))] = tensors[name]
    elif change == 2:
        tensors[random.choice((*NAMES, other))] = tensors.pop(name)
    elif change == 3:
        flat = [len(content) // _SIZES.get(dtype, 1)]
        tensors[name] = (
            dtype,
            random.choice((flat, [1, *flat], [*flat, 1], shape[::-1], [0], [], [0, 2**40])),
            content,
        )
        if tensors[name][1][:1] in ([0], []):
            size = 0 if tensors[name][1] else _SIZES.get(dtype, 1)
            tensors[name] = (dtype, tensors[name][1], content[:size])
    elif change == 4:
        cast = random.choice([kind for kind in _SIZES if len(content) % _SIZES[kind] == 0])
        tensors[name] = (cast, [len(content) // _SIZES[cast]], content)
    elif change == 5:
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        cast = random.choice(("F32", "F16", "BF16", "F8_E4M3", "I32", "U8"))
        elements = len(content) // _SIZES.get(dtype, 1)
        tensors[name] = (cast, shape, bytes(elements * _SIZES[cast]))
    return stored(tensors, metadata)


def _values(data: bytes, random: Random) -> bytes:
    """Overwrite a part of one tensor: with NaN, infinity, zeros or noise. Small tensors as often as large ones."""
    parts = taken_apart(data)
    spans = [entry.get("data_offsets") for entry in parts[0].values() if isinstance(entry, dict)] if parts else []
    spans = [s for s in spans if isinstance(s, list) and len(s) == 2 and all(type(n) is int for n in s) and s[0] < s[1]]
    if parts is None or not spans:
        return _flipped(data, random)
    begin, end = random.choice(spans)
    begin += random.choice((0, 4 * random.randrange(0, max(1, (end - begin) // 4))))
    size = min(end - begin, random.choice((1, 2, 4, 8, 64, 1 << 12)))
    pattern = random.choice(
        (b"\xff", b"\x00", b"\x80\x7f", b"\x00\x7c", b"\x00\x00\xc0\x7f", b"\x7f", random.randbytes(8))
    )
    content = bytearray(parts[1])
    content[begin : begin + size] = (pattern * size)[:size]
    return put_together(json.dumps(parts[0]).encode(), bytes(content))


def _metadata(data: bytes, random: Random) -> bytes:
    parts = taken_apart(data)
    if parts is None:
        return _flipped(data, random)
    header, content = parts
    key = random.choice(
        ("_quantization_metadata", "modelspec.title", "modelspec.license", "lora_adapter_metadata", "x")
    )
    text = mutated_json({"layers": {"single_blocks.0.linear1": {"format": "float8_e4m3fn"}}}, random).decode()
    header[_METADATA] = {key: random.choice((text, "\x1b[31m\x07", "x" * 5000, "{}", "[]"))}
    return put_together(json.dumps(header).encode(), content)


def _prefixed(data: bytes, random: Random) -> bytes:
    parts = _tensors_of(data)
    if parts is None:
        return _flipped(data, random)
    prefix = random.choice(("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "."))
    some = random.random() < 0.3
    kept = {(name if some and random.random() < 0.1 else prefix + name): tensor for name, tensor in parts[0].items()}
    return stored(kept, parts[1])


def _flipped(data: bytes, random: Random) -> bytes:
    """Change one to eight bytes; half of the times within the first 4096."""
    content = bytearray(data)
    for _ in range(random.randint(1, 8) if content else 0):
        content[random.randrange(min(len(content), random.choice((4096, len(content)))))] = random.randrange(256)
    return bytes(content)


def _cut(data: bytes, random: Random) -> bytes:
    """Truncate, append, insert, remove, or change the header's length."""
    change, at = random.randrange(6), random.randrange(len(data) + 1)
    if change == 0:
        return data[: random.choice((at, min(at, 200), len(data) - 1, 8, 0))]
    if change == 1:
        return data + random.randbytes(random.choice((1, 100)))
    if change == 2:
        return data[:at] + random.randbytes(random.choice((1, 8))) + data[at:]
    if change == 3:
        return data[:at] + data[at + random.choice((1, 8, 1000)) :]
    length = int.from_bytes(data[:8], "little")
    near = random.choice((0, 1, 2, length - 1, length + 1, len(data), 10**8, 10**8 + 1, 2**63, 2**64 - 1)) % 2**64
    return near.to_bytes(8, "little") + data[8:]


def _text_value(data: bytes, random: Random) -> bytes:
    try:
        return mutated_json(json.loads(data), random)
    except (ValueError, RecursionError):
        return _flipped(data, random)


_MUTATIONS: tuple[Callable[[bytes, Random], bytes], ...] = (
    *(_header, _header, _config, _config, _config, _layout, _layout, _values, _values),
    *(_metadata, _prefixed, _flipped, _cut),
)
_TEXT_MUTATIONS: tuple[Callable[[bytes, Random], bytes], ...] = (_text_value, _text_value, _flipped, _cut)
