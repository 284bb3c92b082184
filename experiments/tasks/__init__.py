"""Models with tasks: how data become losses."""
