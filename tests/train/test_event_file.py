import struct

from gear_jax.data.tfrecord import _fields, frames
from gear_jax.train.event_file import EventFile


def _parse(data):
    """{number: [value]} of a message; bytes, or a varint as it is."""
    found = {}
    for number, wire, start, stop in _fields(data, 0, len(data)):
        found.setdefault(number, []).append((wire, data[start:stop]))
    return found


def test_what_is_written_is_the_events_that_tensorboard_reads(tmp_path):
    file = EventFile(tmp_path, 300)
    file.add(301, {"loss": 0.5, "perplexity/1": -2.0})
    file.close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    data = path.read_bytes()
    events = [_parse(data[a : a + n]) for a, n in frames(data, "events")]
    assert [event.keys() for event in events] == [{1, 3}, {1, 2, 7}, {1, 2, 5}]
    assert events[0][3] == [(2, b"brain.Event:2")]
    assert (events[1][2], events[1][7]) == ([(0, b"\xad\x02")], [(2, b"\x08\x01")])
    seen = {}
    for _, value in _parse(events[2][5][0][1])[1]:
        fields = _parse(value)
        seen[fields[1][0][1].decode()] = struct.unpack("<f", fields[2][0][1])[0]
    assert seen == {"loss": 0.5, "perplexity/1": -2.0}
    assert events[2][2] == [(0, b"\xad\x02")]
