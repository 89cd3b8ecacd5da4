"""Errors of the data layer, kept free of heavy imports."""


class DataError(ValueError):
    """Data that cannot be had or used: the message says what was looked for and the way out."""
