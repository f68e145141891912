"""Records made by hand, with protobuf."""

import struct

from tensorflow_datasets.proto import tf_example_pb2

from gear_jax.data import tfrecord


def frame(payload):
    """One TFRecord record."""
    length = struct.pack("<Q", len(payload))
    crc = [struct.pack("<I", tfrecord.masked_crc(part)) for part in (length, payload)]
    return length + crc[0] + payload + crc[1]


def example(**columns):
    """A tf.train.Example."""
    message = tf_example_pb2.Example()
    for key, values in columns.items():
        feature = message.features.feature[key]
        if values and isinstance(values[0], bytes):
            feature.bytes_list.value.extend(values)
        elif values and isinstance(values[0], float):
            feature.float_list.value.extend(values)
        else:
            feature.int64_list.value.extend(values)
    return message.SerializeToString()
