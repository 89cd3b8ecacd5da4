"""Parts of the physics-informed task: balancing of loss terms, sampling by residual, figures."""
