"""Optimisers that PyTorch lacks: SOAP, Muon joined with AdamW, and full-batch quasi-Newton methods with a reported exit reason."""
