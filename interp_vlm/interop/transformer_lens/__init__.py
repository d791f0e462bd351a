"""TransformerLens: adapters for families that it lacks, hooks that take effect, and bridges that share the weights.

Nothing here imports TransformerLens before it is asked for.
"""

from interp_vlm.interop.transformer_lens.bridge import to_bridge
from interp_vlm.interop.transformer_lens.register import register

__all__ = ["register", "to_bridge"]
