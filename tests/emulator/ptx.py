"""Reads PTX text: kernels with their parameters, registers, shared variables and instructions.

Source: NVIDIA, "Parallel Thread Execution ISA". Only what nvcc writes for kernels is understood;
anything else is refused with the line it stands on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

#: Bytes of each type, by the last part of its name.
WIDTHS = {
    "pred": 1,
    **{f"{kind}{bits}": bits // 8 for kind in "bsuf" for bits in (8, 16, 32, 64, 128)},
    "bf16": 2,
    "f16x2": 4,
    "bf16x2": 4,
}


#: Bytes between shared variables, so that running from one into the next is found.
_GAP = 256


class PtxError(ValueError):
    """PTX that this emulator does not understand."""


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode operands``; ``opcode`` is split at its dots, operands at their commas."""

    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None  # register name, or None
    guard_negated: bool
    source: str  # "file:line" of the CUDA source, then " in file:line" if inlined there; or ""
    text: str


@dataclass
class Kernel:
    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset, size
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset, size
    shared_size: int = 0
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index into code


_TOKEN = re.compile(
    r"""\s*(?:
      (?P<label>[$%\w]+):(?!:)
    | (?P<loc>\.loc\s+[^\n]*)
    | (?P<open>\{)
    | (?P<close>\})
    | (?P<statement>(?:[^;{}"]|\{[^{};]*\}|"[^"]*")+;)
    )""",
    re.VERBOSE,
)
_ENTRY = re.compile(r"\.entry\s+([$\w]+)\s*\(([^)]*)\)([^{]*)\{")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr[^\n,]*?)?\s+([$\w]+)(?:\[(\d+)\])?"
)
_VARIABLE = re.compile(r"\.(?:align\s+(\d+)\s+\.)?(\w+)\s+([$\w]+)(?:\[(\d+)\])?(?:\s*=\s*(.*))?")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*);", re.DOTALL)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _split(text: str) -> tuple[str, ...]:
    """Operands: at the commas that are in no bracket."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return tuple([*parts, last] if last else parts)


def _strip_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


class _Scopes:
    """Registers declared between braces (inline assembly) hide those outside."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._renamed: list[dict[str, str]] = [{}]
        self._count = 0

    def open(self) -> None:
        self._count += 1
        self._renamed.append({})

    def close(self) -> bool:
        self._renamed.pop()
        return bool(self._renamed)

    def declare(self, statement: str) -> None:
        match = _REGISTERS.match(statement)
        if not match:
            raise PtxError(f"cannot read the declaration {statement!r}")
        kind, names = match.groups()
        for name in _split(names):
            if counted := re.fullmatch(r"(%\w+)<(\d+)>", name):
                self._kernel.registers |= {f"{counted[1]}{i}": kind for i in range(int(counted[2]))}
                continue
            unique = name if len(self._renamed) == 1 else f"{name}@{self._count}"
            self._renamed[-1][name] = unique
            self._kernel.registers[unique] = kind

    def resolve(self, text: str) -> str:
        for scope in self._renamed[1:]:
            for name, unique in scope.items():
                text = re.sub(rf"(?<![\w%$]){re.escape(name)}(?![\w@])", unique, text)
        return text


def _parameters(text: str) -> dict[str, tuple[int, int]]:
    parameters, offset = {}, 0
    for declaration in _split(text):
        match = _PARAMETER.match(declaration)
        if not match:
            raise PtxError(f"cannot read the parameter {declaration!r}")
        alignment, kind, name, count = match.groups()
        size = WIDTHS[kind] * int(count or 1)
        offset = _aligned(offset, int(alignment or WIDTHS[kind]))
        parameters[name] = (offset, size)
        offset += size
    return parameters


def _declare_shared(kernel: Kernel, statement: str) -> None:
    match = _VARIABLE.match(statement.removeprefix(".shared").strip().rstrip(";"))
    if not match:
        raise PtxError(f"cannot read the declaration {statement!r}")
    alignment, kind, name, count, _ = match.groups()
    size = WIDTHS[kind] * int(count or 1)
    offset = _aligned(kernel.shared_size, int(alignment or WIDTHS[kind]))
    kernel.shared[name] = (offset, size)
    kernel.shared_size = offset + size + _GAP


def _instruction(statement: str, source: str) -> Instruction:
    match = re.match(r"(?:@(!?)([%$\w@]+)\s+)?([\w.:]+)\s*(.*)$", statement, re.DOTALL)
    if not match:
        raise PtxError(f"cannot read {statement!r} ({source})")
    negated, guard, opcode, operands = match.groups()
    return Instruction(
        tuple(opcode.split(".")),
        _split(operands),
        guard,
        bool(negated),
        source,
        " ".join(statement.split()),
    )


def _body(kernel: Kernel, text: str, start: int, files: dict[int, str]) -> int:
    """Reads a kernel from behind its opening brace; returns where it ends."""
    scopes, source, position = _Scopes(kernel), "", start
    while match := _TOKEN.match(text, position):
        position = match.end()
        if match["label"]:
            kernel.labels[match["label"]] = len(kernel.code)
        elif match["loc"]:
            places = re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)", match["loc"])
            source = " in ".join(f"{files.get(int(file), '?')}:{line}" for file, line in places)
        elif match["open"]:
            scopes.open()
        elif match["close"]:
            if not scopes.close():
                return position
        else:
            statement = match["statement"].strip()
            if statement.startswith(".reg"):
                scopes.declare(statement)
            elif statement.startswith(".shared"):
                _declare_shared(kernel, statement)
            elif not statement.startswith(".pragma"):
                resolved = scopes.resolve(statement.removesuffix(";").strip())
                kernel.code.append(_instruction(resolved, source))
    raise PtxError(f"{kernel.name}: cannot read {text[position : position + 80]!r}")


_SHARED = re.compile(r"^[ \t]*(?:\.\w+[ \t]+)?(\.shared[^;{]*;)", re.MULTILINE)


class Module:
    """The kernels (``.entry``) of a PTX file, each read when it is first asked for."""

    def __init__(self, text: str) -> None:
        files = re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)
        self._files = {int(number): path.rsplit("/", 1)[-1] for number, path in files}
        self._text = _strip_comments(text)
        self._entries = {match[1]: match for match in _ENTRY.finditer(self._text)}
        first = min((match.start() for match in self._entries.values()), default=0)
        self._shared = _SHARED.findall(self._text[:first])

    @property
    def names(self) -> list[str]:
        """Of all kernels."""
        return list(self._entries)

    def kernel(self, name: str) -> Kernel:
        """One kernel.

        Raises:
            PtxError: it holds something that is not understood.
        """
        entry = self._entries[name]
        kernel = Kernel(name, _parameters(entry[2]))
        end = _body(kernel, self._text, entry.end(), self._files)
        body = self._text[entry.end() : end]
        for declaration in self._shared:
            variable = _VARIABLE.match(declaration.removeprefix(".shared").strip().rstrip(";"))
            if variable and variable[3] in body:
                _declare_shared(kernel, declaration)
        return kernel
