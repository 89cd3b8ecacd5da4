"""Commands of `python -m zoo`, one file each. Like train.py they stand above every layer and may import all."""
