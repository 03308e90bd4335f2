"""The instructions of PTX that the machine knows: for each opcode a handler, which emits its lines of Python.

The lines call NumPy, functions of `arithmetic` (A) and methods of the machine (M). A handler refuses (`Emitter.fail`,
or a KeyError) every form and modifier whose meaning it does not implement.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

from smca_kernels.testing.machine import arithmetic
from smca_kernels.testing.machine.emitter import TYPES, Emitter
from smca_kernels.testing.machine.ptx import Address, Blank, Immediate, Operand, Pair, Register, Special, Vector

Handler: TypeAlias = Callable[[Emitter], None]
HANDLERS: dict[str, Handler] = {}
BYTES = {
    "b8": 1, "u8": 1, "b16": 2, "u16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8,
}  # fmt: skip
# Instructions that only move bits move them as these.
BITS_OF_TYPE = {
    "f16": "b16", "u16": "b16", "s16": "b16", "f32": "b32", "s32": "b32", "u32": "b32", "f64": "b64", "s64": "b64",
    "u64": "b64",
}  # fmt: skip


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def call(e: Emitter, function: str, type_: str, to: str | None = None, more: str = "") -> None:
    """Emit function(operands as `type_` …, result as `to`)."""
    sources = [e.source(operand, type_) for operand in e.operands[1:]]
    e.add(f"{function}({', '.join(sources)}, {e.destination(e.operands[0], to or type_)}{more})")


# --- moves ---


@handles("mov")
def _mov(e: Emitter) -> None:
    to, a = e.operands
    type_ = BITS_OF_TYPE.get(e.type, e.type)
    if isinstance(a, Vector):  # two halves make one; their class is another, so that neither is the destination
        whole, half = {"r": ("b32", "b16"), "d": ("b64", "b32")}[e.register(to).cls]
        low, high = (e.source(item, half) for item in e.items(a, 2))
        row = e.destination(to, whole)[:-1]
        e.add(f"copyto({row}l, {low})")
        e.add(f"copyto({row}h, {high})")
    elif isinstance(to, Vector):
        half = {"r": "b16", "d": "b32"}[e.register(a).cls]
        for item, part in zip(e.items(to, 2), "lh", strict=True):
            if not isinstance(item, Blank):
                e.add(f"copyto({e.destination(item, half)}, {e.name(a)}{part})")
    elif isinstance(a, Special):
        name = e.program.specials.setdefault(a.name, "S_" + re.sub(r"\W", "_", a.name))
        e.add(f"copyto({e.destination(to, 'u32')}, {name})")
    else:
        if isinstance(a, Immediate) and a.is_float == "f" and type_ == "b32":
            a = Immediate(a.bits)
        e.add(f"copyto({e.destination(to, type_)}, {e.source(a, type_)})")


@handles("selp")
def _selp(e: Emitter) -> None:
    type_ = BITS_OF_TYPE.get(e.type, e.type)
    to, *choices, p = e.operands
    bits = [Immediate(o.bits) if isinstance(o, Immediate) and o.is_float == "f" else o for o in choices]
    a, b = (e.source(operand, type_) for operand in bits)
    e.add(f"copyto({e.destination(to, type_)}, where({e.source(p, 'pred')}, {a}, {b}))")


@handles("cvta")
def _cvta(e: Emitter) -> None:
    if e.opcode not in ("cvta.to.global.u64", "cvta.global.u64"):
        e.fail()
    e.add(f"copyto({e.destination(e.operands[0], 'u64')}, {e.source(e.operands[1], 'u64')})")


# --- arithmetic ---

INTEGERS = ("s16", "u16", "s32", "u32", "s64", "u64")


@handles("add", "sub")
def _add(e: Emitter) -> None:
    e.allow(*(["rn"] if e.type == "f32" else []))
    if e.type not in (*INTEGERS, "f32"):
        e.fail()
    call(e, {"add": "add", "sub": "subtract"}[e.parts[0]], e.type)


WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
DTYPES = {"s32": "int32", "u32": "uint32", "s64": "int64", "u64": "uint64"}


@handles("mul")
def _mul(e: Emitter) -> None:
    if e.type == "f32":
        e.allow("rn")
        call(e, "multiply", e.type)
    elif e.parts[1:-1] == ["lo"] and e.type in INTEGERS:
        call(e, "multiply", e.type)
    elif e.parts[1:-1] == ["wide"]:
        call(e, "multiply", e.type, WIDER[e.type], f", dtype={DTYPES[WIDER[e.type]]}")
    elif e.parts[1:-1] == ["hi"] and e.type in ("s32", "u32"):
        call(e, f"A.mul_hi_{e.type}", e.type)
    else:
        e.fail()


@handles("mad")
def _mad(e: Emitter) -> None:
    to, a, b, c = e.operands
    if e.parts[1:-1] == ["lo"] and e.type in ("s32", "u32", "s64", "u64"):
        wide = e.type
    elif e.parts[1:-1] == ["wide"] and e.type in ("s32", "u32"):
        wide = WIDER[e.type]
    else:
        e.fail()
    cls, view = TYPES[wide]
    product = e.temporary(cls) + view
    e.add(f"multiply({e.source(a, e.type)}, {e.source(b, e.type)}, {product}, dtype={DTYPES[wide]})")
    e.add(f"add({product}, {e.source(c, wide)}, {e.destination(to, wide)})")


# Whole opcodes: function, and the type of the result where it is another.
FUNCTIONS = {
    "fma.rn.f32": "A.fma32", "fma.rn.ftz.f32": "A.fma32_ftz", "div.full.f32": "A.div32_full", "div.rn.f32": "A.div32",
    "div.approx.f32": "A.div32_full",
    "min.f32": "A.min32", "max.f32": "A.max32", "neg.f32": "negative", "abs.f32": "absolute",
    "rcp.rn.f32": "A.rcp_rn", "sqrt.rn.f32": "A.sqrt_rn", "prmt.b32": "A.prmt", "brev.b32": "A.brev",
    "popc.b32": "A.popc", "clz.b32": "A.clz", "not.pred": "logical_not",
}  # fmt: skip
FUNCTIONS |= {
    f"{name}.approx{flush}.f32": f"A.{name}{flush.replace('.', '_')}"
    for name in ("ex2", "lg2", "rcp", "sqrt", "rsqrt") for flush in ("", ".ftz")
}  # fmt: skip
FUNCTIONS |= {
    f"{name}.{type_}": f"A.{name}_{'signed' if type_[0] == 's' else 'unsigned'}"
    for name in ("div", "rem") for type_ in ("s32", "u32", "s64", "u64")
}  # fmt: skip
FUNCTIONS |= {
    f"{name}.{type_}": function
    for name, function in {"min": "minimum", "max": "maximum", "neg": "negative", "abs": "absolute"}.items()
    for type_ in ("s32", "s64", *(("u32", "u64") if name in ("min", "max") else ()))
}  # fmt: skip
FUNCTIONS |= {f"{name}.pred": f"logical_{name}" for name in ("and", "or", "xor")}
FUNCTIONS |= {
    f"{name}.{type_}": "invert" if name == "not" else f"bitwise_{name}"
    for name in ("and", "or", "xor", "not") for type_ in ("b16", "b32", "b64")
}  # fmt: skip
SIGN_BITS = dict.fromkeys(("f16", "bf16"), ("b16", 0x8000)) | dict.fromkeys(("f16x2", "bf16x2"), ("b32", 0x80008000))


@handles("abs", "neg")
def _sign(e: Emitter) -> None:
    if e.type in SIGN_BITS:
        e.allow()
        type_, signs = SIGN_BITS[e.type]
        function, bits = ("bitwise_and", ~signs) if e.parts[0] == "abs" else ("bitwise_xor", signs)
        e.operands = [*e.operands, Immediate(bits)]
        call(e, function, type_)
    else:
        _function(e)


@handles(
    "and", "brev", "clz", "div", "ex2", "fma", "lg2", "max", "min", "not", "or", "popc", "prmt", "rcp", "rem", "rsqrt",
    "sqrt", "xor",
)  # fmt: skip
def _function(e: Emitter) -> None:
    call(e, FUNCTIONS[e.opcode], e.type)


@handles("shl", "shr")
def _shift(e: Emitter) -> None:
    e.allow()
    to, a, b = e.operands
    amount = e.source(b, "s32" if e.type[0] == "s" else "u32")
    function = "left_shift" if e.parts[0] == "shl" else "right_shift"
    e.add(f"{function}({e.source(a, e.type)}, {amount}, {e.destination(to, e.type)})")


@handles("bfe", "bfi")
def _bit_field(e: Emitter) -> None:
    if e.opcode not in ("bfe.u32", "bfe.s32", "bfi.b32"):
        e.fail()
    to, *values, position, length = e.operands
    sources = [e.source(value, e.type) for value in values] + [e.source(o, "u32") for o in (position, length)]
    e.add(f"A.{e.parts[0]}_{e.type}({', '.join(sources)}, {e.destination(to, e.type)})")


@handles("lop3")
def _lop3(e: Emitter) -> None:
    if e.opcode != "lop3.b32":
        e.fail()
    to, *inputs, table = e.operands
    sources = [*(e.source(operand, "b32") for operand in inputs), str(e.integer(table))]
    e.add(f"A.lop3({', '.join(sources)}, {e.destination(to, 'b32')})")


@handles("shf")
def _funnel_shift(e: Emitter) -> None:
    _, side, mode, type_ = e.parts
    if type_ != "b32" or side not in ("l", "r") or mode not in ("wrap", "clamp"):
        e.fail()
    call(e, f"A.shf({side == 'l'}, {mode == 'wrap'})", "b32")


# --- comparisons ---

COMPARISONS = {
    "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal",
    "lo": "less", "ls": "less_equal", "hi": "greater", "hs": "greater_equal",
}  # fmt: skip
FLOAT_COMPARISONS = {
    **{name: f"{COMPARISONS[name]}({{x}}, {{y}}, {{out}})" for name in ("eq", "lt", "le", "gt", "ge")},
    "ne": "logical_or({x} < {y}, {x} > {y}, {out})",
    "neu": "not_equal({x}, {y}, {out})",
    "equ": "copyto({out}, ~(({x} < {y}) | ({x} > {y})))",
    "ltu": "logical_not({x} >= {y}, {out})",
    "leu": "logical_not({x} > {y}, {out})",
    "gtu": "logical_not({x} <= {y}, {out})",
    "geu": "logical_not({x} < {y}, {out})",
    "num": "logical_not(isnan({x}) | isnan({y}), {out})",
    "nan": "logical_or(isnan({x}), isnan({y}), {out})",
}  # fmt: skip


@handles("setp")
def _setp(e: Emitter) -> None:
    comparison = e.parts[1]
    combine = e.parts[2] if len(e.parts) == 4 and e.parts[2] in ("and", "or", "xor") else None
    if len(e.parts) != (4 if combine else 3) or isinstance(e.operands[0], Pair):
        e.fail()
    to, a, b = e.operands[:3]
    x, y = e.source(a, e.type), e.source(b, e.type)
    out = e.temporary("p") + "b" if combine else e.destination(to, "pred")
    if e.type == "bf16":
        x, y = f"A.wide_bf16({x})", f"A.wide_bf16({y})"
    elif e.type[0] == "b" and comparison not in ("eq", "ne"):
        e.fail()
    if "f" in e.type:
        e.add(FLOAT_COMPARISONS[comparison].format(x=x, y=y, out=out))
    else:
        e.add(f"{COMPARISONS[comparison]}({x}, {y}, {out})")
    if combine:
        e.add(f"logical_{combine}({out}, {e.source(e.operands[3], 'pred')}, {e.destination(to, 'pred')})")


# --- conversions ---

CONVERSIONS = {  # opcode: function, type of the source, type of the result
    "cvt.rn.bf16x2.f32": ("A.pack_bf16", "f32", "b32"),
    "cvt.rn.f16x2.f32": ("A.pack_f16", "f32", "b32"),
    "cvt.f32.bf16": ("A.from_bf16", "bf16", "u32"),
    "cvt.f32.f16": ("A.from_f16", "b16", "f32"),
    "cvt.rn.bf16.f32": ("A.cvt_bf16", "f32", "b16"),
    "cvt.rn.f16.f32": ("A.cvt_f16", "f32", "b16"),
    "cvt.rna.tf32.f32": ("A.cvt_rna_tf32", "f32", "b32"),
}


@handles("cvt")
def _cvt(e: Emitter) -> None:
    *modifiers, to, of = e.parts[1:]
    if e.opcode in CONVERSIONS:
        call(e, *CONVERSIONS[e.opcode])
    elif of in INTEGERS and (to, modifiers) in (*((to, []) for to in INTEGERS), ("f32", ["rn"])):
        source = e.operands[1]
        if isinstance(source, Register) and source.cls == "d" and of in ("s32", "u32"):  # of its low half
            row = f"{e.source(source, 'u64')}.astype({DTYPES[of]})"
        else:
            row = e.source(source, of)
        e.add(f"copyto({e.destination(e.operands[0], to)}, {row}, 'unsafe')")
    elif of == "f32" and modifiers[0] in arithmetic.ROUNDINGS and modifiers[1:] in ([], ["ftz"]):
        rounding, flush = modifiers[0], len(modifiers) == 2
        if to == "f32":
            call(e, f"A.to_integral('{rounding}', {flush})", of)
        else:
            call(e, f"A.float_to_int('{rounding}', {DTYPES[to]}, {flush})", of, to)
    else:
        e.fail()


# --- memory ---

SPACES = {"global": "global", "shared": "shared", "shared::cta": "shared", "param": "param"}
ACCESS_HINTS = {
    "ca", "cg", "cs", "gpu", "L1::evict_first", "L1::evict_last", "nc", "relaxed", "volatile", "weak",
}  # fmt: skip


def _access(e: Emitter) -> tuple[str, int, int]:
    """The space of a load or store, the bytes of an element, and the number of elements."""
    space, count = "", 1
    for part in e.parts[1:-1]:
        if part in ("v2", "v4"):
            count = int(part[1])
        elif part in SPACES:
            space = SPACES[part]
        elif part not in ACCESS_HINTS:
            e.fail()
    return space or e.fail(), BYTES[e.type], count


def _located(e: Emitter, operand: Operand, space: str) -> str:
    """Row of an address and offset, as arguments."""
    row, offset = e.address(operand, "d" if space == "global" else "r")
    return f"{row}, {offset}"


UNITS = {"global": "M.memory", "shared": "M.shared"}


@handles("ld")
def _ld(e: Emitter) -> None:
    space, width, count = _access(e)
    to, address = e.operands
    items = e.items(to, count)
    if space == "param":
        _load_parameter(e, items[0], address, width, count)
        return
    for item in items:
        # What a wider register is filled with is zero, unless the type has a sign.
        size = width if isinstance(item, Blank) else {"h": 2, "r": 4, "d": 8}[e.register(item).cls]
        if size < width or (size > width and e.type[0] == "s"):
            e.fail()
    rows = ", ".join(e.row(item) for item in items)
    e.add(f"{UNITS[space]}.load({e.i}, {_located(e, address, space)}, {width}, {count}, ({rows},), {e.mask})")


def _load_parameter(e: Emitter, to: Operand, address: Operand, width: int, count: int) -> None:
    if not isinstance(address, Address) or address.offset or count != 1:
        e.fail()
    if isinstance(address.base, Register):
        if width != 8:
            e.fail()
        row, _ = e.address(address, address.base.cls)
        e.add(f"copyto({e.destination(to, 'b64')}, M.parameter_at({e.i}, {row}, {e.mask}))")
    else:
        row = f"P{e.program.parameter_number[getattr(address.base, 'name', '')]}_"
        if e.type == "s32":  # a wider register gets its sign
            row = f"{row}.view(int32)"
        wide = "s" if e.type[0] == "s" else "u"
        e.add(f"copyto({e.destination(to, f'{wide}64' if e.register(to).cls == 'd' else f'{wide}32')}, {row})")


@handles("st")
def _st(e: Emitter) -> None:
    space, width, count = _access(e)
    cls = {1: "h", 2: "h", 4: "r", 8: "d"}[width]
    rows = [
        e.program.constant(item, cls, "u") if isinstance(item, Immediate) else e.row(item)
        for item in e.items(e.operands[1], count)
    ]
    address = _located(e, e.operands[0], space)
    e.add(f"{UNITS[space]}.store({e.i}, {address}, {width}, {count}, ({', '.join(rows)},), {e.mask})")


ATOMICS = {
    "add": "add", "max": "maximum", "min": "minimum", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
}  # fmt: skip
ORDERS = ("relaxed", "acquire", "release", "acq_rel")


@handles("atom", "red")
def _atom(e: Emitter) -> None:
    *middle, operation, _ = e.parts[1:]
    orders = [part for part in middle if part in ORDERS]
    if "global" not in middle or any(part not in ("global", "gpu", "sys", *ORDERS) for part in middle):
        e.fail()
    *to, address, b = e.operands
    destination = e.source(e.items(to[0], 1)[0], e.type) if e.parts[0] == "atom" else "None"
    e.add(
        f"M.memory.atomic({e.i}, {_located(e, address, 'global')}, {BYTES[e.type]}, {ATOMICS[operation]}, "
        f"'{orders[0] if orders else 'relaxed'}', {destination}, {e.source(b, e.type)}, {e.mask})"
    )


@handles("cp")
def _cp(e: Emitter) -> None:
    if e.opcode in ("cp.async.cg.shared.global", "cp.async.ca.shared.global"):
        to, source, size, *rest = e.operands
        read = e.source(rest[0], "u32") if rest else "None"
        places = f"{_located(e, to, 'shared')}, {_located(e, source, 'global')}"
        e.add(f"M.cp_async({e.i}, {places}, {e.integer(size)}, {read}, {e.mask})")
    elif e.opcode == "cp.async.commit_group":
        e.add(f"M.cp_commit({e.i}, {e.mask})")
    elif e.opcode == "cp.async.wait_group":
        e.add(f"M.cp_wait({e.i}, {e.integer(e.operands[0])}, {e.mask})")
    else:
        e.fail()


# --- warps ---


def _need_whole_warp(e: Emitter, member: Operand) -> None:
    if e.integer(member) & 0xFFFFFFFF != 0xFFFFFFFF:
        e.fail()


@handles("shfl")
def _shfl(e: Emitter) -> None:
    _, sync, mode, type_ = e.parts
    if sync != "sync" or type_ != "b32":
        e.fail()
    to, *inputs = e.operands
    rows = (e.row(to.first), e.row(to.second)) if isinstance(to, Pair) else (e.row(to), "None")
    sources = [e.source(operand, "b32") for operand in inputs]
    e.add(f"M.shuffle({e.i}, '{mode}', {', '.join((*sources, *rows))}, {e.mask})")


@handles("vote")
def _vote(e: Emitter) -> None:
    _, sync, mode, type_ = e.parts
    to, p, member = e.operands
    _need_whole_warp(e, member)
    if sync != "sync" or mode not in ("any", "all", "ballot") or (type_ == "b32") != (mode == "ballot"):
        e.fail()
    e.add(f"M.vote({e.i}, '{mode}', {e.source(p, 'pred')}, {e.row(to)}, {e.mask})")


@handles("redux")
def _redux(e: Emitter) -> None:
    _, _, operation, type_ = e.parts
    to, a, member = e.operands
    rows = f"{e.source(a, type_)}, {e.source(member, 'b32')}, {e.source(to, type_)}"
    e.add(f"M.redux({e.i}, '{operation}', {rows}, {e.mask})")


@handles("bar")
def _bar_warp(e: Emitter) -> None:
    _need_whole_warp(e, e.operands[0])
    e.add(f"M.warp_sync({e.i}, {e.mask})")


@handles("fence")
def _fence(e: Emitter) -> None:
    if e.opcode not in ("fence.proxy.async.shared::cta", "fence.proxy.async"):
        e.fail()
    e.add(f"M.proxy_fence({e.i}, {e.mask})")


@handles("griddepcontrol")
def _nothing(e: Emitter) -> None:
    """Programmatic launch: kernels run one after the other here."""


# --- tensor cores ---


@handles("mma")
def _mma(e: Emitter) -> None:
    m = re.fullmatch(r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(f16|bf16|tf32)\.\2\.f32", e.opcode)
    if m is None or (m[2] == "tf32") != (m[1] == "8"):
        e.fail()
    d, a, b, c = e.operands
    addend = ", ".join(e.source(item, "f32") for item in e.items(c))
    rows = f"{e.rows(d, 'f')}, {e.rows(a, 'u')}, {e.rows(b, 'u')}, ({addend},)"
    e.add(f"M.mma_sync({e.i}, {m[1]}, '{m[2]}', {rows}, {e.mask})")


@handles("ldmatrix", "stmatrix")
def _matrix(e: Emitter) -> None:
    m = re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16", e.opcode)
    if m is None:
        e.fail()
    registers, address = e.operands if m[1] == "ld" else e.operands[::-1]
    if len(e.items(registers)) != int(m[2]):
        e.fail()
    where = _located(e, address, "shared")
    e.add(f"M.{e.parts[0]}({e.i}, {m[2]}, {m[3] is not None}, {e.rows(registers, 'u')}, {where}, {e.mask})")


@handles("wgmma")
def _wgmma(e: Emitter) -> None:
    if e.opcode == "wgmma.fence.sync.aligned":
        e.add(f"M.whole_ctas({e.i}, {e.mask})")
        return
    if e.opcode == "wgmma.commit_group.sync.aligned":
        e.add(f"M.wgmma_commit({e.i}, {e.mask})")
        return
    if e.opcode == "wgmma.wait_group.sync.aligned":
        e.add(f"M.wgmma_wait({e.i}, {e.integer(e.operands[0])}, {e.mask})")
        return
    m = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(8|16)\.f32\.(f16|bf16|tf32)\.\3", e.opcode)
    if m is None or (m[3] == "tf32") != (m[2] == "8"):
        e.fail()
    d, a, b, keeps, *modifiers = e.operands
    in_registers = isinstance(a, Vector)
    # Signs of both operands, then which of those in shared memory are transposed: none of tf32.
    negate_a, negate_b, *transposed = (e.integer(modifier) for modifier in modifiers)
    if (negate_a, negate_b) != (1, 1) or len(e.items(d)) != int(m[1]) // 2:
        e.fail()
    if len(transposed) != (0 if m[3] == "tf32" else 1 if in_registers else 2):
        e.fail()
    transposed = [0] * (2 - len(transposed)) + transposed
    left = e.rows(a, "u") if in_registers else e.source(a, "b64")
    kept = str(e.integer(keeps) != 0) if isinstance(keeps, Immediate) else e.source(keeps, "pred")
    names = tuple(tuple(getattr(r, "name", "") for r in v.items) if isinstance(v, Vector) else () for v in (d, a))
    e.add(
        f"M.wgmma({e.i}, {m[1]}, '{m[3]}', {e.rows(d, 'f')}, {left}, {e.source(b, 'b64')}, {kept}, "
        f"{transposed[0] == 1}, {transposed[1] == 1}, {names}, {e.mask})"
    )
