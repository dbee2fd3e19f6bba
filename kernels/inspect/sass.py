"""Reads machine code as cuobjdump prints it, and walks the path one warp takes through it.

How often a loop runs depends on integers alone: arguments, program numbers, constants. So a walk that
follows integer arithmetic and takes all else as unknown finds the way of every warp, and with it what
is executed, without a GPU. A branch on something unknown (a value loaded, a barrier's state) is not
taken: a wait is over at once, a rare case is looked into.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

Value = int | None
"""What a register holds, 32 bits without sign; None: not known."""

_MOST_STEPS = 4_000_000
_WORD = 0xFFFFFFFF

# Where arguments begin in constant memory, and where the grid's size stands there, by compute capability.
_PARAMETERS = {80: 0x160, 90: 0x210, 100: 0x380}
_GRID = {80: 0xC, 90: 0xC, 100: 0x370}

_LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);")
_REGISTER = re.compile(r"(U?R)(\d+)$")
_CONSTANT = re.compile(r"c\[0x0\]\[0x([0-9a-f]+)\]$")
_PREDICATE = re.compile(r"!?U?P(\d|T|R)$")


class Instruction(NamedTuple):
    """One line of machine code."""

    address: int
    guard: str  # the predicate it depends on, "" for none
    name: str  # with all its parts, as "ISETP.GE.AND"
    operands: tuple[str, ...]

    @property
    def parts(self) -> list[str]:
        """The name's parts."""
        return self.name.split(".")

    @property
    def stem(self) -> str:
        """The first part of the name."""
        return self.name.partition(".")[0]


def parse(text: str) -> list[Instruction]:
    """Return the instructions of the one kernel in what `cuobjdump -sass` printed."""
    found = []
    for address, line in _LINE.findall(text):
        guard, line = "", line.strip()
        if line.startswith("@"):
            guard, line = line[1:].split(None, 1)
        name, _, rest = line.partition(" ")
        operands = tuple(x.strip().replace(".reuse", "") for x in rest.split(",")) if rest.strip() else ()
        found.append(Instruction(int(address, 16), guard, name, operands))
    return found


class Walk(NamedTuple):
    """What one warp executes."""

    executed: Counter[str]  # instructions by name
    path: list[int]  # those that count in an order, as places in the program

    @property
    def instructions(self) -> int:
        """The number of issue slots it takes."""
        return sum(self.executed.values())


class _Unknown(Exception):
    """Something the result depends on is not known."""


