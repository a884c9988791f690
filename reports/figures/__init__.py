"""Figures from frames. Only this folder knows seaborn and matplotlib; both are loaded on use.

Every panel is a figure of its own, narrow enough for a phone; the page lays panels out side by side where there is
room.
"""

from lmms_keyspace.reports.figures.heat_map import heat_map
from lmms_keyspace.reports.figures.intervals import by_run, intervals
from lmms_keyspace.reports.figures.layers import by_layer
from lmms_keyspace.reports.figures.plane import plane, relation
from lmms_keyspace.reports.figures.style import Drawing

__all__ = ["Drawing", "by_layer", "by_run", "heat_map", "intervals", "plane", "relation"]
