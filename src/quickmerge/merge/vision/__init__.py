"""Where a vision transformer reads fewer patches."""
