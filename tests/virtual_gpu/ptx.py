"""The text of PTX: its parameters, registers, labels and statements. What each instruction is: instructions.py.

What is not known is refused: `Unsupported` names the line and the opcode.
"""

import re
from dataclasses import dataclass, field


class Unsupported(Exception):
    """What the machine does not know, and would have to guess."""


# registers that say which thread it is, as machine/ numbers them
SPECIAL = {
    **{f"%tid.{c}": i for i, c in enumerate("xyz")},
    **{f"%ctaid.{c}": 3 + i for i, c in enumerate("xyz")},
    **{f"%nctaid.{c}": 6 + i for i, c in enumerate("xyz")},
    **{f"%ntid.{c}": 9 + i for i, c in enumerate("xyz")},
    "%laneid": 12,
    "%warpid": 13,
}
SMEM_BASE = 1024  # where a block's own shared memory begins; aligned as swizzled tiles need it
WIDE = {"b64", "s64", "u64", "f64"}
HALVES = ("f16", "bf16", "f16x2", "bf16x2")
BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


@dataclass
class Program:
    """A kernel as machine/ executes it. Registers have numbers: those of 64 bits apart from all others."""

    name: str
    ops: list = field(default_factory=list)  # (name, predicate or -1, negated, flags)
    pool: list = field(default_factory=list)
    spans: list = field(
        default_factory=list
    )  # of each op in the pool: start and number of operands, of reads, of writes
    lines: list = field(default_factory=list)  # (line of the PTX, text, place in the source)
    params: list = field(default_factory=list)  # (name, bytes, offset)
    n32: int = 0
    n64: int = 0
    const32: dict = field(default_factory=dict)  # value -> register
    const64: dict = field(default_factory=dict)
    special: dict = field(default_factory=dict)  # kind -> register
    has_wgmma: bool = False
    byte_shared: bool = False  # shared memory is accessed by bytes: a granule is one, otherwise two
    threads: int = 0  # of a block


def split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, part = [], 0, ""
    for c in text:
        depth += c in "[{("
        depth -= c in "]})"
        if c == "," and not depth:
            parts.append(part.strip())
            part = ""
        else:
            part += c
    return [*parts, part.strip()] if part.strip() else parts


