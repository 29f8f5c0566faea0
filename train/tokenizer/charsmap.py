"""SentencePiece's normalisation table: reads it, and writes one with fewer rules.

    rules = read_rules(model.normalizer_spec.precompiled_charsmap)
    table = write_rules({key: value for key, value in rules.items() if len(key) == 1})

The format (little endian): 4 bytes with the size of a double array in bytes, the double array (darts-clone units of
32 bits), then all values as UTF-8 strings that end in a zero byte. A key's leaf holds its value's offset.
Sources: sentencepiece/src/normalizer.cc (DecodePrecompiledCharsMap) and darts-clone's darts.h (DoubleArrayUnit).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

_IS_LEAF = 1 << 31
_HAS_LEAF = 1 << 8
_NODES_AT_ONCE = 2048  # keeps the vectorised search within a few megabytes
_OPEN_BLOCKS = 16  # older blocks are nearly full: searching them again costs more than the units it saves
_BLOCK = 256  # a node's children stand at `base ^ label`, so within one aligned block of 256 units


def read_rules(table: bytes) -> dict[str, str]:
    """All rules of a table, key to value; none when the table is empty (`identity`)."""
    if not table:
        return {}
    import numpy

    (size,) = struct.unpack_from("<I", table)
    units = numpy.frombuffer(table, dtype="<u4", count=size // 4, offset=4)
    values = table[4 + size :]
    rules: dict[str, str] = {}
    unit_labels = numpy.where(units & _IS_LEAF, 0, units & 0xFF).astype(numpy.uint8)
    children = numpy.arange(_BLOCK, dtype=numpy.int32)
    pending = [(b"", _offset(int(units[0])))]
    while pending:
        prefixes, bases = zip(*pending[-_NODES_AT_ONCE:], strict=True)
        del pending[-_NODES_AT_ONCE:]
        positions = numpy.array(bases, dtype=numpy.int32)[:, None] ^ children
        found = (unit_labels[positions] == children) & (children > 0)
        for parent, label in zip(*(index.tolist() for index in numpy.nonzero(found)), strict=True):
            position = bases[parent] ^ label
            unit = int(units[position])
            base = position ^ _offset(unit)
            key = prefixes[parent] + bytes((label,))
            if unit & _HAS_LEAF:
                start = int(units[base]) & ~_IS_LEAF
                rules[key.decode()] = values[start : values.index(0, start)].decode()
            pending.append((key, base))
    return rules


def write_rules(rules: Mapping[str, str]) -> bytes:
    """A table with exactly these rules, its double array built from nothing."""
    values = bytearray()
    offsets: dict[str, int] = {}
    for value in sorted(set(rules.values())):
        offsets[value] = len(values)
        values += value.encode() + b"\0"
    units = _double_array({key.encode(): offsets[value] for key, value in rules.items()})
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + bytes(values)


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & (1 << 9)) >> 6)


def _double_array(leaves: Mapping[bytes, int]) -> list[int]:
    """Darts-clone units of a trie: each key's bytes lead to a leaf with its number."""
    children: dict[bytes, set[int]] = {b"": set()}
    for key in leaves:
        for end in range(len(key)):
            children.setdefault(key[:end], set()).add(key[end])
        children.setdefault(key, set())

    units = [0] * _BLOCK
    taken = bytearray(_BLOCK)
    taken[0] = 1
    bases: set[int] = set()
    pending: list[tuple[bytes, int]] = [(b"", 0)]
    while pending:
        prefix, position = pending.pop()
        labels = sorted(children[prefix])
        if prefix in leaves:
            labels.insert(0, 0)
        first = max(0, len(units) - _OPEN_BLOCKS * _BLOCK) - 1
        while True:
            first = taken.find(0, first + 1)
            if first < 0:
                first = len(units)
                units.extend([0] * _BLOCK)
                taken.extend(bytes(_BLOCK))
            base = first ^ labels[0]
            # No two nodes share a base: only the label of a unit is checked, not whose child it is.
            if base not in bases and not any(taken[base ^ label] for label in labels):
                break
        bases.add(base)
        relative = position ^ base
        if relative >= 1 << 21:
            raise ValueError("the table is too large for plain offsets")
        units[position] |= relative << 10
        for label in labels:
            taken[base ^ label] = 1
            if label == 0:
                units[position] |= _HAS_LEAF
                units[base] = leaves[prefix] | _IS_LEAF
            else:
                units[base ^ label] |= label
                pending.append((prefix + bytes((label,)), base ^ label))
    return units
