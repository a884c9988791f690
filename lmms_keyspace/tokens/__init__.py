"""What each prompt token is: its modality, its segment, its place in an image.

`labeler` is the face. It takes `prompts` and gives `labels`: `encoding` makes tokens of the text, `boilerplate` finds
the fixed words, `alignment` and `image_tokens` find the text's tokens and the images again in the model's input.
"""

from lmms_keyspace.tokens.labeler import Labeler
from lmms_keyspace.tokens.labels import TokenLabels
from lmms_keyspace.tokens.prompts import Prompt

__all__ = ["Labeler", "Prompt", "TokenLabels"]
