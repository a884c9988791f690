"""Keys of sampled tokens, and the attention of the last prompt token, while a model generates.

`capture` is the face; `recording` holds the hooks of one batch, `attention` stands in the attention function,
`last_query` sums up what the last prompt token looks at, `sinks` flags attention sinks, `captured` keeps it all.
"""

from lmms_keyspace.capture.capture import Capture
from lmms_keyspace.capture.captured import Row
from lmms_keyspace.capture.recording import CaptureError

__all__ = ["Capture", "CaptureError", "Row"]
