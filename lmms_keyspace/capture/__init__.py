"""Keys of sampled tokens, and the attention of the last prompt token, while a model generates.

`capture` is the face. It announces `rows`; `recording` holds the hooks of one batch, `attention` stands in the
attention function, and `rope_check` compares what both saw. `last_query` and `measures` sum up what the last prompt
token looks at, `sinks` flags attention sinks. `token_store` and `attention_store` keep it all and make the tables.
"""

from lmms_keyspace.capture.capture import Capture
from lmms_keyspace.capture.rows import CaptureError, Row

__all__ = ["Capture", "CaptureError", "Row"]
