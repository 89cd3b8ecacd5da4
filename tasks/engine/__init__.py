"""From a configuration to a finished run folder: build, fit, test, report, resume, sweep."""
