"""Protocols of the literature, as their papers and released code run them: one function each, from model to result.

Example:
    >>> import interp_vlm as iv
    >>> vlm = iv.load("testbed:llava")
    >>> scene = iv.data.digit_scenes(n=1)[0]
    >>> flow = iv.protocols.information_flow(vlm, vlm.encode(scene.image, scene.question), window=3)
    >>> flow.flows
    ('Question->Last', 'Image->Last', 'Image->Question', 'Last->Last')
"""

from interp_vlm.readouts.protocols.flow import FLOWS, InformationFlow, information_flow
from interp_vlm.readouts.protocols.patching import PatchingEffect, notice

__all__ = ["FLOWS", "InformationFlow", "PatchingEffect", "information_flow", "notice"]
