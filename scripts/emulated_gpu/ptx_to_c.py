#!/usr/bin/env python3
"""Translates a kernel of PTX, and the functions that it calls, to C, one instruction a line.

    ptx_to_c.py MODULE.ptx KERNEL >kernel.c

Knows the instructions of candle's kernels and of ours; another one is an error. Registers become variables, branches `goto`.
"""

import re
import sys
from pathlib import Path

C_TYPES = {
    "pred": "int", "b8": "uint8_t", "u8": "uint8_t", "s8": "int8_t", "b16": "uint16_t", "u16": "uint16_t", "s16": "int16_t",
    "b32": "uint32_t", "u32": "uint32_t", "s32": "int32_t", "b64": "uint64_t", "u64": "uint64_t", "s64": "int64_t",
    "f32": "float", "f64": "double", "f16": "uint16_t", "bf16": "uint16_t", "f16x2": "uint32_t", "bf16x2": "uint32_t",
}  # fmt: skip
FLOATS = {"f32", "f64", "f16", "bf16"}
HALVES = {"f16", "bf16"}
SPECIAL = {f"%{name}.{axis}": f"t->{name}[{i}]" for name in ("tid", "ntid", "ctaid", "nctaid") for i, axis in enumerate("xyz")}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
NOT_ORDERED = {"equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">="}
SIMPLE = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}
NAME = r"[%$A-Za-z_][\w$.%]*"


class Unknown(Exception):
    pass


def size(kind: str) -> int:
    return 1 if kind == "pred" else int(re.search(r"\d+", kind)[0]) // 8 * (2 if kind.endswith("x2") else 1)


def c_name(name: str) -> str:
    return "v_" + re.sub(r"\W", "_", name)


