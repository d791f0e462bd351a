"""Doors to other libraries: `interp_vlm.interop.transformer_lens`."""

__all__: list[str] = []
