"""Helpers shared by the operations; torch only."""
