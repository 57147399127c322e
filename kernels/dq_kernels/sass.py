"""What the machine code of a compiled kernel says: registers, spills, matrix instructions, integer work in its loop."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
MATRIX = ("HGMMA", "HMMA")
INTEGER = ("LOP3", "SHF", "PRMT", "I2F")


@dataclass(frozen=True)
class Code:
    """``registers`` a thread, ``stack`` bytes, and instructions as (opcode with modifiers, operands); ``labels``: the
    index of the instruction after each."""

    registers: int
    stack: int
    instructions: Sequence[tuple[str, str]]
    labels: dict[str, int]

    def count(self, *names: str) -> int:
        """Instructions whose opcode, without modifiers, is one of ``names``."""
        return sum(op.split(".")[0] in names for op, _ in self.instructions)

    def matrix(self) -> str:
        """The widest matrix instruction in the code, or "-"."""
        return next((name for name in MATRIX if self.count(name)), "-")

    def wide_async_copies(self) -> int:
        """Copies of 16 bytes from global to shared memory that wait for nothing."""
        return sum(op.startswith("LDGSTS") and op.endswith(".128") for op, _ in self.instructions)

    def inner_loop(self) -> Counter[str]:
        """Opcodes of the shortest loop that holds a matrix instruction; empty if there is none."""
        best: Sequence[tuple[str, str]] = ()
        for at, (op, operands) in enumerate(self.instructions):
            target = re.search(r"\.L_x_\d+", operands) if op.startswith("BRA") else None
            start = self.labels.get(target[0], at + 1) if target else at + 1
            body = self.instructions[start : at + 1]
            if any(o.startswith(MATRIX) for o, _ in body) and (not best or len(body) < len(best)):
                best = body
        return Counter(op.split(".")[0] for op, _ in best)


def read_code(cubin: bytes, cuobjdump: str, nvdisasm: str) -> Code:
    """Disassemble; raises RuntimeError if the tools print no resource usage."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "-res-usage", file.name]
        usage = subprocess.check_output(command, text=True, stderr=subprocess.STDOUT)
        listing = subprocess.check_output([nvdisasm, "-c", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no REG/STACK: {usage.strip()[-200:]}")
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.search(line):
            instructions.append((instruction[1], instruction[2]))
    return Code(int(found[1]), int(found[2]), instructions, labels)
