"""What a run shows while it trains: log, validation, sample images and router statistics."""
