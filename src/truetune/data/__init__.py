"""JSON line → row → conversation → pairs → prepared data."""