class Reader:
    """Reads one kernel, and gives its operands numbers. `instruction` is for who knows the opcodes."""

    def __init__(self, ptx: str) -> None:
        self.p = Program(re.search(r"\.visible \.entry (\w+)", ptx).group(1))
        self.ptx = ptx
        self.regs: dict[str, tuple[int, int]] = {}  # name -> (bits, number)
        self.classes: dict[str, str] = {}  # prefix of registers -> their type
        self.place = ""  # in the kernel's source
        self.labels: dict[str, int] = {}
        self.jumps: list[tuple[int, str]] = []
        self.reads: list[int] = []  # of the instruction at hand
        self.writes: list[int] = []

    def new(self, bits: int) -> int:
        if bits == 64:
            self.p.n64 += 1
            return self.p.n64 - 1
        self.p.n32 += 1
        return self.p.n32 - 1

    def bits(self, name: str) -> int:
        if name in SPECIAL:
            return 32
        prefix = name if name in self.classes else re.sub(r"\d+$", "", name)
        kind = self.classes.get(prefix)
        if kind is None:
            raise Unsupported(f"register {name}")
        return 1 if kind == "pred" else int(kind[1:])

    def is_register(self, text: str) -> bool:
        return text.startswith("%") or text in self.classes

    def register(self, name: str, bits: int) -> int:
        if name == "_":
            return self.new(bits)
        have = self.bits(name)
        file = 64 if have == 64 else 32
        if file != (64 if bits == 64 else 32):
            raise Unsupported(f"{name} used as {bits} bits")
        if name in SPECIAL:
            kind = SPECIAL[name]
            if kind not in self.p.special:
                self.p.special[kind] = self.new(32)
            return self.p.special[kind]
        if name not in self.regs:
            self.regs[name] = (file, self.new(file))
        return self.regs[name][1]

    def src(self, text: str, bits: int = 32) -> int:
        """A register, or one that holds a constant."""
        if self.is_register(text):
            index = self.register(text, bits)
            if bits != 64:
                self.reads.append(index)
            return index
        value = self.number(text)
        if bits == 1:
            value = int(value != 0)
        value &= {16: 0xFFFF, 64: 0xFFFFFFFFFFFFFFFF}.get(bits, 0xFFFFFFFF)
        table = self.p.const64 if bits == 64 else self.p.const32
        if value not in table:
            table[value] = self.new(bits)
        return table[value]

    def number(self, text: str) -> int:
        if text == "global_smem":
            return SMEM_BASE
        if m := re.fullmatch(r"global_smem\s*\+\s*(-?\d+)", text):
            return SMEM_BASE + int(m.group(1))
        if text.startswith(("0f", "0F", "0d", "0D")):
            return int(text[2:], 16)
        try:
            return int(text.removesuffix("U"), 0)
        except ValueError:
            raise Unsupported(f"operand {text}") from None

    def dst(self, text: str, bits: int = 32) -> int:
        index = self.register(text, bits)
        if bits != 64:
            self.writes.append(index)
        return index

    def address(self, text: str, bits: int) -> tuple[int, int]:
        """Register of the base, and the offset."""
        m = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not m:
            raise Unsupported(f"address {text}")
        base, offset = m.group(1), int(m.group(2) or "0", 0)
        return self.src(base, bits), offset

    def listed(self, text: str) -> list[str]:
        """One register, or several in braces."""
        return [x.strip() for x in text.strip("{} ").split(",")] if text.startswith("{") else [text]

    def emit(self, op: str, args: list[int], flags: int = 0) -> None:
        p = self.p
        start = len(p.pool)
        p.pool += args
        reads = len(p.pool)
        p.pool += self.reads
        writes = len(p.pool)
        p.pool += self.writes
        p.spans.append((start, len(args), reads, len(self.reads), writes, len(self.writes)))
        p.ops.append((op, self.predicate[0], self.predicate[1], flags))
        p.lines.append((self.line_number, self.text, self.place))
        self.reads, self.writes = [], []

    def simple(self, op: str, a: list[str], out: int, ins: list[int], flags: int = 0) -> None:
        """One result of so many bits from operands of so many bits."""
        if len(a) != len(ins) + 1:
            raise Unsupported(f"{self.text} (operands)")
        args = [0, *(self.src(x, bits) for x, bits in zip(a[1:], ins, strict=True))]
        args[0] = self.dst(a[0], out)
        self.emit(op, args, flags)

    def instruction(self, opcode: str, operands: list[str]) -> None:
        raise NotImplementedError

    def run(self) -> Program:
        self.header()
        in_body = False
        for number, raw in enumerate(self.ptx.split("\n"), 1):
            self.line_number = number
            if raw.startswith("}"):
                break
            if in_body:
                self.line(raw.strip())
            in_body = in_body or raw.strip() == "{"
        for place, label in self.jumps:
            self.p.pool[self.p.spans[place][0]] = self.labels[label]
        return self.p

    def header(self) -> None:
        """Parameters, and how many threads a block has."""
        offset = 0
        for line in re.search(r"\.entry \w+\((.*?)\)", self.ptx, re.S).group(1).split(","):
            m = re.search(
                r"\.param\s+(?:\.align (\d+) )?\.(\w+)(?:\s+\.ptr.*?\.align \d+)?\s+(\w+)(\[\d+\])?\s*$", line.strip()
            )
            if not m or m.group(4):
                raise Unsupported(f"parameter {line.strip()}")
            size = BYTES[m.group(2)[1:]]
            offset = -(-offset // size) * size
            self.p.params.append((m.group(3), size, offset))
            offset += size
        if m := re.search(r"\.(?:reqntid|maxntid) (\d+)", self.ptx):
            self.p.threads = int(m.group(1))

    def line(self, line: str) -> None:
        if line.startswith(".loc"):
            if "//" in line:
                self.place = line.split("//")[1].strip().split(" ")[0]
            return
        line = line.split("//")[0].strip()
        if not line or line in "{}" or line.startswith((".pragma", ".file", ".section")):
            return
        if m := re.match(r"\.reg\s+\.(\w+)\s+(.*);", line):
            for name in m.group(2).split(","):
                self.classes[re.sub(r"<\d+>", "", name.strip())] = m.group(1)
            return
        if line.startswith("."):
            raise Unsupported(line)
        while m := re.match(r"([\w$]+):\s*", line):
            self.labels[m.group(1)] = len(self.p.ops)
            line = line[m.end() :]
        for statement in filter(None, map(str.strip, line.split(";"))):
            self.statement(statement)

    def statement(self, text: str) -> None:
        self.text, self.predicate = text, (-1, 0)
        if m := re.match(r"@(!?)([%\w]+)\s+", text):
            self.predicate = (self.register(m.group(2), 1), int(bool(m.group(1))))
            self.reads = [self.predicate[0]]
            text = text[m.end() :]
        head, _, rest = text.partition(" ") if "\t" not in text else text.partition("\t")
        opcode = head.strip()
        modifiers = ("L1", "L2", "volatile", "relaxed", "gpu", "cta", "sys", "nc", "weak", "acquire", "release")
        if opcode.startswith(("ld.", "st.", "cp.async")):
            opcode = ".".join(x for x in opcode.split(".") if not x.startswith(modifiers))
            opcode = opcode.replace("shared::cta", "shared")
        if opcode.startswith(("ldmatrix", "stmatrix")):
            opcode = opcode.replace("shared::cta", "shared")
        try:
            self.instruction(opcode, split(rest))
        except Unsupported as error:
            raise Unsupported(f"PTX line {self.line_number}: {error}") from None
        self.reads, self.writes = [], []
