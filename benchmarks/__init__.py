"""Speed, as ratios measured in one run. `python -m benchmarks` runs all; results/ holds what was measured, and where."""
