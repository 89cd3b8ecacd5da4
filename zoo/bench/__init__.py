"""Timing: operations by length, and whole training steps beside the peers that users would pick instead."""
