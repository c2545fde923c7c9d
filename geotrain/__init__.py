"""geotrain trains one PyTorch model on data that lives in several regions, without moving the data."""

__version__ = "0.1.0"
