"""Optimisers that PyTorch lacks: SOAP, and full-batch quasi-Newton methods with a reported exit reason."""
