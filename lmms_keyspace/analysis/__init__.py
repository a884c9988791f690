"""`lmms-keyspace analyze`: tests, intervals and changes of a finished run again, from its sums or its kept keys."""

from lmms_keyspace.analysis.analyze import PROTOCOLS, Analysis, analyze
from lmms_keyspace.analysis.terminal import show_analysis

__all__ = ["PROTOCOLS", "Analysis", "analyze", "show_analysis"]
