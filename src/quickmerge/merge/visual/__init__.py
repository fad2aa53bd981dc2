"""Where a vision-language model reads fewer visual tokens: in the tower, behind the projector, inside."""
