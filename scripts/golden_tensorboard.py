"""Writes tests/golden/tensorboard.json: an event file by TensorBoard's own record writer, for src/train/tensorboard.rs.

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install tensorboard==2.21.0 && /tmp/venv/bin/python scripts/golden_tensorboard.py
"""

import io
import json
import pathlib
import struct
import zlib

import google.protobuf
import tensorboard
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter


def png(width, height):
    """A black RGB image."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\0" * 3 * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


IMAGE = png(300, 2)
EVENTS = [
    {"what": "file_version", "wall_time": 1700000000.25, "step": 0},
    {"what": "scalars", "wall_time": 1700000001.5, "step": 1, "scalars": [["train/image", 7.625], ["train/gradient_norm", 0.0]]},
    {"what": "scalars", "wall_time": 1700000002.0, "step": 300, "scalars": [["train/learning_rate", 4.5e-4], ["损失", -1e30]]},
    {"what": "image", "wall_time": 1700000003.0, "step": 300, "tag": "samples", "png": IMAGE.hex()},
    {"what": "session_start", "wall_time": 1700000004.0, "step": 5000000000},
]


def message(event):
    made = event_pb2.Event(wall_time=event["wall_time"], step=event["step"])
    if event["what"] == "file_version":
        made.file_version = "brain.Event:2"
    elif event["what"] == "session_start":
        made.session_log.status = event_pb2.SessionLog.START
    elif event["what"] == "image":
        image = summary_pb2.Summary.Image(height=2, width=300, colorspace=3, encoded_image_string=IMAGE)
        made.summary.value.add(tag=event["tag"], image=image)
    else:
        for tag, value in event["scalars"]:
            made.summary.value.add(tag=tag, simple_value=value)
    return made


class Kept(io.BytesIO):
    """Keeps its bytes when the writer closes it."""

    def close(self):
        pass


def main():
    out = Kept()
    writer = RecordWriter(out)
    for event in EVENTS:
        writer.write(message(event).SerializeToString(deterministic=True))
    writer.flush()
    versions = {"tensorboard": tensorboard.__version__, "protobuf": google.protobuf.__version__}
    golden = {"versions": versions, "events": EVENTS, "file": out.getvalue().hex()}
    path = pathlib.Path(__file__).parent.parent / "tests/golden/tensorboard.json"
    path.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
