"""What each prompt token is: its modality, its segment, its place in an image."""

from lmms_keyspace.tokens.labeler import Labeler, Prompt, TokenLabels

__all__ = ["Labeler", "Prompt", "TokenLabels"]
