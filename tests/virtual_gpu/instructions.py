"""PTX -> numbered instructions, as machine/ executes them. Every family of opcodes has its own function."""

import re

import numpy as np

from virtual_gpu.ptx import BYTES, HALVES, WIDE, Program, Reader, Unsupported

BITS = ("and", "or", "xor", "not", "shl", "shr", "bfe", "prmt", "lop3", "bfi", "popc", "clz", "shf", "selp")
FLOAT = (
    *("add", "sub", "mul", "mad", "fma", "min", "max", "neg", "abs", "div"),
    *("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh", "copysign"),
)
MATRIX = {"f16": 0, "bf16": 1, "tf32": 2}  # operands of the matrix units, as machine/ numbers them


def width_of(kind: str) -> int:
    """Bits of a register that holds such a number."""
    return 64 if kind in WIDE else 16 if kind in ("b16", "s16", "u16") else 1 if kind == "pred" else 32


class _Translator(Reader):
    def instruction(self, opcode: str, a: list[str]) -> None:
        parts = opcode.split(".")
        head, kind = parts[0], parts[-1]
        if kind in HALVES and head in ("add", "sub", "mul", "fma", "min", "max", "neg", "abs", "setp"):
            self.halves(head, parts, kind, a)
        elif kind == "f32" and head in FLOAT:
            self.float32(head, parts, a)
        elif head in BITS:
            self.bit_operation(head, parts, a)
        elif head in ("add", "sub", "min", "max", "neg", "abs", "div", "rem", "mul", "mad"):
            self.integer(head, parts, a)
        elif head == "setp":
            self.compare(parts, a)
        elif head == "mov":
            self.move(kind, width_of(kind), a)
        elif head == "cvt":
            self.convert(parts, a, int("ftz" in parts))
        elif head == "ld" and parts[1] == "param":
            self.parameter(kind, a)
        elif head in ("ld", "st"):
            self.memory(head, parts, a)
        elif head in ("atom", "red"):
            self.atomic(head, parts, a)
        elif head == "cp" and parts[1] == "async":
            self.copy(parts, a)
        elif head in ("ldmatrix", "stmatrix"):
            self.matrices(head, parts, a)
        elif head == "mma":
            self.mma(parts, a)
        elif head == "wgmma":
            self.wgmma(parts, a)
        elif head in ("shfl", "redux", "vote", "activemask"):
            self.warp(head, parts, a)
        else:
            self.control(opcode, parts, a)

    # ---- registers to registers
    def float32(self, head: str, parts: list[str], a: list[str]) -> None:
        if "sat" in parts or any(x in ("rz", "rm", "rp") for x in parts):
            raise Unsupported(self.text)
        name = {"mad": "fma"}.get(head, head) + ("_nan" if "NaN" in parts else "")
        self.simple(f"{name}_f32", a, 32, [32] * (len(a) - 1), int("ftz" in parts))

    def integer(self, head: str, parts: list[str], a: list[str]) -> None:
        kind = parts[-1]
        bits = width_of(kind)
        if kind[1:] not in ("16", "32", "64"):
            raise Unsupported(self.text)
        if head not in ("mul", "mad"):
            sign = kind[0] if head in ("min", "max", "div", "rem") else "s"
            self.simple(f"{head}_{sign}{kind[1:]}", a, bits, [bits] * (len(a) - 1))
        elif parts[1] == "lo":
            self.simple(f"{head}_lo_s{kind[1:]}", a, bits, [bits] * (len(a) - 1))
        elif parts[1] == "hi" and head == "mul":
            self.simple(f"mul_hi_{kind}", a, bits, [bits, bits])
        elif parts[1] == "wide":
            out = {"16": 32, "32": 64}[kind[1:]]
            self.simple(f"{head}_wide_{kind}", a, out, [bits, bits] + [out] * (head == "mad"))
        else:
            raise Unsupported(self.text)

    def bit_operation(self, head: str, parts: list[str], a: list[str]) -> None:
        kind = parts[-1]
        bits = width_of(kind)
        if head in ("and", "or", "xor", "not"):
            if kind == "pred" and head == "not":
                self.simple("setp_eq_u32", [*a, "0"], 1, [1, 1])
            elif kind == "pred":
                self.simple(f"{head}_b32", a, 1, [1, 1])
            else:
                self.simple(f"{head}_{kind}", a, bits, [bits] * (len(a) - 1))
        elif head in ("shl", "shr"):
            suffix = kind if head == "shl" else ("s" if kind[0] == "s" else "u") + kind[1:]
            self.simple(f"{head}_{suffix}", a, bits, [bits, 32])
        elif head == "bfe":
            self.simple(f"bfe_{kind}", a, 32, [32, 32, 32])
        elif head in ("prmt", "lop3", "bfi", "popc", "clz") and kind == "b32":
            self.simple(f"{head}_b32", a, 32, [32] * (len(a) - 1))
        elif head == "shf" and parts[2] == "wrap":
            self.simple(f"shf_{parts[1]}_wrap_b32", a, 32, [32, 32, 32])
        elif head == "selp":
            self.simple("selp_b64" if bits == 64 else "selp_b32", a, bits, [bits, bits, 1])
        else:
            raise Unsupported(self.text)

    def compare(self, parts: list[str], a: list[str]) -> None:
        kind, compare, ftz = parts[-1], parts[1], int("ftz" in parts)
        bits = width_of(kind)
        if len(parts) - ftz != 3 or "|" in a[0]:
            raise Unsupported(self.text)
        if kind == "f32":
            name = f"setp_{compare}_f32"
        elif compare in ("eq", "ne"):
            name = f"setp_{compare}_u{64 if bits == 64 else 32}"
        else:
            compare = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(compare, compare)
            name = f"setp_{compare}_{'u32' if kind == 'u16' else kind}"
        self.simple(name, a, 1, [bits, bits], ftz)

    def halves(self, head: str, parts: list[str], kind: str, a: list[str]) -> None:
        """Arithmetic in 16 bits, one or two numbers a register: in float32, then rounded once."""
        if "sat" in parts or "relu" in parts or "xorsign" in parts or (head == "setp" and len(parts) != 3):
            raise Unsupported(self.text)
        two, brain = kind.endswith("x2"), kind.startswith("bf16")
        sources = [self.src(x, 32 if two else 16) for x in a[1:]]
        if head == "setp":
            names = a[0].split("|")
            if len(names) != 1 + two:
                raise Unsupported(self.text)
            op = f"setp_{parts[1]}_f32"
        else:
            op = f"{head}{'_nan' if 'NaN' in parts else ''}_f32"
        results = []
        for high in range(1 + two):
            wide = []
            for source in sources:
                if high:
                    source, packed = self.new(32), source
                    self.emit("shr_u32", [source, packed, self.src("16")])
                wide.append(self.new(32))
                self.emit("cvt_f32_bf16" if brain else "cvt_f32_f16", [wide[-1], source])
            if head == "setp":
                self.emit(op, [self.dst(names[high], 1), *wide])
            else:
                results.append(self.new(32))
                self.emit(op, [results[-1], *wide])
        if head != "setp":
            name = "bf16" if brain else "f16"
            out = self.dst(a[0], 32 if two else 16)
            self.emit(f"cvt_rn_{name}x2_f32" if two else f"cvt_rn_{name}_f32", [out, *reversed(results)])

    def move(self, kind: str, bits: int, a: list[str]) -> None:
        if a[0].startswith("{"):
            names = self.listed(a[0])
            if len(names) != 2 or kind not in ("b32", "b64"):
                raise Unsupported(self.text)
            source, half = self.src(a[1], bits), bits // 2
            self.emit(f"unpack_{kind}", [self.dst(names[0], half), self.dst(names[1], half), source])
        elif a[1].startswith("{"):
            names = self.listed(a[1])
            if len(names) != 2 or kind not in ("b32", "b64"):
                raise Unsupported(self.text)
            sources = [self.src(x, bits // 2) for x in names]
            self.emit(f"pack_{kind}", [self.dst(a[0], bits), *sources])
        else:
            self.simple("mov_b64" if bits == 64 else "mov_b32", a, bits, [bits])

    def convert(self, parts: list[str], a: list[str], ftz: int) -> None:
        to, of = parts[-2], parts[-1]
        rounding = next((x for x in parts if x in ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")), "")
        if "sat" in parts or "relu" in parts or "satfinite" in parts:
            raise Unsupported(self.text)
        if of not in WIDE and self.is_register(a[1]) and self.bits(a[1]) == 64:  # the lower half of a wider register
            self.classes["narrowed"] = "b32"
            self.simple("cvt_u32_u64", ["narrowed", a[1]], 32, [64])
            a = [a[0], "narrowed"]
        if of == "f32" and to in ("bf16x2", "f16x2") and rounding == "rn":
            self.simple(f"cvt_rn_{to}_f32", a, 32, [32, 32])
        elif of == "f32" and to in ("bf16", "f16") and rounding == "rn":
            self.simple(f"cvt_rn_{to}_f32", a, 16, [32])
        elif of == "f32" and to == "tf32" and rounding == "rna":
            self.simple("cvt_rna_tf32_f32", a, 32, [32])
        elif to == "f32" and of in ("bf16", "f16"):
            self.simple(f"cvt_f32_{of}", a, 32, [16])
        elif to == of == "f32":
            self.simple(f"cvt_{rounding}_f32", a, 32, [32], ftz)
        elif to == "f32" and of in ("s32", "u32", "s64", "u64") and rounding == "rn":
            self.simple(f"cvt_f32_{of}", a, 32, [64 if of in WIDE else 32])
        elif of == "f32" and to in ("s32", "u32") and rounding == "rzi":
            self.simple(f"cvt_{to}_f32", a, 32, [32], ftz)
        elif to in ("s64", "u64") and of in ("s32", "u32", "s16", "u16"):
            self.simple(f"cvt_{of[0]}64_{of}", a, 64, [32])
        elif to in ("s32", "u32") and of in ("s64", "u64"):
            self.simple("cvt_u32_u64", a, 32, [64])
        elif to in ("s16", "u16") and of in ("s64", "u64"):
            self.simple("cvt_u16_u64", a, 16, [64])
        elif to in ("s32", "u32") and of in ("s16", "u16", "s8", "u8"):
            name = {"s16": "cvt_s32_s16", "u16": "cvt_u32_u16", "s8": "cvt_s32_s8", "u8": "cvt_u32_u8"}[of]
            self.simple(name, a, 32, [16 if self.bits(a[1]) == 16 else 32])
        elif to in ("s16", "u16") and of in ("s32", "u32"):
            self.simple("cvt_u16_u32", a, 16, [32])
        elif to in ("s16", "u16") and of == "u8":
            self.simple("cvt_u32_u8", a, 16, [16])
        else:
            raise Unsupported(self.text)

    # ---- memory
    def parameter(self, kind: str, a: list[str]) -> None:
        match = re.fullmatch(r"\[\s*(\w+)\s*(?:\+\s*0)?\s*\]", a[1])
        if not match or kind[1:] not in BYTES:
            raise Unsupported(self.text)
        size, offset = kind[1:], next(o for n, _, o in self.p.params if n == match.group(1))
        if self.bits(a[0]) != 64:
            self.emit(f"ld_param{size}", [self.dst(a[0], 32), offset])
        elif size in ("32", "64"):
            op = "ld_param64" if size == "64" else f"ld_param64_{'s' if kind[0] == 's' else 'u'}32"
            self.emit(op, [self.dst(a[0], 64), offset])
        else:
            raise Unsupported(self.text)

    def memory(self, head: str, parts: list[str], a: list[str]) -> None:
        space = next((x for x in parts if x in ("global", "shared", "local", "const")), None)
        if space in (None, "local", "const"):
            raise Unsupported(self.text)
        kind = parts[-1]
        vector = next((int(x[1:]) for x in parts if re.fullmatch(r"v\d", x)), 1)
        where, registers = (a[1], a[0]) if head == "ld" else (a[0], a[1])
        if len(a) > 2:
            raise Unsupported(self.text)  # a cache policy
        names = self.listed(registers)
        if len(names) != vector:
            raise Unsupported(self.text)
        base, offset = self.address(where, 64 if space == "global" else 32)
        known = [self.bits(x) for x in names if self.is_register(x)]
        wide = 64 if (64 in known if known else kind[1:] == "64") else 32
        use = self.dst if head == "ld" else self.src
        flags = int(wide == 64) | (2 if kind[0] == "s" else 0)
        if space == "shared" and kind[1:] == "8":
            self.p.byte_shared = True
        self.emit(f"{head}_{space}", [BYTES[kind[1:]], vector, flags, base, offset, *(use(x, wide) for x in names)])

    def atomic(self, head: str, parts: list[str], a: list[str]) -> None:
        operation = next((x for x in parts if x in ("add", "max", "min", "exch", "cas")), None)
        kinds = {
            ("add", "f32"): 0,
            ("add", "u32"): 1,
            ("add", "s32"): 1,
            ("max", "s32"): 2,
            ("min", "s32"): 3,
            ("exch", "b32"): 4,
            ("cas", "b32"): 5,
        }
        if "global" not in parts or (operation, parts[-1]) not in kinds:
            raise Unsupported(self.text)
        out = a.pop(0) if head == "atom" else None
        base, offset = self.address(a[0], 64)
        values = [self.src(x) for x in a[1:]]
        self.emit("atom_global", [kinds[operation, parts[-1]], self.dst(out) if out else -1, base, offset, *values, -1])

    def copy(self, parts: list[str], a: list[str]) -> None:
        if "bulk" in parts or "mbarrier" in parts:
            raise Unsupported(self.text)
        if "commit_group" in parts:
            self.emit("cp_async_commit", [])
        elif "wait_group" in parts:
            self.emit("cp_async_wait", [int(a[0], 0)])
        elif "wait_all" in parts:
            self.emit("cp_async_wait", [-1])
        else:
            if len(a) > 4:
                raise Unsupported(self.text)
            to, of = self.address(a[0], 32), self.address(a[1], 64)
            self.emit("cp_async", [int(a[2], 0), *to, *of, self.src(a[3]) if len(a) > 3 else -1])

    # ---- matrix units
    def matrices(self, head: str, parts: list[str], a: list[str]) -> None:
        registers, where = (a[0], a[1]) if head == "ldmatrix" else (a[1], a[0])
        count = next(int(x[1:]) for x in parts if re.fullmatch(r"x\d", x))
        names = self.listed(registers)
        if "m8n8" not in parts or parts[-1] != "b16" or len(names) != count:
            raise Unsupported(self.text)
        base, offset = self.address(where, 32)
        use = self.dst if head == "ldmatrix" else self.src
        self.emit(head, [count, int("trans" in parts), base, offset, *(use(x) for x in names)])

    def mma(self, parts: list[str], a: list[str]) -> None:
        types = parts[6:]
        m = re.fullmatch(r"m16n8k(\d+)", parts[3])
        if not m or parts[4:6] != ["row", "col"] or types[0] != "f32" or types[3] != "f32" or types[1] not in MATRIX:
            raise Unsupported(self.text)
        d, x, y, c = (self.listed(v) for v in a)
        later = [self.src(v) for v in (*x, *y, *c)]
        self.emit("mma", [MATRIX[types[1]], int(m.group(1)), *(self.dst(v) for v in d), *later])

    def wgmma(self, parts: list[str], a: list[str]) -> None:
        self.p.has_wgmma = True
        if parts[1] in ("fence", "commit_group", "wait_group"):
            name = {"fence": "wgmma_fence", "commit_group": "wgmma_commit", "wait_group": "wgmma_wait"}[parts[1]]
            self.emit(name, [int(a[0], 0)] if a else [])
            return
        m = re.fullmatch(r"m64n(\d+)k(\d+)", parts[4])
        if parts[1] != "mma_async" or not m or parts[5] != "f32" or parts[6] not in MATRIX or len(parts) > 8:
            raise Unsupported(self.text)
        d, in_registers = self.listed(a[0]), a[1].startswith("{")
        scale, rest = a[3], [int(x, 0) for x in a[4:]]
        if parts[6] == "tf32":
            rest += [0, 0]
        elif in_registers:
            rest.insert(2, 0)  # A lies in registers as it is read
        if len(rest) != 4:
            raise Unsupported(self.text)
        of_register = scale.startswith("%")
        keep = self.src(scale, 1) if of_register else int(scale, 0)
        first = [self.src(x) for x in self.listed(a[1])] if in_registers else [self.src(a[1], 64)]
        args = [int(m.group(1)), int(m.group(2)), MATRIX[parts[6]], int(in_registers), int(of_register), keep, *rest]
        self.emit("wgmma", [*args, *(self.dst(x) for x in d), *first, self.src(a[2], 64)])

    # ---- what a warp or a block does together
    def warp(self, head: str, parts: list[str], a: list[str]) -> None:
        if head == "shfl":
            names = a[0].split("|")
            values = [self.src(x) for x in a[1:5]]
            inside = self.dst(names[1], 1) if len(names) > 1 else -1
            self.emit(f"shfl_{parts[2]}", [self.dst(names[0]), inside, *values])
        elif head == "redux":
            suffix = "add" if parts[2] == "add" else f"{parts[2]}_{parts[-1][0]}"
            source = self.src(a[1])
            self.emit(f"redux_{suffix}", [self.dst(a[0]), source])
        elif head == "vote" and parts[2] in ("ballot", "any", "all"):
            source = self.src(a[1].lstrip("!"), 1)
            self.emit(f"vote_{parts[2]}", [self.dst(a[0]), source, int(a[1].startswith("!"))])
        elif head == "activemask":
            self.emit("activemask", [self.dst(a[0])])
        else:
            raise Unsupported(self.text)

    def control(self, opcode: str, parts: list[str], a: list[str]) -> None:
        head = parts[0]
        if opcode.startswith("fence.proxy.async"):
            self.emit("fence_proxy_async", [])
        elif opcode == "bar.warp.sync":
            self.emit("bar_warp_sync", [])
        elif head in ("fence", "membar", "prefetch", "discard"):
            self.emit("nop", [])
        elif opcode in ("bar.sync", "barrier.sync", "barrier.sync.aligned", "bar.cta.sync", "barrier.cta.sync.aligned"):
            if a[0] != "0" or (len(a) > 1 and int(a[1], 0) != self.p.threads):
                raise Unsupported(f"{self.text}: named barriers")
            self.emit("bar_sync", [])
        elif head == "bra":
            self.jumps.append((len(self.p.ops), a[0]))
            self.emit("bra", [0])
        elif head in ("ret", "exit"):
            self.emit("ret", [])
        elif head == "trap":
            self.emit("trap", [])
        else:
            raise Unsupported(opcode)


def translate(ptx: str) -> Program:
    return _Translator(ptx).run()


def arrays(program: Program, opcodes: dict[str, int]) -> dict[str, np.ndarray]:
    rows = []
    for (op, predicate, negated, flags), (start, _, reads, n_reads, writes, n_writes) in zip(
        program.ops, program.spans, strict=True
    ):
        if op not in opcodes:
            raise Unsupported(f"{op} is not in machine/opcodes.h")
        rows.append((opcodes[op], predicate, negated, start, 0, reads, n_reads, writes, n_writes, flags))
    return {"ins": np.array(rows, np.int32), "pool": np.array([*program.pool, 0], np.int64).astype(np.int32)}
