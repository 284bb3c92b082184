"""Helpers that the library shares and users do not import."""
