"""Where things are: token maps, image grids, pixels to tokens and back, and the algebra of selectors."""
