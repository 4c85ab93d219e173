"""Benchmarks of speed, as ratios that one run measures. `python -m benchmarks` runs them; results/ has the results."""
