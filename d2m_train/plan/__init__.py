"""Estimates of a run before it starts (`distill --dry-run`): memory, FLOPs, disk and tokens."""