class Function:
    """The translation of one `.entry` or `.func`."""

    def __init__(self, name: str, source: tuple[str, str, str], symbols: dict, shared: dict[str, tuple[int, int]]):
        results, params, body = source
        self.name, self.symbols = name, symbols
        self.lines: list[str] = []
        self.scopes: list[dict[str, str]] = [{}]  # types of registers
        self.shared = dict(shared)  # bytes and alignment of arrays in shared memory; -1 bytes: the launch sets them
        self.calls: set[str] = set()
        self.waits = False
        self.params = [self.declared(text) for text in params.split(",") if text.strip()]
        self.results = [self.declared(text) for text in results.split(",") if text.strip()]
        self.translate(body)

    @staticmethod
    def declared(text: str) -> tuple[str, int, int]:
        """Name, bytes and alignment of a parameter."""
        kind = re.search(r"\.([bufs]\d+)\b", text)[1]
        name, count = re.search(rf"({NAME})(?:\[(\d+)\])?\s*$", text.strip()).groups()
        align = re.search(r"\.align\s+(\d+)", text)
        return name, size(kind) * int(count or 1), int(align[1]) if align else size(kind)

    def emit(self, line: str) -> None:
        self.lines.append("    " + line)

    # ---- Operands.

    def kind_of(self, name: str) -> str | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def read(self, operand: str, kind: str) -> str:
        """An operand as C: floats of 16 bits as double, others in the C type of `kind`."""
        operand = operand.strip()
        if operand.startswith("!"):
            return f"!{self.read(operand[1:], kind)}"
        if operand in SPECIAL:
            return f"({C_TYPES[kind]}){SPECIAL[operand]}"
        if operand == "WARP_SZ":
            return "32"
        declared = self.kind_of(operand)
        if declared:
            name = c_name(operand)
            if kind in HALVES:
                return f"as_{kind}({name})"
            if kind in ("f32", "f64") and declared not in FLOATS:
                return f"as_{kind}({name})"
            if kind not in FLOATS and declared in ("f32", "f64"):
                return f"({C_TYPES[kind]})bits_{declared}({name})"
            return f"({C_TYPES[kind]}){name}"
        if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
            return f"as_f32(0x{match[1]}u)" if kind in FLOATS else f"({C_TYPES[kind]})0x{match[1]}u"
        if match := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", operand):
            return f"as_f64(0x{match[1]}ull)" if kind in FLOATS else f"({C_TYPES[kind]})0x{match[1]}ull"
        if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", operand):
            if operand == "-9223372036854775808":
                return "INT64_MIN"
            number = operand.rstrip("U") + ("ull" if kind.endswith("64") and not operand.startswith("-") else "")
            if kind in HALVES:
                return f"as_{kind}((uint16_t){number})"
            return f"({C_TYPES[kind]}){number}"
        if operand in self.shared:
            return f"({C_TYPES[kind]})SHARED_{c_name(operand)}"
        if operand in self.symbols:
            self.symbols[operand][1].add(self.name)
            return f"({C_TYPES[kind]})(uint64_t){c_name(operand)}"
        raise Unknown(f"operand {operand}")

    def write(self, operand: str, kind: str, value: str) -> None:
        operand = operand.strip()
        if operand == "_":
            return
        declared = self.kind_of(operand)
        if not declared:
            raise Unknown(f"register {operand}")
        if kind in HALVES:
            value = f"bits_{kind}({value})"
        elif kind in ("f32", "f64") and declared not in FLOATS:
            value = f"bits_{kind}({value})"
        elif kind not in FLOATS and declared in ("f32", "f64"):
            value = f"as_{declared}({value})"
        elif kind not in FLOATS | {"pred"}:
            value = f"({C_TYPES[kind]})({value})"
        self.emit(f"{c_name(operand)} = {value};")

    def address(self, operand: str, space: str, kind: str, write: bool, extra: int = 0) -> str:
        """A pointer to an operand in brackets."""
        base, offset = re.fullmatch(rf"\[({NAME}|\d+)(?:\+?(-?\d+))?\]", operand.replace(" ", "")).groups()
        at = int(offset or 0) + extra
        if space == "param":
            local = self.kind_of(base)
            where = c_name(base) if local == "bytes" else self.param(base)
            return f"({where} + {at})"
        value = self.read(base, "b64")
        if space == "shared":
            return f"shared(t, {value} + {at}, {size(kind)})"
        if space == "local" or base in self.symbols:
            return f"(void *)({value} + {at})"
        return f"{'global' if space == 'global' else 'generic'}({value} + {at}, {size(kind)}, {int(write)})"

    def param(self, name: str) -> str:
        offset = 0
        for param, size_, align in self.params:
            offset = -(-offset // align) * align
            if param == name:
                return f"(params + {offset})"
            offset += size_
        if any(name == result for result, _, _ in self.results):
            return "result"
        raise Unknown(f"parameter {name}")

    def load(self, pointer: str, kind: str) -> str:
        value = f"*({C_TYPES[kind]} *){pointer}"
        return f"as_{kind}({value})" if kind in HALVES else value

    # ---- Instructions.

    def translate(self, body: str) -> None:
        body = re.sub(r"//[^\n]*", "", body)
        self.emit_params()
        for token in re.findall(r"[{}]|[^;{}]*(?:\{[^{};]*\}[^;{}]*)*;|\$[\w]+:|[^;{}]+", self.split_labels(body)):
            text = " ".join(token.split()).rstrip(";").strip()
            if not text:
                continue
            try:
                self.statement(text)
            except (Unknown, KeyError, AttributeError, ValueError, IndexError) as error:
                sys.exit(f"{self.name}: `{text}` is not known: {error!r}")

    @staticmethod
    def split_labels(body: str) -> str:
        return re.sub(r"(\$[\w]+):", r";LABEL \1;", body)

    def emit_params(self) -> None:
        self.emit("(void)t; (void)params; (void)result;")
        self.emit("uint64_t carry = 0; (void)carry;")

    def statement(self, text: str) -> None:
        if text == "{":
            self.scopes.append({})
            self.emit("{")
        elif text == "}":
            self.scopes.pop()
            self.emit("}")
        elif text.startswith("LABEL "):
            self.emit(f"{c_name(text.split()[1])}:;")
        elif text.startswith("."):
            self.directive(text)
        else:
            guard = re.match(rf"@(!?)({NAME})\s+(.*)", text)
            if guard:
                self.emit(f"if ({guard[1]}{c_name(guard[2])}) {{")
                self.instruction(guard[3])
                self.emit("}")
            else:
                self.instruction(text)

    def directive(self, text: str) -> None:
        if match := re.match(r"\.reg\s*\.(\w+)\s+(.*)", text):
            for name in match[2].split(","):
                many = re.fullmatch(r"\s*(%\w+)<(\d+)>\s*", name)
                names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
                for name in names:
                    self.scopes[-1][name] = match[1]
                zero = ", ".join(f"{c_name(name)} = 0" for name in names)
                self.emit(f"{C_TYPES[match[1]]} {zero};")
        elif text.startswith((".local", ".param")):
            name, count, align = self.declared(text)
            self.scopes[-1][name] = "bytes" if text.startswith(".param") else "b64"
            if text.startswith(".param"):
                self.emit(f"_Alignas({align}) unsigned char {c_name(name)}[{count}];")
            else:
                self.emit(f"_Alignas({align}) unsigned char {c_name(name)}_bytes[{count}];")
                self.emit(f"uint64_t {c_name(name)} = (uint64_t){c_name(name)}_bytes;")
        elif text.startswith(".shared"):
            name, count, align = self.declared(text)
            self.shared[name] = (count, align)
        elif not text.startswith((".pragma", ".loc", ".file")):
            raise Unknown("directive")

    def instruction(self, text: str) -> None:
        if text.startswith("call"):
            return self.call(text)
        name, _, rest = text.partition(" ")
        op, *flags = name.split(".")
        operands = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", rest) if part.strip()]
        kinds = [flag for flag in flags if flag in C_TYPES]
        method = getattr(self, f"op_{op}", None)
        if method:
            method(flags, kinds, operands)
        elif op in SIMPLE:
            self.arithmetic(op, flags, kinds[-1], operands)
        else:
            raise Unknown("instruction")

    def arithmetic(self, op: str, flags: list[str], kind: str, operands: list[str]) -> None:
        a, b = (self.read(x, kind) for x in operands[1:3])
        if kind == "pred":
            sign = {"and": "&&", "or": "||", "xor": "!="}[op]
            return self.write(operands[0], kind, f"{a} {sign} {b}")
        value = f"{a} {SIMPLE[op]} {b}"
        if "cc" in flags:
            if op == "add":
                self.emit(f"carry = ((uint64_t){a} + {b}) >> 32;")
            else:
                self.emit(f"carry = ((uint64_t){a} - {b}) >> 63;")
        if kind == "f32" and "rz" in flags:
            value = f"to_zero((double){a} {SIMPLE[op]} (double){b})"
        self.write(operands[0], kind, value)

    def op_addc(self, flags, kinds, operands):
        a, b = (self.read(x, kinds[-1]) for x in operands[1:3])
        self.emit(f"carry += (uint64_t){a} + {b};")
        self.write(operands[0], kinds[-1], "carry")
        self.emit("carry = carry >> 32;" if "cc" in flags else "carry = 0;")

    def op_subc(self, flags, kinds, operands):
        a, b = (self.read(x, kinds[-1]) for x in operands[1:3])
        self.emit(f"carry = (uint64_t){a} - {b} - carry;")
        self.write(operands[0], kinds[-1], "carry")
        self.emit("carry = carry >> 63;" if "cc" in flags else "carry = 0;")

    def op_mov(self, flags, kinds, operands):
        kind, (to, of) = kinds[-1], operands
        if of.startswith("{"):
            parts = of[1:-1].split(",")
            half = f"b{size(kind) * 8 // len(parts)}"
            joined = " | ".join(
                f"({C_TYPES[kind]}){self.read(part, half)} << {i * size(half) * 8}" for i, part in enumerate(parts)
            )
            self.write(to, kind, joined)
        elif to.startswith("{"):
            parts = to[1:-1].split(",")
            half = f"b{size(kind) * 8 // len(parts)}"
            self.emit("{")
            self.emit(f"{C_TYPES[kind]} whole = {self.read(of, kind)};")
            for i, part in enumerate(parts):
                self.write(part, half, f"whole >> {i * size(half) * 8}")
            self.emit("}")
        elif kind == "pred" and re.fullmatch(r"-?\d+", of):
            self.write(to, kind, str(int(int(of) != 0)))
        else:
            self.write(to, kind, self.read(of, kind))

    def space(self, flags: list[str]) -> str:
        return next((flag for flag in flags if flag in ("param", "shared", "local", "const", "global")), "generic")

    def op_ld(self, flags, kinds, operands):
        kind, space = kinds[-1], self.space(flags)
        parts = operands[0][1:-1].split(",") if operands[0].startswith("{") else [operands[0]]
        for i, part in enumerate(parts):
            self.write(part, kind, self.load(self.address(operands[1], space, kind, False, i * size(kind)), kind))

    def op_st(self, flags, kinds, operands):
        kind, space = kinds[-1], self.space(flags)
        parts = operands[1][1:-1].split(",") if operands[1].startswith("{") else [operands[1]]
        for i, part in enumerate(parts):
            pointer = self.address(operands[0], space, kind, True, i * size(kind))
            self.emit(f"*({C_TYPES[kind]} *){pointer} = {self.read(part, kind)};")

    def op_cvta(self, flags, kinds, operands):
        # Addresses in shared memory are offsets, all others are the host's.
        base = f" {'-' if 'to' in flags else '+'} (uint64_t)t->shared" if "shared" in flags else ""
        self.write(operands[0], "b64", self.read(operands[1], "b64") + base)

    def op_mul(self, flags, kinds, operands):
        kind = kinds[-1]
        self.product(flags, kind, operands[0], operands[1:3], "")

    def op_mad(self, flags, kinds, operands, carry=False):
        kind = kinds[-1]
        to = kind[0] + str(2 * int(kind[1:])) if "wide" in flags else kind
        self.product(flags, kind, operands[0], operands[1:3], self.read(operands[3], to), carry)

    def op_madc(self, flags, kinds, operands):
        self.op_mad(flags, kinds, operands, carry=True)

    def product(self, flags, kind, to, factors, added, carry=False):
        a, b = (self.read(x, kind) for x in factors)
        if kind in FLOATS:
            return self.write(to, kind, f"{a} * {b}")
        wide = {8: "__int128" if kind[0] == "s" else "unsigned __int128"}.get(
            size(kind), "int64_t" if kind[0] == "s" else "uint64_t"
        )
        value = f"({wide}){a} * {b}"
        if "hi" in flags:
            value = f"(({value}) >> {size(kind) * 8})"
        if "cc" in flags or carry:
            # Only of 32 bits, in sums of many words.
            self.emit(f"carry = (uint64_t)(uint32_t)({value}) + {added}{' + carry' if carry else ''};")
            self.write(to, kind, "carry")
            return self.emit("carry = carry >> 32;" if "cc" in flags else "carry = 0;")
        if added:
            value += f" + {added}"
        if "wide" in flags:
            kind = kind[0] + str(2 * int(kind[1:]))
        self.write(to, kind, value)

    def op_fma(self, flags, kinds, operands):
        kind = kinds[-1]
        if kind == "bf16x2":
            # Two products of halves of words.
            self.emit("{")
            for i in range(2):
                half = lambda x, i=i: f"as_bf16({self.read(x, 'b32')} >> {16 * i})"  # noqa: E731
                a, b, c = (half(x) for x in operands[1:4])
                self.emit(f"uint32_t part{i} = bits_bf16({a} * {b} + {c});")
            self.write(operands[0], "b32", "part0 | part1 << 16")
            return self.emit("}")
        a, b, c = (self.read(x, kind) for x in operands[1:4])
        rounding = {"rm": "down", "rp": "up", "rz": "to_zero"}
        rounded = next((rounding[flag] for flag in flags if flag in rounding), None)
        if kind == "f32" and rounded:
            value = f"{rounded}((double){a} * {b} + {c})"
        else:
            value = f"fmaf({a}, {b}, {c})" if kind == "f32" else f"fma({a}, {b}, {c})"
        self.write(operands[0], kind, value)

    def op_div(self, flags, kinds, operands):
        kind = kinds[-1]
        a, b = (self.read(x, kind) for x in operands[1:3])
        if kind in FLOATS:
            self.write(operands[0], kind, f"{a} / {b}")
        else:
            self.write(operands[0], kind, f"{b} == 0 ? ({C_TYPES[kind]})-1 : {a} / {b}")

    def op_rem(self, flags, kinds, operands):
        a, b = (self.read(x, kinds[-1]) for x in operands[1:3])
        self.write(operands[0], kinds[-1], f"{b} == 0 ? ({C_TYPES[kinds[-1]]})-1 : {a} % {b}")

    def extreme(self, kind, operands, sign, of_floats):
        a, b = (self.read(x, kind) for x in operands[1:3])
        self.write(operands[0], kind, f"{of_floats}({a}, {b})" if kind in FLOATS else f"{a} {sign} {b} ? {a} : {b}")

    def op_min(self, flags, kinds, operands):
        self.extreme(kinds[-1], operands, "<", "fmin")

    def op_max(self, flags, kinds, operands):
        self.extreme(kinds[-1], operands, ">", "fmax")

    def unary(self, kind, operands, value):
        self.write(operands[0], kind, value.format(self.read(operands[1], kind)))

    def op_neg(self, flags, kinds, operands):
        self.unary(kinds[-1], operands, "-{}")

    def op_not(self, flags, kinds, operands):
        self.unary(kinds[-1], operands, "!{}" if kinds[-1] == "pred" else "~{}")

    def op_abs(self, flags, kinds, operands):
        self.unary(kinds[-1], operands, "fabs({})" if kinds[-1] in FLOATS else "llabs({})")

    def op_sqrt(self, flags, kinds, operands):
        self.unary(kinds[-1], operands, "sqrtf({})" if kinds[-1] == "f32" else "sqrt({})")

    def op_rsqrt(self, flags, kinds, operands):
        self.unary(kinds[-1], operands, "1 / sqrt({})")

    def op_rcp(self, flags, kinds, operands):
        self.unary(kinds[-1], operands, "1 / {}")

    def op_ex2(self, flags, kinds, operands):
        self.unary(kinds[-1], operands, "exp2({})")

    def op_lg2(self, flags, kinds, operands):
        self.unary(kinds[-1], operands, "log2({})")

    def op_sin(self, flags, kinds, operands):
        self.unary(kinds[-1], operands, "sin({})")

    def op_cos(self, flags, kinds, operands):
        self.unary(kinds[-1], operands, "cos({})")

    def op_tanh(self, flags, kinds, operands):
        self.unary(kinds[-1], operands, "tanh({})")

    def op_copysign(self, flags, kinds, operands):
        sign, magnitude = (self.read(x, kinds[-1]) for x in operands[1:3])
        self.write(operands[0], kinds[-1], f"copysign({magnitude}, {sign})")

    def op_shl(self, flags, kinds, operands):
        self.shift(kinds[-1], operands, "<<")

    def op_shr(self, flags, kinds, operands):
        self.shift(kinds[-1], operands, ">>")

    def shift(self, kind, operands, sign):
        a, b, bits = self.read(operands[1], kind), self.read(operands[2], "b32"), size(kind) * 8
        filled = f"{a} >> {bits - 1}" if kind[0] == "s" else "0"
        self.write(operands[0], kind, f"{b} >= {bits} ? {filled} : {a} {sign} {b}")

    def comparison(self, how, kind, a, b):
        a, b = self.read(a, kind), self.read(b, kind)
        if how == "num":
            return f"({a} == {a} && {b} == {b})"
        if how == "nan":
            return f"({a} != {a} || {b} != {b})"
        if how == "ne" and kind in FLOATS:
            return f"({a} < {b} || {a} > {b})"
        if how in NOT_ORDERED:
            return f"({a} != {a} || {b} != {b} || {a} {NOT_ORDERED[how]} {b})"
        return f"({a} {COMPARE[how]} {b})"

    def op_setp(self, flags, kinds, operands):
        value = self.comparison(flags[0], kinds[-1], operands[1], operands[2])
        joined = {"and": "&&", "or": "||", "xor": "!="}.get(flags[1])
        if joined:
            value = f"{value} {joined} {self.read(operands[3], 'pred')}"
        if "|" in operands[0]:
            raise Unknown("two results")
        self.write(operands[0], "pred", value)

    def op_set(self, flags, kinds, operands):
        to, of = kinds
        value = self.comparison(flags[0], of, operands[1], operands[2])
        self.write(operands[0], to, f"({value} ? 1.0 : 0.0)" if to in FLOATS else f"({value} ? -1 : 0)")

    def op_selp(self, flags, kinds, operands):
        a, b, p = self.read(operands[1], kinds[-1]), self.read(operands[2], kinds[-1]), self.read(operands[3], "pred")
        self.write(operands[0], kinds[-1], f"{p} ? {a} : {b}")

    def op_cvt(self, flags, kinds, operands):
        to, of = kinds
        value = self.read(operands[1], of)
        if to not in FLOATS and of in FLOATS:
            whole = {"rzi": "trunc", "rni": "nearbyint", "rmi": "floor", "rpi": "ceil"}
            rounded = f"{next(whole[flag] for flag in flags if flag in whole)}((double){value})"
            bits = size(to) * 8
            if to[0] == "s":
                low, high = f"-0x1p{bits - 1}", f"0x1p{bits - 1}"
                value = f"clamp_signed({rounded}, {low}, {high}, INT{bits}_MIN, INT{bits}_MAX)"
            else:
                value = f"clamp_unsigned({rounded}, 0x1p{bits}, UINT{bits}_MAX)"
        elif to in FLOATS and of in FLOATS:
            whole = {"rzi": "trunc", "rni": "nearbyint", "rmi": "floor", "rpi": "ceil"}
            rounding = next((whole[flag] for flag in flags if flag in whole), None)
            if rounding:
                value = f"{rounding}((double){value})"
            if "sat" in flags:
                value = f"saturate({value})"
        elif to in FLOATS:
            rounding = {"rm": "down", "rp": "up", "rz": "to_zero"}
            rounded = next((rounding[flag] for flag in flags if flag in rounding), None)
            if rounded and to == "f32":
                value = f"{rounded}((double){value})"
            elif to == "f32":
                value = f"(float){value}"
            else:
                value = f"(double){value}"
        self.write(operands[0], to, value)

    def op_bra(self, flags, kinds, operands):
        self.emit(f"goto {c_name(operands[0])};")

    def op_ret(self, flags, kinds, operands):
        self.emit("return;")

    op_exit = op_ret

    def op_trap(self, flags, kinds, operands):
        self.emit('services.fail("a trap");')

    def op_bar(self, flags, kinds, operands):
        if flags[:1] != ["sync"] or operands[1:]:
            raise Unknown("barrier")
        self.waits = True
        self.emit("services.barrier(t);")

    def op_shfl(self, flags, kinds, operands):
        self.waits = True
        mode = {"bfly": "b", "down": "d", "up": "u", "idx": "i"}[flags[1]]
        value, lane, clamp = (self.read(x, "b32") for x in operands[1:4])
        value = f"services.shuffle(t, {value}, {lane}, {clamp}, '{mode}')"
        to, *valid = operands[0].split("|")
        self.write(to, "b32", value)
        if valid:
            self.write(valid[0], "pred", "1")

    def op_vote(self, flags, kinds, operands):
        self.waits = True
        if "ballot" not in flags:
            raise Unknown("vote")
        self.write(operands[0], "b32", f"services.ballot(t, {self.read(operands[1], 'pred')})")

    def op_atom(self, flags, kinds, operands):
        kind = kinds[-1]
        pointer = f"({C_TYPES[kind]} *){self.address(operands[1], self.space(flags), kind, True)}"
        self.emit("{")
        self.emit(f"{C_TYPES[kind]} *at = {pointer};")
        value = self.read(operands[2], kind)
        if "cas" in flags:
            new = f"*at == {value} ? {self.read(operands[3], kind)} : *at"
        elif "add" in flags:
            new = f"*at + {value}"
        elif "exch" in flags:
            new = value
        elif "max" in flags or "min" in flags:
            new = f"*at {'>' if 'max' in flags else '<'} {value} ? *at : {value}"
        else:
            raise Unknown("atomic operation")
        self.write(operands[0], kind, f"ATOMIC({C_TYPES[kind]}, at, {new})")
        self.emit("}")

    def op_red(self, flags, kinds, operands):
        self.scopes[-1].setdefault("nowhere", kinds[-1])
        self.emit("{")
        self.emit(f"{C_TYPES[kinds[-1]]} {c_name('nowhere')}; (void){c_name('nowhere')};")
        self.op_atom(flags, kinds, ["nowhere", *operands])
        self.emit("}")

    def op_bfi(self, flags, kinds, operands):
        kind = kinds[-1]
        part, into = self.read(operands[1], kind), self.read(operands[2], kind)
        at, bits = self.read(operands[3], "b32"), self.read(operands[4], "b32")
        mask = f"((({C_TYPES[kind]})1 << {bits}) - 1) << {at}"
        self.write(operands[0], kind, f"({into} & ~({mask})) | ({part} << {at} & {mask})")

    def op_brev(self, flags, kinds, operands):
        x = self.read(operands[1], "b32")
        self.write(operands[0], "b32", f"({{ uint32_t x_ = {x}, y_ = 0; for (int i = 0; i < 32; i++) y_ |= (x_ >> i & 1) << (31 - i); y_; }})")

    def op_bfind(self, flags, kinds, operands):
        if "shiftamt" not in flags or kinds[-1] != "u32":
            raise Unknown("bfind")
        x = self.read(operands[1], "b32")
        self.write(operands[0], "b32", f"{x} == 0 ? (uint32_t)-1 : (uint32_t)__builtin_clz({x})")

    def op_clz(self, flags, kinds, operands):
        x, bits = self.read(operands[1], kinds[-1]), size(kinds[-1]) * 8
        self.write(operands[0], "b32", f"{x} == 0 ? {bits} : __builtin_clz{'ll' if bits == 64 else ''}({x})")

    def op_popc(self, flags, kinds, operands):
        self.write(operands[0], "b32", f"__builtin_popcountll({self.read(operands[1], kinds[-1])})")

    def op_membar(self, flags, kinds, operands):
        pass

    op_fence = op_membar

    def call(self, text: str) -> None:
        match = re.fullmatch(rf"call(?:\.uni)?\s*(?:\(\s*({NAME})\s*\),\s*)?({NAME})\s*,?\s*(?:\(([^)]*)\))?", text)
        result, name, given = match.groups()
        if name == "__assertfail":
            return self.emit('services.fail("an assertion of the kernel");')
        self.calls.add(name)
        self.emit("{")
        self.emit("_Alignas(16) unsigned char given[256];")
        params = [part.strip() for part in (given or "").split(",") if part.strip()]
        for i, param in enumerate(params):
            self.emit(f"memcpy(given + CALL_{c_name(name)}_{i}, {c_name(param)}, sizeof {c_name(param)});")
        self.emit(f"f_{c_name(name)}(t, given, {c_name(result) if result else 'NULL'});")
        self.emit("}")


FUNCTION = re.compile(
    rf"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\s+(?:\(([^)]*)\)\s*)?({NAME})\s*\(([^)]*)\)[^{{;]*(\{{|;)", re.S
)


def functions(module: str) -> dict[str, tuple[str, str, str]]:
    """Results, parameters and body of each function of a module."""
    found = {}
    for match in FUNCTION.finditer(module):
        if match[5] == ";":
            continue
        depth, end = 1, match.end()
        for brace in re.compile(r"[{}]").finditer(module, end):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                found[match[3]] = (match[2] or "", match[4], module[end : brace.start()])
                break
    return found


def offsets(params: list[tuple[str, int, int]]) -> list[tuple[int, int]]:
    at, found = 0, []
    for _, bytes_, align in params:
        at = -(-at // align) * align
        found.append((at, bytes_))
        at += bytes_
    return found


def translation(module: str, kernel: str, bodies: dict[str, tuple[str, str, str]]) -> str:
    """C of a kernel, from a module and its functions."""
    # Constant tables, and who uses them.
    tables = re.findall(rf"\.(?:global|const)\s+\.align\s+(\d+)\s+\.b8\s+({NAME})\[(\d+)\]\s*(?:=\s*\{{([^}}]*)\}})?;", module)
    symbols = {name: ((align, count, values), set()) for align, name, count, values in tables}
    translated: dict[str, Function] = {}
    # Arrays that several functions share, or that get their size from the launch.
    arrays = re.findall(rf"^(?:\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.b8\s+({NAME})\[(\d*)\];", module, re.M)
    shared = {name: (int(count or -1), int(align)) for align, name, count in arrays}

    def translate(name: str) -> None:
        if name not in translated:
            translated[name] = Function(name, bodies[name], symbols, shared)
            for called in sorted(translated[name].calls):
                translate(called)

    translate(kernel)
    lines = ['#include "thread.h"', "#include <stdlib.h>"]
    for name, ((align, count, values), users) in symbols.items():
        if users & set(translated):
            lines.append(f"static _Alignas({align}) unsigned char {c_name(name)}[{count}] = {{{values}}};")
    placed: dict[str, tuple[int, int]] = {}
    for function in translated.values():
        placed |= function.shared
    at = 0
    for name, (bytes_, align) in sorted(placed.items(), key=lambda item: item[1][0] < 0):
        # Arrays of a size that the launch sets lie behind the others.
        at = -(-at // max(align, 16)) * max(align, 16)
        lines.append(f"enum {{ SHARED_{c_name(name)} = {at} }};")
        at += max(bytes_, 0)
    for function in translated.values():
        for i, (offset, _) in enumerate(offsets(function.params)):
            lines.append(f"enum {{ CALL_{c_name(function.name)}_{i} = {offset} }};")
        lines.append(f"{signature(function)};")
    for function in translated.values():
        lines += ["", f"{signature(function)} {{", *function.lines, "}"]
    layout = offsets(translated[kernel].params)
    lines += [
        "",
        f"static void run(struct gpu_thread *t) {{ f_{c_name(kernel)}(t, t->params, NULL); }}",
        "static const uint32_t layout[][2] = {" + ", ".join(f"{{{a}, {b}}}" for a, b in [*layout, (0, 0)]) + "};",
        f"struct gpu_kernel kernel = {{\"{kernel}\", run, layout, {len(layout)}, {sum(layout[-1]) if layout else 0}, "
        f"{at}, {int(any(function.waits for function in translated.values()))}, &services}};",
    ]
    return "\n".join(lines)


def signature(function: Function) -> str:
    return f"static void f_{c_name(function.name)}(struct gpu_thread *t, const unsigned char *params, unsigned char *result)"


def main() -> None:
    module, kernel = Path(sys.argv[1]).read_text(), sys.argv[2]
    bodies = functions(module)
    if kernel not in bodies:
        sys.exit(f"the module has no kernel {kernel}")
    print(translation(module, kernel, bodies))


if __name__ == "__main__":
    main()
