"""Tasks: one LightningModule per kind of task, and the engine that runs them from a configuration."""
