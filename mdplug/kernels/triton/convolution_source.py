"""Source of the convolution's kernels: every Clebsch-Gordan term a line, paths and tables known when it is made."""

from typing import NamedTuple

Path = tuple[int, int, int]


class Term(NamedTuple):
    """C[m1, m2, m3] of one path."""

    m1: int
    m2: int
    m3: int
    value: float


class Shape(NamedTuple):
    """What a kernel is made for.

    Attributes:
        paths: (l1, l2, l3), sorted by l3. terms: of each path. k: channels. block: those of one program.
        n_harmonics: components. width: channels of a block of the radial table, 0: values are given. has_kind: tables
        by kind. first, step: A, of the knots. per_kind: knots of each table.
    """

    paths: tuple[Path, ...]
    terms: tuple[tuple[Term, ...], ...]
    k: int
    block: int
    n_harmonics: int
    width: int
    has_kind: bool
    first: float
    step: float
    per_kind: int

    def load(self, pointer: str) -> str:
        """A block of channels; masked only where the last block is not full."""
        return f"tl.load({pointer})" if self.k % self.block == 0 else f"tl.load({pointer}, inside, 0.0)"

    def store(self, pointer: str, value: str) -> str:
        """See `load`."""
        return f"tl.store({pointer}, {value}" + (")" if self.k % self.block == 0 else ", inside)")

    def place(self, p: int, m3: int) -> str:
        """Where the message (p, m3) of receiver i stands: matrices (2 l3 + 1, n, paths to l3, k), one after another."""
        l3 = self.paths[p][2]
        to = [q for q, path in enumerate(self.paths) if path[2] == l3]
        row = len(to) * self.k
        before = sum(2 * path[2] + 1 for path in self.paths if path[2] < l3) * self.k
        return f"n * {before + m3 * row} + i * {row} + {(p - to[0]) * self.k}"


def split(shape: Shape, most: int) -> list[list[int]]:
    """Paths by rising l2, in parts of at most `most` messages: these are what a kernel holds in registers."""
    parts: list[list[int]] = [[]]
    held = 0
    for p in sorted(range(len(shape.paths)), key=lambda q: shape.paths[q][1]):
        size = 2 * shape.paths[p][2] + 1
        if parts[-1] and held + size > most:
            parts.append([])
            held = 0
        parts[-1].append(p)
        held += size
    return parts


def _radial(shape: Shape) -> list[str]:
    """Before the paths: weights of the pair's two knots, or where its values stand."""
    if not shape.width:
        return [f"own_values = values + (e - e0) * {len(shape.paths) * shape.k} + channel"]
    weights = ", ".join([f"v{o}" for o in range(6)] + [f"d{o}" for o in range(6)])
    lines = [f"row, {weights} = knot(tl.load(r + e), {shape.first!r}, {1.0 / shape.step!r}, {shape.per_kind})"]
    if shape.has_kind:
        lines.append(f"row += tl.load(kind + e) * {shape.per_kind}")
    return [*lines, f"knots = lanes + row.to(tl.int64) * {len(shape.paths) * 3 * shape.width}"]


def _function(shape: Shape, p: int, slope: bool) -> list[str]:
    """f = R_p of the pair, and its slope."""
    if not shape.width:
        return [f"f = {shape.load(f'own_values + {p * shape.k}')}"]
    size, row = shape.width, len(shape.paths) * 3 * shape.width
    at = [(p * 3 + o) * size for o in range(3)] + [row + (p * 3 + o) * size for o in range(3)]
    lines = [f"t{o} = {shape.load(f'knots + {place}')}" for o, place in enumerate(at)]
    lines.append("f = " + " + ".join(f"v{o} * t{o}" for o in range(6)))
    if slope:
        lines.append("slope = " + " + ".join(f"d{o} * t{o}" for o in range(6)))
    return lines


def _channels(shape: Shape) -> list[str]:
    lines = [f"channel = tl.program_id(1) * {shape.block} + tl.arange(0, {shape.block})"]
    if shape.k % shape.block:
        lines.append(f"inside = channel < {shape.k}")
    if shape.width:
        size = len(shape.paths) * 3 * shape.width
        lines.append(
            f"lanes = table + (channel // {shape.width}).to(tl.int64) * rows * {size} + channel % {shape.width}"
        )
    return lines


def _kernel(name: str, arguments: str, numbers: str, before: list[str], each: list[str], after: list[str]) -> str:
    """`each` is the body of the loop over pairs, whose head is the last line of `before`."""
    plain = ", ".join(repr(number.strip()) for number in numbers.split(","))
    head = f"@triton.jit(do_not_specialize=[{plain}])\ndef {name}({arguments}, {numbers}):\n"
    lines = [f"    {line}" for line in before] + [f"        {line}" for line in each] + [f"    {x}" for x in after]
    return head + "\n".join(lines) + "\n"


