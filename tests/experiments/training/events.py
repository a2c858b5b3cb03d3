"""Reads TensorBoard's event files by their specification: records with checksums, protobuf inside.

``length: uint64, crc(length): uint32, data, crc(data): uint32``, little endian, as
``tensorflow/core/lib/io/record_writer.h`` has it.
"""

import struct
from pathlib import Path
from typing import NamedTuple

from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog


class Scalar(NamedTuple):
    step: int
    name: str
    value: float


def events(path: Path) -> list[Event]:
    """All events of one file, checksums verified."""
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        assert struct.unpack("<I", content[8:12]) == (_masked(content[:8]),)
        data, content = content[12 : 12 + length], content[12 + length :]
        assert len(data) == length
        assert struct.unpack("<I", content[:4]) == (_masked(data),)
        content = content[4:]
        found.append(Event.FromString(data))
    assert found[0].file_version == "brain.Event:2"
    return found


def scalars(folder: Path) -> list[Scalar]:
    """What TensorBoard shows of a folder: files by name; a start at a step hides that and later."""
    shown: list[Scalar] = []
    for path in sorted(folder.glob("*tfevents*")):
        for event in events(path):
            if event.session_log.status == SessionLog.START:
                shown = [scalar for scalar in shown if scalar.step < event.step]
            for value in event.summary.value:
                shown.append(Scalar(event.step, value.tag, value.simple_value))
    return shown


def _masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
