"""Trace Routing and Expert Map: recording, storing, serving and drawing routing decisions."""