def forward(shape: Shape, part: list[int]) -> str:
    """Messages of some paths: a program sums the pairs of one receiver."""
    held = [(p, m3) for p in part for m3 in range(2 * shape.paths[p][2] + 1)]
    before = ["i = tl.program_id(0).to(tl.int64)", *_channels(shape), "e0 = tl.load(first + begin)"]
    zeros = f"tl.zeros(({shape.block},), out.dtype.element_ty)"
    before += [f"a{p}_{m3} = {zeros}" for p, m3 in held]
    before += [f"{name} = tl.load(first + begin + i + {o}).to(tl.int64)" for o, name in enumerate(("start", "stop"))]
    before.append("for e in range(start, stop):")
    each = [f"own = sent + tl.load(sender + e).to(tl.int64) * {shape.k} + channel"]
    for l1 in sorted({shape.paths[p][0] for p in part}):
        each += [f"h{m} = {shape.load(f'own + n_senders * {m * shape.k}')}" for m in range(l1 * l1, (l1 + 1) ** 2)]
    for l2 in sorted({shape.paths[p][1] for p in part}):
        each += [f"y{m} = tl.load(harmonics + e * {shape.n_harmonics} + {m})" for m in range(l2 * l2, (l2 + 1) ** 2)]
    each += _radial(shape)
    for p in part:
        l1, l2, _ = shape.paths[p]
        each += _function(shape, p, slope=False)
        each += [f"s{m1} = f * h{l1 * l1 + m1}" for m1 in range(2 * l1 + 1)]
        each += [f"a{p}_{t.m3} += (y{l2 * l2 + t.m2} * {t.value!r}) * s{t.m1}" for t in shape.terms[p]]
    after = [shape.store(f"out + {shape.place(p, m3)} + channel", f"a{p}_{m3}") for p, m3 in held]
    arguments = "sent, harmonics, table, values, r, kind, sender, first, out"
    return _kernel("convolution", arguments, "begin, n, n_senders, rows", before, each, after)


def backward(shape: Shape) -> str:
    """All cotangents: a program takes the pairs of one sender, and so sums that of its features in registers.

    Those of the harmonics and of r are sums over channels: one for each block of channels, (blocks, pairs, ...).
    """
    n_sent = (max(path[0] for path in shape.paths) + 1) ** 2
    zeros = f"tl.zeros(({shape.block},), grad_sent.dtype.element_ty)"
    before = ["j = tl.program_id(0).to(tl.int64)", *_channels(shape), "e0 = tl.load(first + begin)"]
    before.append(f"own = j * {shape.k} + channel")
    for m in range(n_sent):
        before += [f"h{m} = {shape.load(f'sent + own + n_senders * {m * shape.k}')}", f"dh{m} = {zeros}"]
    before.append("for q in range(tl.load(sent_first + j), tl.load(sent_first + j + 1)):")
    each = ["e = tl.load(order + q)", "i = tl.load(receiver + e - e0).to(tl.int64)"]
    for m in range(shape.n_harmonics):
        each += [f"y{m} = tl.load(harmonics + e * {shape.n_harmonics} + {m})", f"dy{m} = {zeros}"]
    each += _radial(shape)
    if shape.width:
        each.append(f"dr = {zeros}")
    for p, (l1, l2, l3) in enumerate(shape.paths):
        each += _function(shape, p, slope=True)
        each += [f"g{m3} = {shape.load(f'grad + {shape.place(p, m3)} + channel')}" for m3 in range(2 * l3 + 1)]
        each.append(f"back = {zeros}")
        for m1 in range(2 * l1 + 1):
            of_m1 = [t for t in shape.terms[p] if t.m1 == m1]
            h = l1 * l1 + m1
            total = " + ".join(f"(y{l2 * l2 + t.m2} * {t.value!r}) * g{t.m3}" for t in of_m1) or zeros
            each += [f"t = {total}", f"dh{h} += f * t", f"back += h{h} * t", f"s = f * h{h}"]
            for m3 in sorted({t.m3 for t in of_m1}):
                each.append(f"u = s * g{m3}")
                each += [f"dy{l2 * l2 + t.m2} += u * {t.value!r}" for t in of_m1 if t.m3 == m3]
        to = f"grad_radial + (e - e0) * {len(shape.paths) * shape.k} + {p * shape.k} + channel"
        each.append("dr += slope * back" if shape.width else shape.store(to, "back"))
    each.append("at = tl.program_id(1).to(tl.int64) * pairs + e - e0")
    n = shape.n_harmonics
    each += [f"tl.store(grad_harmonics + at * {n} + {m}, tl.sum(dy{m}))" for m in range(n)]
    if shape.width:
        each.append("tl.store(grad_radial + at, tl.sum(dr))")
    after = [shape.store(f"grad_sent + own + n_senders * {m * shape.k}", f"dh{m}") for m in range(n_sent)]
    arguments = (
        "sent, harmonics, table, values, r, kind, first, order, sent_first, receiver, grad, grad_sent, grad_harmonics,"
        " grad_radial"
    )
    return _kernel("convolution_backward", arguments, "begin, n, n_senders, rows, pairs", before, each, after)
