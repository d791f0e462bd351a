"""Planted circuits: models of the real classes whose answer takes a known route, written into their weights by hand.

Each picture is grey but for one cell, red or blue; the question is what colour it has. One head (or two) reads the cell
and hands its colour on, to the last token or to a relay on the way; two neurons turn it into the answer. Everything
else in the model is random, busy, and read by nobody.
"""

from interp_vlm.testbed.planted.circuit import Planted, plant
from interp_vlm.testbed.planted.route import DETOURS, Edge, Route

__all__ = ["DETOURS", "Edge", "Planted", "Route", "plant"]
