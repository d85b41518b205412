"""stage=label: people say which of two images is better, and that becomes training data."""
