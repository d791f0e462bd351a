"""What a run says: the answers and their scores (`answers`), and how attention lies over the picture (`attention`)."""

__all__: list[str] = []