class Warp:
    """The state of one warp on its way: registers and predicates, as far as integers tell them.

    Args:
        arguments: of the kernel, as they lie in constant memory.
        arch: compute capability.
        program, grid: its number, and how many there are.
    """

    def __init__(self, arguments: bytes, arch: int, program: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        start, size = _PARAMETERS[arch], _GRID[arch]
        self._constants = {start + at: x for at, x in _words(arguments)}
        self._constants |= {size + at: x for at, x in _words(struct.pack("<3I", *grid))}
        self._registers: dict[str, int] = {}
        self._predicates: dict[str, bool] = {}
        special = {"SR_TID": (0, 0, 0), "SR_CTAID": program, "SR_NCTAID": grid}
        self._special = {f"{name}.{axis}": x for name, xs in special.items() for axis, x in zip("XYZ", xs, strict=True)}
        self._special |= {"SR_CgaCtaId": 0, "SR_LANEID": 0, "SRZ": 0}

    # ---- operands

    def truth(self, name: str) -> bool:
        """Return a predicate."""
        inverted, name = name.startswith("!"), name.lstrip("!")
        if name in ("PT", "UPT"):
            return not inverted
        if name not in self._predicates:
            raise _Unknown
        return self._predicates[name] != inverted

    def word(self, operand: str, next_to: int = 0) -> int:
        """Return a register, constant or number; next_to: of the register that many after it."""
        sign, name = operand[:1], operand.lstrip("-~|").rstrip("|")
        value = self._plain(name, next_to)
        if operand.startswith("|") or operand.startswith("-|"):
            value = abs(_signed(value))
        if sign == "-":
            value = -value
        return (~value if sign == "~" else value) & _WORD

    def _plain(self, name: str, next_to: int) -> int:
        if name in ("RZ", "URZ") or name in self._special:
            return self._special.get(name, 0)
        if found := _REGISTER.match(name):
            key = f"{found[1]}{int(found[2]) + next_to}"
            if key not in self._registers:
                raise _Unknown
            return self._registers[key]
        if found := _CONSTANT.match(name):
            at = int(found[1], 16) + 4 * next_to
            if at not in self._constants:
                raise _Unknown
            return self._constants[at]
        try:
            return int(name, 0) >> 32 * next_to if next_to == 0 else 0
        except ValueError:
            raise _Unknown from None

    def pair(self, operand: str) -> int:
        """Return 64 bits: a register and the one after it, a constant, or a number."""
        return self.word(operand) | self.word(operand, 1) << 32

    def keep(self, name: str, value: Value, words: int = 1) -> None:
        """Write `words` registers from one on."""
        if found := _REGISTER.match(name):
            for i in range(words):
                key = f"{found[1]}{int(found[2]) + i}"
                if value is None:
                    self._registers.pop(key, None)
                else:
                    self._registers[key] = value >> 32 * i & _WORD

    def decide(self, name: str, value: bool | None) -> None:
        """Write a predicate."""
        if value is None:
            self._predicates.pop(name, None)
        elif name not in ("PT", "UPT"):
            self._predicates[name] = value

    # ---- instructions

    def does(self, i: Instruction) -> None:
        """Change the state as one instruction does."""
        runs: bool | None
        try:
            runs = self.truth(i.guard) if i.guard else True
        except _Unknown:
            runs = None
        if runs is False:
            return
        # A predicate may come before the register that is written, or behind it.
        outputs = i.operands[:2] if any(_PREDICATE.match(x) for x in i.operands[:2]) else i.operands[:1]
        known = _OPERATIONS.get(i.stem.removeprefix("U") if i.stem not in _OPERATIONS else i.stem)
        try:
            if known is None or runs is None:
                raise _Unknown
            known(self, i)
        except (_Unknown, IndexError, ValueError):
            for name in outputs:
                if _PREDICATE.match(name):
                    self.decide(name, None)
                else:
                    self.keep(name, None, _width(i))


def _words(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield offset and value of each word."""
    yield from zip(range(0, len(data), 4), struct.unpack(f"<{len(data) // 4}I", data), strict=True)


def _width(i: Instruction) -> int:
    """Return how many registers an instruction writes."""
    if i.stem in ("HMMA", "IMMA", "DMMA") or {"128", "4"} & set(i.parts):
        return 4
    pairs = {"64", "WIDE", "2", "F64"}
    return 2 if pairs & set(i.parts) or i.stem in ("CS2R", "DFMA", "DMUL", "DADD") or i.stem.endswith("2") else 1


def _signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def _split(i: Instruction) -> tuple[list[str], list[str], list[str]]:
    """Return predicates written, other operands after the output, and predicates read."""
    written, rest = [], list(i.operands[1:])
    while rest and _PREDICATE.match(rest[0]):
        written.append(rest.pop(0))
    read: list[str] = []
    while rest and _PREDICATE.match(rest[-1]):
        read.insert(0, rest.pop())
    return written, rest, read


def _add(w: Warp, i: Instruction) -> None:
    written, operands, read = _split(i)
    total = sum(w.word(x) for x in operands) + (sum(w.truth(x) for x in read) if "X" in i.parts else 0)
    w.keep(i.operands[0], total & _WORD)
    for name in written:
        w.decide(name, bool(total >> 32))


def _multiply_add(w: Warp, i: Instruction) -> None:
    out, a, b, c = i.operands[:4]
    if "WIDE" in i.parts or "HI" in i.parts:
        signed = "U32" not in i.parts
        x, y = (_signed(v) if signed else v for v in (w.word(a), w.word(b)))
        total = (x * y + w.pair(c)) & (1 << 64) - 1
        w.keep(out, total if "WIDE" in i.parts else total >> 32, 2 if "WIDE" in i.parts else 1)
        return
    carry = sum(w.truth(x) for x in i.operands[4:]) if "X" in i.parts else 0
    w.keep(out, (w.word(a) * w.word(b) + w.word(c) + carry) & _WORD)


def _lea(w: Warp, i: Instruction) -> None:
    written, operands, read = _split(i)
    if written or read or "X" in i.parts:
        raise _Unknown
    if "HI" in i.parts:
        a, b, c, shift = operands
        moved = (w.word(a) | w.word(c) << 32) >> 32 - w.word(shift)
    else:
        a, b, shift = operands
        moved = w.word(a) << w.word(shift)
    w.keep(i.operands[0], (moved + w.word(b)) & _WORD)


def _shift(w: Warp, i: Instruction) -> None:
    out, low, by, high = i.operands
    n = w.word(by)
    if "L" in i.parts and "U32" in i.parts:
        w.keep(out, w.word(low) << n & _WORD if n < 32 else 0)
    elif "HI" in i.parts and "R" in i.parts and low in ("RZ", "URZ"):
        x = w.word(high)
        w.keep(out, (_signed(x) if "S32" in i.parts else x) >> min(n, 31 if "S32" in i.parts else 32) & _WORD)
    else:
        raise _Unknown


def _logic(w: Warp, i: Instruction) -> None:
    operands = list(i.operands)
    predicate = operands.pop(0) if _PREDICATE.match(operands[0]) else None
    out, *rest = operands
    a, b, c, table = (w.word(x) for x in rest[:4])
    found = 0
    for k in range(8):
        if table >> k & 1:
            found |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    w.keep(out, found & _WORD)
    if predicate:
        w.decide(predicate, found & _WORD != 0)


def _predicate_logic(w: Warp, i: Instruction) -> None:
    out, other, *inputs, table, second = i.operands
    index = sum(w.truth(x) << 2 - k for k, x in enumerate(inputs[:3]))
    w.decide(out, bool(int(table, 0) >> index & 1))
    w.decide(other, bool(int(second, 0) >> index & 1))


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def _compare(w: Warp, i: Instruction) -> None:
    out, other, a, b, before, *lower = i.operands
    x, y = (v if "U32" in i.parts else _signed(v) for v in (w.word(a), w.word(b)))
    how, before_is = i.parts[1], w.truth(before)
    met = _COMPARE[how](x, y)
    if lower:  # the upper half of 64 bits; what the lower one says counts where these are equal
        met = w.truth(lower[0]) if x == y else met
    combine: Callable[[bool, bool], bool] = (lambda p, q: p or q) if "OR" in i.parts else (lambda p, q: p and q)
    w.decide(out, combine(met, before_is))
    w.decide(other, combine(not met, before_is))


def _load_constant(w: Warp, i: Instruction) -> None:
    out, operand = i.operands
    words = 4 if "128" in i.parts else 2 if "64" in i.parts else 1
    w.keep(out, sum(w.word(operand, k) << 32 * k for k in range(words)), words)


def _extend(w: Warp, i: Instruction) -> None:
    out, a, bits = i.operands
    n, x = w.word(bits), w.word(a) & (1 << w.word(bits)) - 1
    w.keep(out, x if "U32" in i.parts or not x >> n - 1 else (x - (1 << n)) & _WORD)


def _least(w: Warp, i: Instruction) -> None:
    out, a, b, lower = i.operands
    x, y = (v if "U32" in i.parts else _signed(v) for v in (w.word(a), w.word(b)))
    w.keep(out, (min if w.truth(lower) else max)(x, y) & _WORD)


def _halves(w: Warp, i: Instruction) -> None:
    """Handle the one use of a product of halves that is of interest here: to make a constant."""
    out, a, b, *numbers = i.operands
    if "RZ" not in a or "RZ" not in b:
        raise _Unknown
    high, low = (struct.unpack("<H", struct.pack("<e", float(x)))[0] for x in numbers)
    w.keep(out, high << 16 | low)


def _to_float(w: Warp, i: Instruction) -> None:
    out, a = i.operands
    x = w.word(a)
    if not {"U32", "RP"} & set(i.parts):
        x = _signed(x)
    bits: int = struct.unpack("<I", struct.pack("<f", float(x)))[0]
    w.keep(out, bits + ("RP" in i.parts and _float(bits) < x))


def _float(bits: int) -> float:
    x: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return x


def _reciprocal(w: Warp, i: Instruction) -> None:
    out, a = i.operands
    x = _float(w.word(a))
    if "RCP" not in i.parts or x == 0:
        raise _Unknown
    w.keep(out, struct.unpack("<I", struct.pack("<f", 1 / x))[0])


def _permute(w: Warp, i: Instruction) -> None:
    out, a, order, b = i.operands
    both, how = w.word(a) | w.word(b) << 32, w.word(order)
    w.keep(out, sum((both >> 8 * (how >> 4 * k & 7) & 255) << 8 * k for k in range(4)))


def _move_predicates(w: Warp, i: Instruction) -> None:
    out, _, old, mask = i.operands
    bits = w.word(mask)
    mine = sum(w.truth(f"P{k}") << k for k in range(7) if bits >> k & 1)
    w.keep(out, w.word(old) & ~bits & _WORD | mine)


def _restore_predicates(w: Warp, i: Instruction) -> None:
    _, a, mask = i.operands
    for k in range(7):
        if w.word(mask) >> k & 1:
            w.decide(f"P{k}", bool(w.word(a) >> k & 1))


def _same(w: Warp, i: Instruction) -> None:
    w.keep(i.operands[0], w.word(i.operands[1]))


_OPERATIONS: dict[str, Callable[[Warp, Instruction], None]] = {
    "IADD3": _add,
    "IADD": _add,
    "VIADD": _add,
    "IMAD": _multiply_add,
    "LEA": _lea,
    "SHF": _shift,
    "LOP3": _logic,
    "PLOP3": _predicate_logic,
    "ISETP": _compare,
    "SEL": lambda w, i: w.keep(i.operands[0], w.word(i.operands[1 if w.truth(i.operands[3]) else 2])),
    "LDC": _load_constant,
    "LDCU": _load_constant,
    "MOV": _same,
    "R2UR": _same,
    "S2R": _same,
    "S2UR": _same,
    "CS2R": lambda w, i: w.keep(i.operands[0], w.word(i.operands[1]), 1 if "32" in i.parts else 2),
    "IABS": lambda w, i: w.keep(i.operands[0], abs(_signed(w.word(i.operands[1])))),
    "SGXT": _extend,
    "IMNMX": _least,
    "VIMNMX": _least,
    "HFMA2": _halves,
    "I2F": _to_float,
    "I2FP": _to_float,
    "MUFU": _reciprocal,
    "F2I": lambda w, i: w.keep(i.operands[0], min(int(_float(w.word(i.operands[1]))), _WORD) & _WORD),
    "PRMT": _permute,
    "P2R": _move_predicates,
    "R2P": _restore_predicates,
    "SHFL": lambda w, i: w.keep(i.operands[1], w.word(i.operands[2])),
    "VOTEU": lambda w, i: w.decide(i.operands[0], w.truth(i.operands[1])),
    "ELECT": lambda w, i: w.decide(i.operands[0], True),
}


def walk(program: list[Instruction], warp: Warp) -> Walk:
    """Follow the first warp of a program from its entry to its exit.

    Raises:
        RuntimeError: it does not come to an end.
    """
    places = {x.address: k for k, x in enumerate(program)}
    executed: Counter[str] = Counter()
    path: list[int] = []
    calls: list[int] = []
    at = 0
    for _ in range(_MOST_STEPS):
        i = program[at]
        executed[i.name] += 1
        path.append(at)
        at += 1
        if i.stem == "EXIT":
            if _goes(warp, i.guard):
                return Walk(executed, path)
        elif i.stem in ("BRA", "CALL"):
            *conditions, target = i.operands
            there = places[int(target, 16)]
            # What is called is a case that approximate arithmetic does not cover, and seldom met.
            seldom = i.stem == "BRA" and any(x.stem == "CALL" for x in program[at:there])
            if all(_goes(warp, x, seldom) for x in (i.guard, *conditions)):
                calls += [at] * (i.stem == "CALL")
                at = there
        elif i.stem == "RET":
            at = calls.pop()
        else:
            warp.does(i)
    raise RuntimeError(f"no end after {_MOST_STEPS} instructions, allowed: kernels that end")


def _goes(warp: Warp, guard: str, otherwise: bool = False) -> bool:
    try:
        return warp.truth(guard) if guard else True
    except _Unknown:
        return otherwise
