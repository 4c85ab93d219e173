"""Blockwise training: one part of the student at a time against stored teacher features."""
