"""Linear weights of random codes, as each kind of quantized source stores them, and what they stand for."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from encoded_numbers import (
    E2M1,
    E2M3,
    Draw,
    Floats,
    Numbers,
    Stored,
    draw_brains,
    draw_e4m3,
    draw_e4m3_scales,
    draw_halves,
    draw_powers,
    draw_singles,
    from_brain,
    pack_bytes,
    pack_words,
    spread,
    to_brain,
)
from numpy.random import Generator

INVERSE_OF_127: Final = 7.874015718698502e-3  # as bitsandbytes has it


@dataclass(frozen=True)
class Coded:
    """An encoded matrix: its tensors by the suffix of the module's name, codes first, and its fp32 values."""

    parts: Mapping[str, Stored]
    weight: Floats

    @property
    def encoded(self) -> bool:
        """False for numbers that are stored as they are."""
        return next(iter(self.parts.values())).dtype != "BF16"

    @property
    def twin(self) -> Stored:
        """The weight unquantized: F32, or as it is."""
        return Stored("F32", self.weight) if self.encoded else Stored("BF16", to_brain(self.weight))


Encode = Callable[[Generator, int, int], Coded]  # of so many rows and columns


# --- bytes ---------------------------------------------------------------------------------------------------------


def plain(rng: Generator, rows: int, columns: int) -> Coded:
    """BF16, not encoded."""
    bits = to_brain((rng.standard_normal((rows, columns)) * 0.02).astype(np.float32))
    return Coded({".weight": Stored("BF16", bits)}, from_brain(bits))


