"""What each operation of a compiled program is, read from XLA's text: its place in the model, bytes, arithmetic."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "token": 0}
MATRIX_CALLS = re.compile(r"gemm|matmul|\$dot", re.IGNORECASE)
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of a scheduled program."""

    kind: str  # matrix product | kernel | reduction | transpose or copy | elementwise | opcode of whatever else
    place: str  # forward, backward or step, and the path of modules; layer numbers as *
    result: str  # its type
    inside: tuple[str, ...]  # the primitives that it fuses
    bytes: float  # operands read once and results written once
    flops: float  # of matrix products; 0 where they are unknown


@dataclasses.dataclass(frozen=True)
class _Line:
    name: str
    type: str
    opcode: str
    operands: list[str]
    rest: str


def operations(text: str) -> dict[str, Operation]:
    """{name: Operation} of every instruction outside of fusions, and inside of them too (names are unique)."""
    computations = dict(_computations(text))
    return {
        line.name: _operation(line, {other.name: other.type for other in lines}, computations)
        for lines in computations.values()
        for line in lines
    }


def size(type_text: str) -> float:
    """Bytes of an array type, or of all arrays of a tuple type."""
    total = 0.0
    for dtype, shape in _ARRAY.findall(type_text):
        bits = re.search(r"\d+", dtype)
        width = BYTES[dtype] if dtype in BYTES else int(bits.group()) / 8 if bits else 0
        total += width * math.prod(int(n) for n in shape.split(",") if n)
    return total


def place(op_name: str) -> str:
    """`jit(f)/transpose(jvp(Model))/encoder/layer_3/mlp_in/add` as `backward: encoder/layer_*/mlp_in/add`."""
    direction = "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else "step"
    parts = [
        part for part in op_name.split("/") if not re.match(r"(jit|jvp|transpose)\(|MaskedLM\.|checkpoint|remat", part)
    ]
    return f"{direction}: " + re.sub(r"_\d+\b", "_*", "/".join(parts))


def _computations(text: str) -> Iterator[tuple[str, list[_Line]]]:
    name, lines = "", []
    for raw in text.splitlines():
        header = _COMPUTATION.match(raw)
        if header and " = " not in raw.split("(", 1)[0]:
            name, lines = header.group(1), []
        elif raw.startswith("}"):
            yield name, lines
        elif " = " in raw:
            lines.append(_line(raw))


def _line(raw: str) -> _Line:
    name, _, right = raw.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(right) + 1 if right.startswith("(") else right.index(" ")
    type_text, call = right[:end], right[end:].strip()
    opcode = call[: call.index("(")]
    call = call[len(opcode) :]
    close = _closing(call)
    return _Line(name.lstrip("%"), type_text, opcode, _NAME.findall(call[:close]), call[close + 1 :])


def _closing(text: str) -> int:
    """The index of the parenthesis that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and letter == ")":
            return i
    return len(text)


def _operation(line: _Line, types: dict[str, str], computations: dict[str, list[_Line]]) -> Operation:
    inner = _fused(line, computations)
    op_name = re.search(r'op_name="([^"]*)"', line.rest)
    target = re.search(r'custom_call_target="([^"]*)"', line.rest)
    opcodes = {x.opcode for x in inner} or {line.opcode}
    if "dot" in opcodes or (target and MATRIX_CALLS.search(target.group(1))):
        kind = "matrix product"
    elif "custom-call" in opcodes:
        kind = "kernel"
    elif opcodes & {"reduce", "reduce-window", "scatter", "sort"}:
        kind = "reduction"
    elif opcodes - {"parameter", "bitcast", "convert", "tuple", "get-tuple-element"} <= {"copy", "transpose"}:
        kind = "transpose or copy"
    elif line.opcode == "fusion":
        kind = "elementwise"
    else:
        kind = line.opcode
    inner_types = {x.name: x.type for x in inner}
    flops = sum(_flops(x, inner_types) for x in inner) if inner else _flops(line, types)
    return Operation(
        kind,
        place(op_name.group(1)) if op_name else "",
        re.sub(r"\{[^}]*\}", "", line.type),
        tuple(sorted(opcodes - {"parameter", "bitcast", "constant", "tuple", "get-tuple-element", "fusion"})),
        size(line.type) + sum(size(types.get(name, "")) for name in line.operands),
        flops,
    )


def _fused(line: _Line, computations: dict[str, list[_Line]]) -> list[_Line]:
    """All instructions that a fusion holds, those of fusions inside of it too."""
    called = re.search(r"calls=%?([\w.\-]+)", line.rest)
    if line.opcode != "fusion" or not called:
        return []
    inner = computations.get(called.group(1), [])
    return inner + [deeper for x in inner for deeper in _fused(x, computations)]


def _flops(line: _Line, types: dict[str, str]) -> float:
    """2 x elements of the product x contracted elements."""
    dims = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", line.rest)
    contracted = dims.group(1).split(",") if dims else []
    if not dims and "custom-call" in line.opcode:
        config = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', line.rest)
        contracted = json.loads(config.group(1)) if config else []
    arrays, left = _ARRAY.findall(line.type), _ARRAY.findall(types.get(line.operands[0], "")) if line.operands else []
    if not contracted or not arrays or not left:
        return 0.0
    shape = [int(n) for n in left[0][1].split(",") if n]
    elements = math.prod(int(n) for n in arrays[0][1].split(",") if n)
    return 2.0 * elements * math.prod(shape[int(i)] for i in contracted)
