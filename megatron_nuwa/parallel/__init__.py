"""The model over many processes: pipeline × tensor × data parallel."""