def fp8(scale: str, draw: Draw, high: int, wide: int, *activation: str) -> Encode:
    """e4m3 with a grid of scales; a block of 0 is a whole side, and a grid of one number a scalar."""

    def encode(rng: Generator, rows: int, columns: int) -> Coded:
        block = (high or rows, wide or columns)
        codes, grid = draw_e4m3(rng, (rows, columns)), draw(rng, (-(-rows // block[0]), -(-columns // block[1])))
        stored = grid.stored if grid.values.size > 1 else Stored(grid.stored.dtype, grid.stored.data.reshape(()))
        lone = {name: draw_singles(rng, ()).stored for name in activation}
        weight = codes.values * spread(grid.values, block, (rows, columns))
        return Coded({".weight": codes.stored, scale: stored, **lone}, weight)

    return encode


def int8(zeros: bool) -> Encode:
    """Two's complement bytes with a scale, and perhaps a zero point, for each row."""

    def encode(rng: Generator, rows: int, columns: int) -> Coded:
        codes, scale = rng.integers(-128, 128, (rows, columns), np.int8), draw_brains(rng, (rows, 1))
        parts = {".weight": Stored("I8", codes), ".weight_scale": scale.stored}
        if not zeros:
            return Coded(parts, codes.astype(np.float32) * scale.values)
        points = rng.integers(-128, 128, (rows, 1), np.int8)
        parts[".weight_zero_point"] = Stored("I8", points)
        return Coded(parts, (codes.astype(np.float32) - points.astype(np.float32)) * scale.values)

    return encode


def bnb8(rng: Generator, rows: int, columns: int) -> Coded:
    """LLM.int8: (code * SCB) times the fp32 number that bitsandbytes takes for 1/127."""
    codes, scale = rng.integers(-127, 128, (rows, columns), np.int8), draw_singles(rng, (rows,))
    parts = {
        ".weight": Stored("I8", codes),
        ".SCB": scale.stored,
        ".weight_format": Stored("U8", np.zeros((), np.uint8)),
    }
    return Coded(parts, codes.astype(np.float32) * scale.values[:, None] * np.float32(INVERSE_OF_127))


# --- nibbles -------------------------------------------------------------------------------------------------------


def mx(codes: str, scale: str, draw: Draw, tag: str = "U8", bits: int = 4) -> Encode:
    """e2m1 or e2m3 with a power of two for 32 columns."""

    def encode(rng: Generator, rows: int, columns: int) -> Coded:
        drawn, powers = rng.integers(0, 1 << bits, (rows, columns), np.uint8), draw(rng, (rows, columns // 32))
        packed = pack_bytes(drawn, bits).view({"U8": np.uint8, "I8": np.int8}[tag])
        values = {4: E2M1, 6: E2M3}[bits][drawn]
        return Coded({codes: Stored(tag, packed), scale: powers.stored}, values * np.repeat(powers.values, 32, 1))

    return encode


def mx_blocks(rng: Generator, rows: int, columns: int) -> Coded:
    """gpt-oss: a block of 16 bytes for 32 columns."""
    found = mx("_blocks", "_scales", draw_powers)(rng, rows, columns)
    blocks = Stored("U8", found.parts["_blocks"].data.reshape(rows, columns // 32, 16))
    return Coded({"_blocks": blocks, "_scales": found.parts["_scales"]}, found.weight)


def nvfp4(
    codes: str, scale: str, above: str, activation: str, divides: bool = False, shared: float | None = None
) -> Encode:
    """e2m1 with e4m3 for 16 columns, and a number above that multiplies or divides these: one of its own, or a shared
    one."""

    def encode(rng: Generator, rows: int, columns: int) -> Coded:
        drawn, scales = rng.integers(0, 16, (rows, columns), np.uint8), draw_e4m3_scales(rng, (rows, columns // 16))
        own = rng.uniform(2000, 4000) if divides else rng.uniform(1, 2) / 4096
        top = np.asarray(own if shared is None else shared, np.float32)
        each = scales.values / top if divides else scales.values * top
        parts = {codes: Stored("U8", pack_bytes(drawn, 4)), scale: scales.stored}
        parts |= {above: Stored("F32", top.reshape(1) if divides else top), activation: draw_singles(rng, ()).stored}
        return Coded(parts, E2M1[drawn] * np.repeat(each, 16, 1))

    return encode


def opened(encode: Encode) -> Encode:
    """What `encode` makes, as BF16: it must be exact."""

    def decoded(rng: Generator, rows: int, columns: int) -> Coded:
        weight = encode(rng, rows, columns).weight
        bits = to_brain(weight)
        assert np.array_equal(from_brain(bits), weight)
        return Coded({".weight": Stored("BF16", bits)}, weight)

    return decoded


def bnb4(table: Floats, name: str, nested: bool = False) -> Encode:
    """Levels of a table with a largest magnitude for 64 elements, which may be codes themselves."""

    def encode(rng: Generator, rows: int, columns: int) -> Coded:
        count = rows * columns
        drawn = rng.integers(0, 16, count, np.uint8)
        state: dict[str, Any] = {"quant_type": name, "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns]}
        parts = {".weight": Stored("U8", (drawn[::2] << 4 | drawn[1::2])[:, None])}
        if nested:
            levels = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
            codes, outer = rng.integers(0, 256, count // 64, np.uint8), draw_singles(rng, (-(-count // 64 // 256),))
            parts |= {".weight.absmax": Stored("U8", codes), ".weight.nested_absmax": outer.stored}
            parts[".weight.nested_quant_map"] = Stored("F32", levels)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.01171875}
            scale = levels[codes] * np.repeat(outer.values, 256)[: codes.size] + np.float32(state["nested_offset"])
        else:
            drawn_scale = draw_singles(rng, (count // 64,))
            parts[".weight.absmax"], scale = drawn_scale.stored, drawn_scale.values
        content = np.frombuffer(json.dumps(state).encode(), np.uint8)
        parts |= {".weight.quant_map": Stored("F32", table)}
        parts[f".weight.quant_state.bitsandbytes__{name}"] = Stored("U8", content)
        return Coded(parts, (table[drawn] * np.repeat(scale, 64)).reshape(rows, columns))

    return encode


# --- integers in words ---------------------------------------------------------------------------------------------


def grouped(codes: Any, zeros: Any, scale: Numbers, group: Any) -> Floats:
    """(code - zero) * scale, `zeros` and scales [rows, groups] and the group of each column."""
    found: Floats = (codes.astype(np.float32) - zeros.astype(np.float32)[:, group]) * scale.values[:, group]
    return found


def int_pack(bits: int, group: int | None, zeros: bool = False) -> Encode:
    """compressed-tensors: a stream of bits for each row, zero points down the rows."""

    def encode(rng: Generator, rows: int, columns: int) -> Coded:
        wide = group or columns
        drawn, scale = rng.integers(0, 1 << bits, (rows, columns)), draw_brains(rng, (rows, columns // wide))
        points = (
            rng.integers(0, 1 << bits, (rows, columns // wide))
            if zeros
            else np.full((rows, columns // wide), 1 << bits - 1)
        )
        parts = {".weight_packed": Stored("I32", pack_words(drawn, bits)), ".weight_scale": scale.stored}
        parts[".weight_shape"] = Stored("I64", np.array([rows, columns]))
        if zeros:
            parts[".weight_zero_point"] = Stored("I32", np.ascontiguousarray(pack_words(points.T, bits).T))
        return Coded(parts, grouped(drawn, points, scale, np.arange(columns) // wide))

    return encode


def gptq(bits: int, group: int, version: int, act_order: bool = False) -> Encode:
    """A stream of bits down each column of qweight, which is a row; version 1 stores zero points less one."""

    def encode(rng: Generator, rows: int, columns: int) -> Coded:
        order = np.arange(columns) // group
        order = rng.permutation(order) if act_order else order
        drawn, points = (
            rng.integers(0, 1 << bits, (rows, columns)),
            rng.integers(1, 1 << bits, (rows, columns // group)),
        )
        scale = draw_halves(rng, points.shape)
        turned = Stored("F16", np.ascontiguousarray(scale.stored.data.T))
        parts = {
            ".qweight": Stored("I32", np.ascontiguousarray(pack_words(drawn, bits).T)),
            ".qzeros": Stored("I32", pack_words(points.T - (version == 1), bits)),
            ".scales": turned,
            ".g_idx": Stored("I32", order.astype(np.int32)),
        }
        return Coded(parts, grouped(drawn, points, scale, order))

    return encode


def awq(rng: Generator, rows: int, columns: int) -> Coded:
    """Eight rows in a word; its nibbles, from the lowest, are rows 0 2 4 6 1 3 5 7. Groups of 32."""
    drawn, points = rng.integers(0, 16, (rows, columns)), rng.integers(0, 16, (rows, columns // 32))
    scale = draw_halves(rng, points.shape)

    def words(codes: Any) -> Stored:
        lanes = codes.T.reshape(codes.shape[1], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return Stored("I32", pack_words(lanes.reshape(codes.shape[1], -1), 4))

    parts = {".qweight": words(drawn), ".qzeros": words(points)}
    parts[".scales"] = Stored("F16", np.ascontiguousarray(scale.stored.data.T))
    return Coded(parts, grouped(drawn, points, scale, np.arange(columns) // 32))


def mlx(bits: int, group: int) -> Encode:
    """scale * code + bias, two roundings."""

    def encode(rng: Generator, rows: int, columns: int) -> Coded:
        drawn = rng.integers(0, 1 << bits, (rows, columns), np.uint8)
        scale, bias = draw_brains(rng, (rows, columns // group)), draw_brains(rng, (rows, columns // group))
        minus = Stored("BF16", bias.stored.data | np.uint16(0x8000))
        packed = Stored("U32", pack_words(drawn, bits).view(np.uint32))
        weight = drawn.astype(np.float32) * np.repeat(scale.values, group, 1) + np.repeat(-bias.values, group, 1)
        return Coded({".weight": packed, ".scales": scale.stored, ".biases": minus}, weight)

    return encode


def mlx_mxfp4(rng: Generator, rows: int, columns: int) -> Coded:
    """MXFP4 in words."""
    found = mx(".weight", ".scales", draw_powers)(rng, rows, columns)
    packed = Stored("U32", np.ascontiguousarray(found.parts[".weight"].data).view(np.uint32))
    return Coded({**found.parts, ".weight": packed}, found.weight)
